"""Adapters of other implementations, against stand-ins with those packages' conventions."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mhc_tile import reference
from mhc_tile.perf import peers, sublayer

TOKENS, WIDTH = 6, 16
MAPPING = {"norm_eps": 1e-6}


def installed(monkeypatch, name: str, **members: object) -> None:
    """Let a module of this name be imported, with these members."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(parts[count - 1]))
    vars(sys.modules[name]).update(members)


def inputs():
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    x, grad = normal(TOKENS, 4, WIDTH), normal(TOKENS, 4, WIDTH)
    return x, normal(24, 4 * WIDTH) * 0.1, normal(3), normal(24), grad


def tile_kernels_pre(residual, fn, scale, base, *, post_mult_value, sinkhorn_repeat, **eps):
    """Rows of h_res are [in, out], maps are [batch, tokens, 4, 1] and [batch, tokens, in, out]."""
    assert eps == {"norm_eps": 1e-6, "mhc_mult": 4, "pre_eps": 0.0, "sinkhorn_eps": 1e-6}
    rows = [*range(8), *(8 + 4 * i + o for o in range(4) for i in range(4))]
    phi = fn[rows].view(24, 4, -1)
    layer_input, h_post, h_res = reference.pre(
        residual, phi.flatten(1), scale, base[rows], **MAPPING,
        post_scale=post_mult_value, iters=sinkhorn_repeat,
    )  # fmt: skip
    return layer_input, (h_post[..., None], h_res.transpose(-1, -2))


def tile_kernels_post(layer_output, residual, h_post, h_res):
    return reference.merge(residual, layer_output, h_post[..., 0], h_res.transpose(-1, -2))


def liger_coefficients(x, phi, bias, pre, post, res, fp32, iters, *_):
    """phi is [4C, 24], the gates are three scalars."""
    assert not fp32
    alpha = torch.stack([pre, post, res])
    h_pre, h_post, logits = reference.mapping(x, phi.t(), alpha, bias, **MAPPING)
    return h_pre, h_post, reference.sinkhorn(logits, iters=iters)


PACKAGES = {
    "tile-kernels": (
        "tile_kernels.modeling.mhc.functional",
        {"mhc_pre": tile_kernels_pre, "mhc_post": tile_kernels_post},
    ),
    "liger-kernel": (
        "liger_kernel.ops.mhc",
        {
            "LigerMHCCoeffsFunction": SimpleNamespace(apply=liger_coefficients),
            "LigerMHCPreFunction": SimpleNamespace(apply=reference.pre_apply),
            "LigerMHCPostResFunction": SimpleNamespace(apply=reference.merge),
        },
    ),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_an_adapter_computes_our_sublayer(monkeypatch, name):
    module, members = PACKAGES[name]
    installed(monkeypatch, module, **members)
    contender = peers.ADAPTERS[name]()
    assert sublayer.check(contender, inputs()) < 1e-5
    own = contender.prepare(*inputs())
    assert len(contender.training(*own)) == len(own) - 1


@pytest.mark.parametrize("name", PACKAGES)
def test_one_that_computes_something_else_is_named(monkeypatch, name):
    module, members = PACKAGES[name]
    last, merge = list(members.items())[-1]
    real = getattr(merge, "apply", merge)

    def wrong(*tensors):
        return real(*tensors) * 1.02

    members = {**members, last: SimpleNamespace(apply=wrong) if real is not merge else wrong}
    installed(monkeypatch, module, **members)
    contender = peers.ADAPTERS[name]()
    with pytest.raises(RuntimeError, match=f"{name} must match the reference"):
        sublayer.check(contender, inputs())


def test_what_is_not_installed_is_left_out_by_name(monkeypatch):
    for module, _ in PACKAGES.values():
        monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    found, missing = sublayer.peers()
    assert not found
    assert [line.split()[0] for line in missing] == list(PACKAGES)


def test_the_table_marks_launches_and_faults():
    times = {"us": 50.0, "p20": 49.0, "p80": 51.0}
    ours = {"error": 1e-3, "fault": "", "forward": times, "forward_captured": True}
    peer = {"error": 2e-3, "fault": "training: RuntimeError: no", "forward": times}
    peer["forward_captured"] = False
    size = {"tokens": 8, "width": 16, "forward_floor_us": 25.0, "training_floor_us": 75.0}
    text = "\n".join(sublayer.lines({**size, "contenders": {"mhc_tile": ours, "peer": peer}}))
    assert "50.0 (50%)" in text
    assert "50.0* (50%)" in text
    assert "peer: training: RuntimeError: no" in text


@pytest.fixture
def clock(monkeypatch):
    """Sizes are measured on the CPU, every call takes 7 us."""
    monkeypatch.setattr(sublayer, "inputs", lambda *_: inputs())
    monkeypatch.setattr(sublayer, "capture", lambda function, sets: lambda: 7.0)


def fails(*_):
    raise AssertionError  # as peers do: without a text


def test_a_peer_that_fails_is_noted_and_the_others_are_timed(clock):
    peer = peers.Contender("peer", lambda *values: list(values), fails)
    result = sublayer.measure(TOKENS, WIDTH, 1e12, [sublayer.OURS, peer])
    ours, other = (result["contenders"][name] for name in ("mhc_tile", "peer"))
    assert (ours["forward"]["us"], ours["training"]["us"], ours["fault"]) == (7.0, 7.0, "")
    assert other == {"error": 0.0, "fault": "check: AssertionError: "}


def test_a_failure_of_ours_ends_the_run(clock, monkeypatch):
    monkeypatch.setattr(sublayer, "check", fails)
    with pytest.raises(AssertionError):
        sublayer.measure(TOKENS, WIDTH, 1e12, [sublayer.OURS])
