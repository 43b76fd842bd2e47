"""Slices of models: who joins their layers, with which weights, and what a step is."""

import dataclasses

import pytest
import torch

from mhc_tile import reference
from mhc_tile.perf import connections, overhead, slices
from mhc_tile.perf.peers import ADAPTERS, version
from mhc_tile.perf.records import OURS
from mhc_tile.perf.slices import NAMES, ON_REQUEST, TF32, Slice, Step, Sublayers

REAL = reference.merge
PIECE = Slice("1m", layers=1, batch=1, sequence=16, device="cpu")
KINDS = [name for name in NAMES if not name.endswith(TF32) and name not in ADAPTERS]


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(slices, "compiled", lambda module, mode=None: module)


def test_names_and_words():
    assert Slice("paper-27b").key == "paper-27b/step/B2xS4096/L4"
    assert " of 4 layers of paper-27b without embedding" in Slice("paper-27b").denominator
    trained = Slice("1m", layers=2, optimizer=True)
    assert trained.key == "1m/step+adamw/B2xS4096/L2"
    assert trained.denominator.startswith("forward, backward and AdamW of 2 layers of 1m")


def test_tf32_is_for_those_who_say_so_and_only_meanwhile():
    sublayers, seen = Sublayers(PIECE), []
    assert not any(name.endswith(TF32) for name in sublayers.contenders())
    sublayers.piece = dataclasses.replace(PIECE, device="cuda")
    known = [*NAMES[: -len(ADAPTERS)], *ON_REQUEST]
    assert [n for n in sublayers.contenders() if n not in ADAPTERS] == known
    sublayers.piece = PIECE
    sublayers.truth  # noqa: B018 - it is kept, and not looked at below

    def look(*_):
        seen.append(torch.get_float32_matmul_precision())

    for layer in sublayers.layers:
        layer.register_forward_pre_hook(look)
        layer.register_full_backward_pre_hook(look)
    before = torch.get_float32_matmul_precision()
    for name in ("reference (compiled, tf32)", "reference (layers compiled)"):
        model, (x, grad) = slices.ReferenceConnection(sublayers.ours[0]), sublayers.inputs(name)
        sublayers.error(name, model, x)
        Step(model, x, grad, [], tf32=name.endswith(TF32))()
        assert torch.get_float32_matmul_precision() == before
    assert seen == ["high"] * 4 + [before] * 4


def test_a_slice_of_a_mixture_has_experts_in_every_layer():
    config = Slice("paper-27b", layers=3).config
    assert (config.num_layers, config.moe.leading_dense_layers) == (3, 0)
    assert Slice("1m").config.moe is None
    assert Sublayers(Slice("2m-moe", layers=1, batch=1, sequence=8, device="cpu")).streams == 4


def test_all_ways_share_their_weights():
    sublayers = Sublayers(PIECE)
    own = {id(p) for layer in sublayers.layers for p in layer.parameters()}
    ours = {id(p) for c in sublayers.ours for p in (c.phi, c.alpha, c.bias)}
    eager = [name for name in ON_REQUEST if name.endswith("(eager)")]
    known = [n for n in NAMES if n in KINDS or version(n)]
    assert list(sublayers.contenders()) == [*known, *eager]
    for name, build in sublayers.contenders().items():
        found = {id(parameter) for parameter in build().parameters()}
        assert own <= found, name
        assert (ours <= found) == name.startswith((OURS, "reference")), name
    assert all(p.dtype == torch.bfloat16 for layer in sublayers.layers for p in layer.parameters())
    assert all(c.phi.dtype == torch.float32 for c in sublayers.ours)


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_step_leaves_the_weights_as_they_are(optimizer):
    sublayers = Sublayers(PIECE)
    model = sublayers.contenders()[OURS]()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    piece = Slice("1m", optimizer=optimizer)
    optimizers = overhead._optimizer(piece, model.parameters())
    assert len(optimizers) == optimizer
    step = Step(model, *sublayers.inputs(OURS), optimizers)
    step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    step()
    again = [parameter.grad for parameter in model.parameters()]
    assert all(one.equal(other) for one, other in zip(grads, again, strict=True))
    after = list(model.parameters())
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))
    step.free()
    assert all(leaf.grad is None for leaf in (step.x, *model.parameters()))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("merge", lambda x, output, h_post, h_res: REAL(x, output, h_post, h_res.mT)),
        ("merge", lambda x, output, h_post, h_res: REAL(x, output, h_post, 0 * h_res + 0.25)),
        ("merge", lambda x, output, h_post, h_res: REAL(x, output, 0 * h_post + 1, h_res)),
        ("merge", lambda x, output, h_post, h_res: REAL(x, 0 * output, h_post, h_res)),
        ("merge", lambda x, *maps: REAL(x.detach(), *maps)),  # half a backward
    ],
)
@pytest.mark.parametrize("model", ["1m", "2m-moe"])
def test_the_check_bites(monkeypatch, name, wrong, model):
    sublayers = Sublayers(Slice(model, layers=2, batch=1, sequence=16, device="cpu"))
    right = sublayers.contenders()["reference (layers compiled)"]()
    x, _ = sublayers.inputs(OURS)
    assert sublayers.error("reference", right, x) < 0.02
    monkeypatch.setattr(connections.reference, name, wrong)
    assert sublayers.error("reference", right, x) > overhead.TOLERANCE
