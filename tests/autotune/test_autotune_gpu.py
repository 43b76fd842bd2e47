"""Tuning and warming up on a GPU."""

import pytest
import torch

pytest.importorskip("tilelang")

import tilelang

import gpu_bench
import mhc_tile
from cases import Shape, call
from mhc_tile import __main__
from mhc_tile.autotune import journal, lookup, registry, table
from mhc_tile.autotune.bench import CudaBench, copy_bandwidth, difference
from mhc_tile.autotune.device import describe
from mhc_tile.autotune.measuring import Candidate, Measurer
from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.registry import KERNELS, Target
from mhc_tile.kernels.common.toolchain import target
from mhc_tile.kernels.merge import ForwardConfig

pytestmark = pytest.mark.gpu
PROBLEM = Problem("merge", 4, 1280, "bfloat16", 4096)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Journals and tables of this test alone."""
    monkeypatch.setattr(journal, "folder", lambda: tmp_path / "journal")
    monkeypatch.setattr(table, "user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(table.VARIABLE, raising=False)
    lookup.forget()
    yield tmp_path
    lookup.forget()


def test_two_candidates_from_the_command_to_the_op(places, monkeypatch, capsys):
    real = registry.candidates
    monkeypatch.setattr(registry, "candidates", lambda *asked: real(*asked)[:2])
    arguments = ("--hidden", "1280", "--kernel", "merge", "--tokens", "4096", "--jobs", "2")
    assert __main__.main(["autotune", *arguments]) == 0
    said = capsys.readouterr().out
    assert "rejected" not in said
    path = table.user_path(describe())
    (family,) = table.read(path, describe()).families.values()
    entry = family.entries[4096]
    assert 0 < entry.us <= 1.02 * entry.default_us

    inputs = call("merge", Shape("tuned", (4096,), width=1280), torch.bfloat16, "cuda").inputs
    asked = ("merge", 4, 1280, torch.bfloat16, 4096, 0, False)
    decision = lookup.explain(asked)
    assert (decision.why, decision.source) == ("exact", str(path))
    tuned = mhc_tile.merge(*inputs)
    monkeypatch.setenv(table.VARIABLE, table.OFF)
    lookup.forget()
    assert lookup.config(asked) == lookup.default(asked)
    assert torch.equal(tuned, mhc_tile.merge(*inputs))


def test_planted_mistakes_are_rejected_and_the_run_goes_on(tmp_path):
    own = registry.default(PROBLEM, here())
    planted = (gpu_bench.WRONG, gpu_bench.HANGS, gpu_bench.BREAKS)
    configs = [own, *(ForwardConfig(threads) for threads in planted), ForwardConfig(128)]
    candidates = tuple(Candidate(config, ()) for config in configs)
    with Measurer(seconds=20.0, bench="gpu_bench:PlantedBench", log=tmp_path / "log") as measurer:
        outcomes = measurer.measure(PROBLEM, candidates, {}, lambda *_: None)
    assert outcomes[1].why == "wrong: result 0 must have the default's bits, got others"
    assert outcomes[2].why == "hung: no answer for 20 s"
    assert outcomes[3].why.startswith("crashed: ")
    assert outcomes[0].status == "measured"
    assert outcomes[4].status in ("measured", "slow")


def here() -> Target:
    device = describe()
    return Target(target(device.capability)["arch"], device.multiprocessors)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_can_be_measured(kernel):
    """Every default repeats its bits, and another candidate is right, too."""
    sized = KERNELS[kernel].of_channels
    problem = Problem(kernel, 4, 1280 if sized else 0, "bfloat16" if sized else "float32", 64)
    options = registry.candidates(problem, here())
    order = KERNELS[kernel].order
    other = next((c for c in options[1:] if order(c) == order(options[0])), options[0])
    bench = CudaBench(problem)
    first, *others = bench.results(options[0])
    for results in others:
        assert difference(results, first, same_bits=len(first)) is None
    same = len(first) - KERNELS[kernel].parameter_grads
    for results in bench.results(other):
        assert difference(results, first, same_bits=same) is None
    assert 0.5 < bench.timer(other)() < 1000


def test_the_copy_is_as_fast_as_a_gpu():
    assert 1e11 < copy_bandwidth() < 2e13


def test_after_a_warmup_nothing_is_compiled(monkeypatch):
    config = mhc_tile.MHCConfig.paper(iters=3)
    mhc_tile.warmup(config, 64, tokens=96, progress=False)

    def refuse(*_, **__):
        raise AssertionError("a kernel is compiled")

    monkeypatch.setattr(tilelang, "compile", refuse)
    layers = [torch.nn.Linear(64, 64) for _ in range(3)]
    model = torch.nn.Sequential(
        mhc_tile.Expand(4),
        mhc_tile.HyperConnectedStack(
            mhc_tile.ManifoldHyperConnection(layer, 64, config) for layer in layers
        ),
        mhc_tile.Collapse(),
    )
    model = model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        hidden = model(torch.randn(96, 64, device="cuda").bfloat16())
    hidden.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_each_kernel_would_run_with(places):
    with pytest.warns(RuntimeWarning, match="no tuned configurations"):
        decisions = mhc_tile.kernels_info(mhc_tile.MHCConfig.paper(), 1280, tokens=(1, 4096))
    assert [d.problem.kernel for d in decisions] == [*KERNELS, *KERNELS]
    assert {d.why for d in decisions} == {"default"}
