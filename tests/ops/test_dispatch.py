"""What decides between a kernel and the reference, without a GPU."""

import contextlib
import functools
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import SIGNATURES, Shape, call, cotangents, torch_op_arguments
from mhc_tile import _library, set_batch_invariant
from mhc_tile._library import OPS
from mhc_tile.autotune import registry
from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.registry import Target
from mhc_tile.kernels.common.architectures import multiprocessors_of
from mhc_tile.ops import _definition, _dispatch
from mhc_tile.ops.sinkhorn import SINKHORN


@pytest.fixture
def implementation(monkeypatch):
    """A dispatcher on CPU tensors: what ran, and with what."""
    monkeypatch.setattr(_dispatch, "_unfit", lambda *_: None)
    monkeypatch.setattr(_dispatch, "_current", lambda _device: contextlib.nullcontext())
    return _dispatch.on_cuda(
        "op",
        lambda *args: ("kernel", *args),
        lambda *args: ("reference", *args),
        streams=lambda x, *_: (x, x.shape[-2]),
    )


def test_a_kernel_runs_where_one_fits(implementation):
    x = torch.randn(3, 4, 8)
    assert implementation(x, 2)[0] == "kernel"
    assert implementation(x, 2)[1] is x


def test_the_reference_serves_float64_and_comparisons(implementation, monkeypatch):
    assert implementation(torch.randn(3, 4, 8, dtype=torch.float64))[0] == "reference"
    monkeypatch.setattr(_dispatch, "REFERENCE_ONLY", True)
    assert implementation(torch.randn(3, 4, 8))[0] == "reference"


def test_what_no_kernel_takes_warns_once(implementation, monkeypatch):
    monkeypatch.setattr(_dispatch, "_unfit", lambda *_: "it is too odd")
    _dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="op: the PyTorch reference runs .* it is too odd"):
        assert implementation(torch.randn(3, 4, 8))[0] == "reference"


@pytest.mark.parametrize("last", [(), (4, 2)])
def test_the_reference_serves_more_tokens_than_a_launch_counts(implementation, last):
    _dispatch._warn_once.cache_clear()
    one = torch.zeros(1, *last) if last else torch.zeros(1, 1, 1)
    last = last or (1, 1)
    for tokens in ((2**31 - 2**16,), (3, 2**15)):
        assert implementation(one.expand(*tokens, *last))[0] == "kernel"
    with pytest.warns(RuntimeWarning, match=r"op: .*at most 2147418112 tokens, got 2147483648"):
        assert implementation(one.expand(2**31, *last))[0] == "reference"
    assert implementation(one.expand(2**16, 2**15, *last))[0] == "reference"  # warned already


HAS_KERNEL = sorted(name for name in OPS if not name.startswith("head"))


@pytest.mark.parametrize("name", HAS_KERNEL)
def test_every_op_counts_tokens(name, implementation, monkeypatch):
    monkeypatch.setattr(_dispatch._toolchain, "MOST_TOKENS", 2)
    _dispatch._warn_once.cache_clear()
    args, others = torch_op_arguments(name)
    values = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    op = getattr(torch.ops.mhc_tile, name).default
    with pytest.warns(RuntimeWarning, match=rf"^{name}: .* at most 2 tokens, got 3"):
        op._op_dk(torch._C.DispatchKey.CUDA, *values, **others)


def test_a_tensor_that_starts_off_16_bytes_reaches_the_kernel_as_a_copy(implementation):
    buffer = torch.randn(97)
    views = [buffer[start : start + 96].view(3, 4, 8) for start in (0, 1)]
    misaligned = next(view for view in views if view.data_ptr() % 16)
    _, given = implementation(misaligned)
    assert given.data_ptr() % 16 == 0
    assert torch.equal(given, misaligned)


COUNTS = (1, 1023, 1024, 8192)
H200 = Target("sm_90a", 132)


@pytest.fixture
def batch_invariant():
    set_batch_invariant(True)
    yield
    set_batch_invariant(False)


@pytest.mark.parametrize("name", ["merge_backward", "pre_apply_backward", "pre", "pre_backward"])
def test_one_configuration_for_every_number_of_tokens(name):
    pytest.importorskip("tilelang")
    target = H200
    problems = [Problem(name, 4, 2560, "bfloat16", tokens) for tokens in COUNTS]
    pinned = {registry.default(problem, target, batch_invariant=True) for problem in problems}
    assert pinned == {registry.default(problems[-1], target)}
    assert registry.default(problems[0], target) not in pinned


@pytest.mark.parametrize("name", ["merge", "pre_apply", "mapping", "pre"])
def test_no_forward_adds_in_an_order_that_depends_on_the_number_of_tokens(name):
    pytest.importorskip("tilelang")
    for width in (64, 1280, 2560, 7168):
        problems = [Problem(name, 4, width, "bfloat16", tokens) for tokens in COUNTS]
        configs = [registry.default(each, H200, batch_invariant=True) for each in problems]
        if name in ("merge", "pre_apply"):
            assert len(set(configs)) == 1
            continue
        # the segments over which partial sums are formed, and the tokens that travel together
        assert len({type(config) for config in configs}) == 1
        assert len({(c.members, c.steps, c.group) for c in configs}) == 1


def test_pre_is_one_launch_for_many_tokens_and_two_for_few():
    pytest.importorskip("tilelang")
    pre = importlib.import_module("mhc_tile.kernels.pre.launch")
    problem = Problem("pre", 4, 2560, "bfloat16", 8192)
    forms = [type(pre.default_config(problem.at(t), H200)) for t in (1, 311, 312, 8192)]
    assert forms == [pre.Config, pre.Config, pre.persistent.Config, pre.persistent.Config]
    pinned = pre.default_config(problem.at(1), H200, batch_invariant=True)
    assert isinstance(pinned, pre.persistent.Config)
    assert isinstance(pre.default_config(problem, Target("sm_80", 108)), pre.Config)


@pytest.mark.parametrize(
    ("n", "first", "last", "arch"),
    [
        (1, 3080, None, "sm_90a"), (2, 1544, 24576, "sm_90a"), (4, 256, 12288, "sm_90a"),
        (8, 104, 512, "sm_90a"), (4, 256, 12288, "sm_100a"), (8, 104, 512, "sm_120a"),
    ],
)  # fmt: skip
def test_the_persistent_pre_takes_the_widths_of_its_page(n, first, last, arch):
    pytest.importorskip("tilelang")
    persistent = importlib.import_module("mhc_tile.kernels.pre.persistent")
    target = Target(arch, multiprocessors_of(arch))

    def runs(width):
        return persistent.default_config(Problem("pre", n, width, "bfloat16", 1), target)

    assert runs(first)
    assert not runs(first - 8)
    assert last is None or (runs(last) and not runs(last + 8))


def test_boundary_is_one_launch_where_pre_is_and_adds_like_it():
    pytest.importorskip("tilelang")
    pre = importlib.import_module("mhc_tile.kernels.pre.launch")
    boundary = importlib.import_module("mhc_tile.kernels.boundary.launch")

    def form(tokens, channels=2560, n=4, arch="sm_90a", **others):
        problem = Problem("pre", n, channels, "bfloat16", tokens)
        own = pre.default_config(problem, Target(arch, 132), **others)
        return own, boundary.beside(own, n, channels, arch)

    for channels in (312, 512, 768, 1280, 1920, 2560, 4096, 5120, 7168):
        own, one = form(8192, channels)
        sums = ("width", "steps", "warps")  # no bit depends on the tokens of a tile
        segments = (config.segment(4, channels) for config in (one, own))
        assert len({tuple(getattr(each, name) for name in sums) for each in segments}) == 1
        assert (one.members, one.teams) == (own.members, own.teams)
        assert one.registers_of_roles(4, channels)[0] == 128  # in which nothing spills
    assert form(1, batch_invariant=True)[1] == form(8192)[1]
    assert boundary.beside(replace(form(8192, 7168)[0], members=32), 4, 7168, "sm_90a") is None
    for two in (
        form(311),
        form(8192, 256),
        form(8192, n=2),
        form(8192, arch="sm_80"),
        form(8192, arch="sm_100a"),
        form(8192, channels=304),
    ):
        assert two[1] is None


@pytest.mark.parametrize(
    ("channels", "n", "dtype", "threads"),
    [
        (512, 4, "bfloat16", 32), (1280, 4, "bfloat16", 64), (1536, 2, "bfloat16", 64),
        (1920, 4, "bfloat16", 128), (7168, 4, "bfloat16", 128),
        (768, 4, "float32", 64), (1280, 4, "float32", 128), (1280, 8, "bfloat16", 128),
    ],
)  # fmt: skip
def test_warps_share_a_row_of_few_tokens_in_the_backward_of_merge(channels, n, dtype, threads):
    pytest.importorskip("tilelang")
    kernel = importlib.import_module("mhc_tile.kernels.merge")
    problem = Problem("merge_backward", n, channels, dtype, 1024)
    few = kernel.default_config(problem.at(1023), H200)
    many = kernel.default_config(problem, H200)
    assert (few.threads, many.threads) == (threads, 32)
    warps = 8 if n == 8 else 16  # a multiprocessor, for few and for many
    assert few.threads // 32 * few.min_blocks == many.min_blocks == warps
    assert kernel.default_config(problem.at(1), H200, batch_invariant=True) == many


def test_kernels_parse_no_macro_before_a_program_uses_it():
    pytest.importorskip("tilelang")
    code = """
import importlib
import tilelang.language as T
import mhc_tile
def refuse(function): raise AssertionError(function)
T.macro = refuse
for name in ("pre.launch", "pre_backward.launch", "mapping.backward", "merge", "streams"):
    importlib.import_module(f"mhc_tile.kernels.{name}")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_backward_of_pre_is_one_pass_for_many_tokens_and_two_for_few():
    pytest.importorskip("tilelang")
    kernel = importlib.import_module("mhc_tile.kernels.pre_backward.launch")
    one = kernel.persistent.Config

    def form(tokens, channels=2560, n=4, dtype="bfloat16", arch="sm_90a", **others):
        problem = Problem("pre_backward", n, channels, dtype, tokens)
        return type(kernel.default_config(problem, Target(arch, 132), **others))

    problem = Problem("pre_backward", 4, 2560, "bfloat16", 1)
    groups = kernel.persistent.default_config(problem, H200).teams
    few = kernel.MANY_ITERATIONS * 16 * groups
    assert [form(t) for t in (1, few - 1, few, 8192)] == [kernel.Config, kernel.Config, one, one]
    assert form(1, batch_invariant=True) is one
    for other in ({"arch": "sm_80"}, {"n": 2}, {"dtype": "float32"}, {"channels": 2561}):
        assert form(8192, **other) is kernel.Config
        assert form(1, **other, batch_invariant=True) is kernel.Config
    for channels in (264, 1280, 1920, 4096, 7168, 8192):
        pinned = {
            (config.members, config.lag)
            for count in (32, 108, 132)
            if (
                config := kernel.persistent.default_config(
                    replace(problem, channels=channels), Target("sm_90a", count)
                )
            )
        }
        assert len(pinned) == 1, "the segments of a token's sums follow from C"


@pytest.mark.parametrize(
    ("capability", "tilelang", "n", "why"),
    [
        ((8, 0), "0.1", 4, None),
        ((7, 5), "0.1", 4, "compute capability 7.5, kernels need 8.0"),
        ((9, 0), None, 4, "TileLang is not installed"),
        ((9, 0), "0.1", 3, r"kernels take n in \(1, 2, 4, 8\), got 3"),
    ],
)
def test_why_no_kernel_runs(monkeypatch, capability, tilelang, n, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(_dispatch._toolchain, "tilelang_version", lambda: tilelang)
    reason = _dispatch._unfit.__wrapped__(0, n)
    assert reason is None if why is None else re.search(why, reason)


class Launched(TorchDispatchMode):
    """Asks every op's kernels, without a GPU, for what the op has just returned on the CPU."""

    def __init__(self, dry_run):
        super().__init__()
        self.dry_run, self.compared = dry_run, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        op = _definition.DEFINITIONS.get(name) if func.namespace == "mhc_tile" else None
        if op is not None and op.kernel:
            launch = _library._with_defaults(func, op.by_kernel)
            with self.dry_run("sm_90a", 132):
                found = launch(
                    *map(self.bare, args), **{k: self.bare(v) for k, v in kwargs.items()}
                )
            pair = [self.listed(found), self.listed(results)]
            self.compared.append((name, pair))
        return results

    def bare(self, value):
        """Without values, on no device."""
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def listed(self, results):
        results = (results,) if isinstance(results, torch.Tensor) else results
        return [(value.shape, value.dtype, value.is_contiguous()) for value in results]


@pytest.mark.parametrize("tokens", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("name", [name for name in SIGNATURES if name != "head"])
def test_kernels_return_what_the_op_returns(name, tokens):
    """Shapes and dtypes, contiguous, forward and backward, whatever the leading dims are."""
    pytest.importorskip("tilelang")
    programs = importlib.import_module("mhc_tile.kernels.common.programs")
    made = call(name, Shape("leading", tokens=tokens), torch.bfloat16).to(grad=True)
    with Launched(programs.dry_run) as seen:
        results = made.run()
        torch.autograd.grad(results, made.inputs, cotangents(results))
    assert {op for op, _ in seen.compared} == {name, f"{name}_backward"}
    for op, (found, expected) in seen.compared:
        assert found == expected, op


def test_the_apply_warps_cover_the_channels_of_a_rank():
    """Apply warps take 8 channels a lane and do not loop."""
    from mhc_tile.kernels.pre import persistent

    narrow = persistent.Config(2, 1, group=8, lag=2, apply_warps=1, owners=1)
    assert not narrow.launches(2, 1024, "sm_90a")
    assert narrow.launches(2, 512, "sm_90a")
    for registers in (0, 81, 248):
        with pytest.raises(ValueError, match=f"registers must be a multiple of 8 .* {registers}"):
            persistent.Config(10, 13, registers=registers)


def test_a_table_s_threads_do_not_limit_the_iterations(monkeypatch):
    """More iterations than those that a table was measured with take the default's threads."""
    pytest.importorskip("tilelang")
    kernel = importlib.import_module("mhc_tile.kernels.sinkhorn")
    used, wide = [], kernel.Config(threads=128)

    def program(arch, n, sinkhorn, threads):
        used.append(threads)
        return lambda *_: None

    monkeypatch.setattr(kernel, "backward_program", program)
    monkeypatch.setattr(kernel, "architecture", lambda _: "sm_90a")
    monkeypatch.setattr(_definition, "tuned", lambda name, x, sizes, launch: launch(wide))
    launch_op = SINKHORN.backward.by_kernel
    logits = torch.zeros(3, 4, 4)
    for iters in (20, 57):
        launch_op(logits, logits, iters=iters, eps=0.0)
    assert used == [128, kernel.Config().threads]
    for launch in (launch_op, functools.partial(kernel.backward, config=wide)):
        with pytest.raises(RuntimeError, match="sinkhorn: iters must be at most"):
            launch(logits, logits, iters=5000, eps=0.0)
    with pytest.raises(RuntimeError, match="with 128 threads a block on this GPU, got 57"):
        kernel.backward(logits, logits, iters=57, eps=0.0, config=wide)


def test_a_boundary_that_fails_costs_pre_nothing(monkeypatch):
    """The table's entry is that of `pre`: what fails with it here is run as two launches."""
    pytest.importorskip("tilelang")
    kernel = importlib.import_module("mhc_tile.kernels.boundary.launch")
    op = importlib.import_module("mhc_tile.ops.boundary")
    given, entry = [], object()

    def forward(*_, config, **__):
        given.append(config)
        raise RuntimeError("too many resources\nrequested for launch")

    monkeypatch.setattr(kernel, "forward", forward)
    monkeypatch.setattr(op, "tuned", lambda name, x, sizes, launch: launch(entry))
    monkeypatch.setattr(op, "MERGE", SimpleNamespace(by_kernel=lambda x, *_: x + 1))
    monkeypatch.setattr(op, "PRE", SimpleNamespace(by_kernel=lambda x, *_, **__: (x.sum(-2),)))
    monkeypatch.setattr(op.lookup, "default", lambda asked: None)
    _dispatch._warn_once.cache_clear()
    made = call("boundary", Shape("any", tokens=(3,)), torch.bfloat16)
    with pytest.warns(
        RuntimeWarning, match="boundary: merge and pre run instead of one kernel: Run"
    ):
        x_next, layer_input = op._kernel(*made.inputs, **made.others)
    assert torch.equal(x_next, made.inputs[0] + 1)
    assert torch.equal(layer_input, x_next.sum(-2))
    assert given == [entry]
    monkeypatch.setattr(op.lookup, "default", lambda asked: entry)
    with pytest.raises(RuntimeError, match="too many resources"):
        op._kernel(*made.inputs, **made.others)


@pytest.mark.parametrize("tensors", [("layer_output", "h_post"), ("h_res", "layer_output")])
def test_n_is_read_from_any_tensor_that_has_it(tensors, monkeypatch):
    monkeypatch.setattr(_definition, "DEFINITIONS", {})
    monkeypatch.setattr(_library, "define", lambda *_, **__: None)
    made = {
        "layer_output": torch.ones(3, 8),
        "h_post": torch.ones(3, 2),
        "h_res": torch.ones(3, 2, 2),
    }
    op = _definition.Op("sample", tensors, ("x",), lambda *_: None, lambda *_: None, kernel="merge")
    assert op._streams(*(made[name] for name in tensors))[1] == 2
