"""Warming up and asking for configurations, without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mhc_tile
from mhc_tile import Collapse, Expand, HyperConnectedStack, ManifoldHyperConnection, MHCConfig
from mhc_tile.autotune import lookup
from mhc_tile.autotune.registry import KERNELS
from mhc_tile.ops import _dispatch, _warmup
from mhc_tile.ops._definition import DEFINITIONS


@pytest.mark.parametrize("n", [1, 4])
def test_the_calls_of_a_warmup_are_those_of_a_model(n):
    """They run, here with the reference, and cover what the modules run forward and backward."""
    config = MHCConfig.deepseek_v4(num_streams=n)
    calls = _warmup._calls(config, 24, 5, torch.bfloat16, torch.device("cpu"))
    for call in calls.values():
        assert call() is not None
    assert calls["pre"].keywords["sinkhorn_eps"] == 1e-6
    for op in ("pre", "merge", "expand", "collapse"):
        assert {op, f"{op}_backward"} <= set(calls)


class Launching(TorchDispatchMode):
    """Calls the launchers of every op that runs, so that a dry run has their programs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mhc_tile":
            given = zip(func._schema.arguments, args, strict=False)
            rest = func._schema.arguments[len(args) :]
            left_out = {a.name: a.default_value for a in rest if a.has_default_value()}
            keywords = {**left_out, **(kwargs or {})}
            positional = [value for a, value in given if not a.kwarg_only]
            DEFINITIONS[func._schema.name.split("::")[1]].by_kernel(*positional, **keywords)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [64, 4096])
def test_a_warm_model_compiles_nothing(tokens):
    """On meta tensors: programs that a stack asks for on an H200 are among a warmup's."""
    pytest.importorskip("tilelang")
    from mhc_tile.kernels.common.programs import dry_run

    def programs(run: Callable[[], Any]) -> set[Any]:
        with dry_run("sm_90a", 132) as asked, Launching():
            run()
        return {(factory, constants) for factory, constants, _ in asked.programs}

    config, width, meta = MHCConfig.paper(), 1280, torch.device("meta")
    calls = _warmup._calls(config, width, tokens, torch.bfloat16, meta)
    layers = (torch.nn.Identity() for _ in range(3))
    stack = HyperConnectedStack(ManifoldHyperConnection(each, width, config) for each in layers)
    model = torch.nn.Sequential(Expand(config.num_streams), stack, Collapse()).to(meta)
    hidden = torch.empty(tokens, width, dtype=torch.bfloat16, device=meta, requires_grad=True)
    needed = programs(lambda: model(hidden).sum().backward())
    assert needed
    assert needed <= programs(lambda: [call() for call in calls.values()])


def test_on_a_cpu_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr(_warmup, "_calls", None)
    mhc_tile.warmup(MHCConfig.paper(), 64, tokens=[8, 16], device="cpu")


@pytest.mark.parametrize("function", [mhc_tile.warmup, mhc_tile.kernels_info])
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"hidden_size": 0}, "hidden_size must be an int of at least 1, got 0"),
        ({"tokens": []}, r"tokens must be a number or some numbers, got \[\]"),
        ({"tokens": [8, 0]}, "tokens must be an int of at least 1, got 0"),
        ({"dtype": torch.float64}, "dtype must be one of .*got torch.float64"),
    ],
)
def test_sizes_that_no_kernel_takes_are_errors(function, wrong, why):
    arguments = {"hidden_size": 64, "tokens": 8, **wrong}
    with pytest.raises(ValueError, match=f"{function.__name__}: {why}"):
        function(MHCConfig.paper(), **arguments)


def test_without_a_gpu_there_are_no_configurations(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="kernels_info: torch must see a CUDA device, got none"):
        mhc_tile.kernels_info(MHCConfig.paper(), 64, tokens=8)


def test_every_kernel_is_asked_for_at_every_number_of_tokens(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lookup, "explain", asked.append)
    monkeypatch.setattr(_dispatch, "_unfit", lambda *_: None)
    mhc_tile.kernels_info(MHCConfig.paper(), 64, tokens=(8, 16), device=1)
    assert [key[0] for key in asked] == [*KERNELS, *KERNELS]
    assert asked[0] == ("merge", 4, 64, torch.bfloat16, 8, 1, False)
    sinkhorn = next(key for key in asked if key[0] == "sinkhorn")
    assert sinkhorn == ("sinkhorn", 4, 0, torch.float32, 8, 1, False)


def test_where_no_kernel_runs_the_reference_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_dispatch, "_unfit", lambda device, n: f"kernels take no n of {n}")
    found = mhc_tile.kernels_info(MHCConfig.paper(num_streams=3), 64, tokens=8, device=0)
    assert len(found) == len(KERNELS)
    assert str(found[0]) == (
        "merge 8 x 64, n 3, bfloat16: no kernel (reference: kernels take no n of 3)"
    )
