"""Which configuration an op gets from tables, without a GPU."""

import dataclasses
import inspect
import time
import warnings

import pytest
import torch

from mhc_tile.autotune import lookup, registry, table
from mhc_tile.autotune.configs import decode, encode
from mhc_tile.autotune.lookup import Tables, decide
from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.registry import KERNELS
from mhc_tile.kernels.common.programs import dry_run
from mhc_tile.kernels.common.quantities import Samples, quantity
from mhc_tile.ops import _definition, _dispatch
from mhc_tile.ops._definition import DEFINITIONS
from tables import DEVICE, TARGET, ask, entry, key, problem, tables_of

pytest.importorskip("tilelang")

COUNTS = (1, 16, 100, 311, 312, 1023, 1024, 3000, 8192, 65536)


def merge_config(threads: int = 96, vectors: int = 2):
    return KERNELS["merge"].load().ForwardConfig(threads, vectors)


def test_exact_then_nearest_then_default():
    tables = tables_of(merge={64: entry(merge_config(96)), 4096: entry(merge_config(160))})
    for tokens, why, config in (
        (64, "exact", merge_config(96)),
        (127, "exact", merge_config(96)),
        (1, "nearest", merge_config(96)),
        (256, "nearest", merge_config(96)),
        (512, "nearest", merge_config(160)),  # as far from both: the larger
        (4097, "exact", merge_config(160)),
        (65536, "nearest", merge_config(160)),
    ):
        decision = ask(tables, "merge", tokens)
        assert (decision.why, decision.config) == (why, config), tokens
        assert decision.source == "merge.json"
    for asked in (("pre_apply", 64), ("merge", 64, 5248), ("merge", 64, 1264)):
        assert ask(tables, *asked).why == "default"
        assert ask(tables, *asked).config == registry.default(problem(*asked), TARGET)
    assert ask(Tables(DEVICE), "merge", 64).detail.startswith("no table has")


def test_an_entry_that_is_not_offered_any_more_is_adapted_and_says_so():
    tables = tables_of(merge={4096: entry(merge_config(1024, 1))})
    decision = ask(tables, "merge", 4096)
    assert decision.config != merge_config(1024, 1)
    assert decision.why == "nearest"
    assert decision.detail == "4096 x 2560, adapted to what the kernel offers"


def test_a_neighbouring_width_gets_the_candidate_of_its_own_that_is_most_alike():
    tables = tables_of(merge={4096: entry(merge_config(160, 2))})
    decision = ask(tables, "merge", 4096, 2816)
    assert decision.why == "nearest"
    assert decision.detail == "4096 x 2560"
    assert decision.config == merge_config(
        192, 2
    )  # 176 threads in whole warps, as 160 were at 2560
    assert decision.config in registry.candidates(problem("merge", 4096, 2816), TARGET)


def test_of_two_widths_the_nearer_in_log_space_counts():
    near = table.Key("merge", 4, 3072, "bfloat16", "many")
    far = table.Key("merge", 4, 2048, "bfloat16", "many")
    tables = tables_of(
        near=(near, {64: entry(merge_config(192))}), far=(far, {64: entry(merge_config(128))})
    )
    assert ask(tables, "merge", 64, 2560).source == "near.json"
    assert ask(tables, "merge", 64, 2304).source == "far.json"


def test_an_entry_that_keeps_the_default_keeps_that_of_the_shape_asked_for():
    own = registry.default(problem("mapping_backward", 4096), TARGET)
    tables = tables_of(mapping_backward={4096: entry(own, default=True)})
    for tokens in (16, 64, 8192):
        decision = ask(tables, "mapping_backward", tokens)
        assert decision.config == registry.default(problem("mapping_backward", tokens), TARGET)
        assert decision.why == "nearest"


def orders(tables: Tables, kernel: str, width: int = 2560, **asked) -> dict[int, object]:
    found = {}
    for tokens in COUNTS:
        decision = ask(tables, kernel, tokens, width, **asked)
        config = decision.config or registry.default(
            problem(kernel, tokens, width),
            TARGET,
            batch_invariant=asked.get("batch_invariant", False),
        )
        found[tokens] = KERNELS[kernel].order(config)
    return found


def other_order(kernel: str, tokens: int):
    """A candidate that forms sums in another order than the default."""
    options = registry.candidates(problem(kernel, tokens), TARGET)
    own = KERNELS[kernel].order(options[0])
    return next(
        c for c in options if KERNELS[kernel].order(c) != own and type(c) is type(options[0])
    )


@pytest.mark.parametrize("kernel", ["merge_backward", "pre_apply_backward", "mapping", "pre"])
@pytest.mark.parametrize("width", [2560, 2816])
def test_a_table_keeps_one_order_of_sums_in_each_regime_of_the_default(kernel, width):
    """Where the table has another order than the default, it has it for all T of a regime."""
    tables = tables_of(
        many=(key(kernel), {t: entry(other_order(kernel, t)) for t in (4096, 65536)}),
        few=(key(kernel, regime="few"), {16: entry(other_order(kernel, 16))}),
    )
    found = orders(tables, kernel, width)
    for regime in ("few", "many"):
        members = [
            tokens
            for tokens in COUNTS
            if registry.regime(problem(kernel, tokens, width), TARGET) == regime
        ]
        assert len({found[tokens] for tokens in members}) <= 1, regime
    assert not tables.faults
    if width == 2560:
        wanted = KERNELS[kernel].order(other_order(kernel, 4096))
        assert found[8192] == wanted


@pytest.mark.parametrize("kernel", ["merge_backward", "pre_apply_backward", "mapping", "pre"])
@pytest.mark.parametrize("tuned", [False, True])
def test_batch_invariance_is_one_order_for_every_number_of_tokens(kernel, tuned):
    members = {
        "many": (key(kernel), {4096: entry(other_order(kernel, 4096))}),
        "few": (key(kernel, regime="few"), {16: entry(other_order(kernel, 16))}),
    }
    tables = tables_of(**members) if tuned else Tables(DEVICE)
    found = orders(tables, kernel, batch_invariant=True)
    assert len(set(found.values())) == 1
    if tuned:
        assert found[1] == KERNELS[kernel].order(other_order(kernel, 4096))


def test_a_family_whose_entries_add_in_several_orders_is_not_used():
    kernel = "merge_backward"
    configs = [registry.default(problem(kernel), TARGET), other_order(kernel, 8192)]
    tables = tables_of(
        merge_backward={1024: entry(configs[0]), 4096: entry(configs[1])},
    )
    assert ask(tables, kernel, 4096).why == "default"
    assert "must form sums in one order" in tables.faults[0]
    assert ask(tables, kernel, 1024).why == "default"
    assert len(tables.faults) == 1


BROKEN = {
    "gone": {"type": "merge.GoneConfig", "threads": 32},
    "no module": {"type": "nothing.Config", "threads": 32},
    "no class": {"type": "merge.dtype_name"},
    "a path": {"type": "os.path.Config"},
    "no type": {"threads": 32},
    "another field": {"type": "merge.ForwardConfig", "threads": 32, "vectors": 1, "depth": 2},
    "a field less": {"type": "merge.ForwardConfig", "threads": 32},
    "a text": {"type": "merge.ForwardConfig", "threads": "32", "vectors": 1},
    "refused": {"type": "merge.ForwardConfig", "threads": 33, "vectors": 1},
}


@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
def test_a_configuration_that_no_longer_decodes_is_not_used_with_a_note(values):
    with pytest.raises(ValueError, match=r"decode: |merge: config"):
        decode(values)
    tables = tables_of(merge={64: table.Entry(values, False, 9.0, 10.0)})
    decision = ask(tables, "merge", 64)
    assert decision.why == "default"
    assert decision.config == registry.default(decision.problem, TARGET)
    (fault,) = tables.faults
    assert fault.startswith("merge.json: merge x 2560")


def test_a_configuration_of_an_older_table_has_a_knob_that_is_gone():
    config = KERNELS["pre"].load().persistent.Config(members=5, teams=26)
    assert decode({**encode(config), "batches": 1}) == config
    with pytest.raises(ValueError, match=r"decode: pre\.persistent\.Config must have integers"):
        decode({**encode(config), "batches": 2})


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_survives_a_table(kernel):
    width = 2560 if KERNELS[kernel].of_channels else 0
    dtype = "bfloat16" if width else "float32"
    options = registry.candidates(Problem(kernel, 4, width, dtype, 1024), TARGET)
    for config in options:
        assert decode(encode(config)) == config
        assert registry.programs(Problem(kernel, 4, width, dtype, 1024), config, TARGET)
    assert options[0] == registry.default(Problem(kernel, 4, width, dtype, 1024), TARGET)
    assert len(set(options)) == len(options) > 1


def test_marked_knobs_alone_are_the_order():
    config = registry.default(problem("pre"), TARGET)
    order = KERNELS["pre"].order(config)
    for field in dataclasses.fields(config):
        step = 8 if field.name in ("group", "registers") else 1
        changed = dataclasses.replace(config, **{field.name: getattr(config, field.name) + step})
        same = KERNELS["pre"].order(changed) == order
        marked = field.name in ("members", "steps", "group")
        assert same == (not marked), field.name


def test_float32_and_ragged_widths_of_pre_have_nothing_to_tune():
    for odd in (Problem("pre", 4, 2560, "float32", 64), Problem("mapping", 4, 127, "bfloat16", 64)):
        assert decide(Tables(DEVICE), odd, arch="sm_90a").why == "default"
        assert len(registry.candidates(odd, TARGET)) == 1


# What ops call


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU that is not there, with a table for merge."""
    monkeypatch.setattr(lookup, "describe", lambda index: DEVICE)
    monkeypatch.setattr(lookup, "load", lambda _device: tables)
    tables = tables_of(merge={64: entry(merge_config(96)), 4096: entry(merge_config(160))})
    lookup.forget()
    yield tables
    lookup.forget()


ASKED = ("merge", 4, 2560, torch.bfloat16, 64, 0, False)


def test_a_call_is_decided_once(fake_gpu, monkeypatch):
    assert lookup.config(ASKED) == merge_config(96)
    monkeypatch.setattr(lookup, "explain", None)
    assert lookup.config(ASKED) == merge_config(96)


def test_a_remembered_decision_takes_less_than_two_microseconds(fake_gpu):
    lookup.config(ASKED)
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            lookup.config(("merge", 4, 2560, torch.bfloat16, 64, 0, False))
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 2e-6


def test_memory_of_decisions_is_bounded(fake_gpu, monkeypatch):
    monkeypatch.setattr(lookup, "MOST_REMEMBERED", 10)
    for tokens in range(1, 100):
        lookup.config(("merge", 4, 2560, torch.bfloat16, tokens, 0, False))
    assert len(lookup._known) <= 10


def test_a_gpu_without_a_table_warns_once_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(lookup, "describe", lambda index: DEVICE)
    monkeypatch.setattr(lookup, "load", Tables)
    lookup.forget()
    with pytest.warns(RuntimeWarning, match="NVIDIA Test 1.*`mhc-tile autotune --preset") as seen:
        assert lookup.config(ASKED) == lookup.default(ASKED)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kernel in KERNELS:
            asked = (kernel, 4, 1280, torch.bfloat16, 64, 0, False)
            assert lookup.config(asked) == lookup.default(asked)
    lookup.forget()
    monkeypatch.setenv(table.VARIABLE, "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup.config(ASKED) == lookup.default(ASKED)
    lookup.forget()


class OnGPU:
    """Enough of a CUDA tensor for the dispatcher."""

    is_cuda = True
    dtype = torch.bfloat16
    device = torch.device("cuda", 0)


def test_an_op_launches_with_the_tables_configuration(fake_gpu):
    launched = []
    _dispatch.tuned("merge", OnGPU(), (64, 4, 2560), launched.append)
    _dispatch.tuned("merge", OnGPU(), (0, 4, 2560), launched.append)
    with dry_run("sm_90a", 132):
        _dispatch.tuned("merge", torch.empty(1).bfloat16(), (64, 4, 2560), launched.append)
    own = registry.default(problem("merge", 0), TARGET)
    assert launched == [merge_config(96), own, own]


def test_a_configuration_that_does_not_launch_gives_way_to_the_default(fake_gpu):
    def launch(config):
        launched.append(config)
        if config == merge_config(96):
            raise RuntimeError("too much shared memory")
        return "results"

    launched: list[object] = []
    with pytest.warns(RuntimeWarning, match="must launch, got too much shared memory"):
        assert _dispatch.tuned("merge", OnGPU(), (64, 4, 2560), launch) == "results"
    own = lookup.default(ASKED)
    assert launched == [merge_config(96), own]
    for tokens in (64, 4096):  # the family as a whole: one order of sums
        assert _dispatch.tuned("merge", OnGPU(), (tokens, 4, 2560), launch) == "results"
    assert launched[2:] == [own, own]
    assert lookup.explain(ASKED).why == "default"


def test_what_fails_with_the_default_too_is_the_callers_error(fake_gpu):
    def launch(config):
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        _dispatch.tuned("merge", OnGPU(), (64, 4, 2560), launch)
    assert lookup.config(ASKED) == merge_config(96)


def test_an_op_out_of_memory_blames_no_configuration(fake_gpu):
    def launch(config):
        launched.append(config)
        raise torch.OutOfMemoryError

    launched: list[object] = []
    with pytest.raises(torch.OutOfMemoryError):
        _dispatch.tuned("merge", OnGPU(), (64, 4, 2560), launch)
    assert launched == [merge_config(96)]


@pytest.mark.parametrize(
    "op", [op for op in DEFINITIONS.values() if isinstance(op.kernel, str)], ids=lambda op: op.name
)
def test_every_op_asks_for_its_kernel_s_configuration(op, monkeypatch):
    """With the op's sizes; the tuner times a call of the same tensors."""
    asked = []

    def tuned(kernel, x, sizes, launch):
        asked.append((kernel, *sizes, x.dtype))
        raise InterruptedError

    monkeypatch.setattr(_definition, "tuned", tuned)
    make = Samples(15, 2, 64, torch.bfloat16, "meta")

    def with_two_leading_dims(name):
        value = make.get(name)
        return value.unflatten(0, (3, 5)) if quantity(name).per_token else value

    others = {**KERNELS[op.kernel].constants, "norm_eps": 1e-6, "num_streams": 2, "mode": "sum"}
    given, keywords = op.call_of(with_two_leading_dims, others)
    with pytest.raises(InterruptedError):
        op.by_kernel(*given, **keywords)
    of_channels = KERNELS[op.kernel].of_channels
    dtype = torch.bfloat16 if of_channels else torch.float32
    assert asked == [(op.kernel, 15, 2, 64 if of_channels else 0, dtype)]
    own = [quantity(name) for name in (*op.tensors, *op.optional)]
    assert own == [quantity(name) for name in KERNELS[op.kernel].tensors]


# One protocol


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_module_answers_alike(name):
    """`default_config`, `candidates` and `traffic` take a problem and a target, no more."""
    kernel, module = KERNELS[name], KERNELS[name].load()
    signatures = {
        "default_config": ["problem", "target", "batch_invariant"],
        "candidates": ["problem", "target"],
        "traffic": ["problem"],
    }
    for function, parameters in signatures.items():
        assert list(inspect.signature(getattr(module, function)).parameters) == parameters
    asked = problem(name, width=2560 if kernel.of_channels else 0)
    own = module.default_config(asked, TARGET, batch_invariant=True)
    assert type(own) in {type(offered) for offered in module.candidates(asked, TARGET)}
    assert module.traffic(asked) == 2 * module.traffic(asked.at(4096)) - module.traffic(asked.at(0))
