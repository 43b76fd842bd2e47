"""What users import: names that replace nothing of theirs, parameters that do not decay."""

import copy
import types

import torch
from torch import nn

import mhc_tile.training
from mhc_tile import Head, HyperConnectedStack, HyperConnection, ManifoldHyperConnection
from mhc_tile.models import Decoder
from mhc_tile.nn import parameters_without_weight_decay
from mhc_tile.training.optimizer import build_optimizer
from tiny_models import EXPERTS


def test_a_star_import_replaces_no_module():
    theirs: dict = {}
    exec("import torch\nfrom torch import nn\nfrom mhc_tile import *", theirs)
    assert theirs["nn"] is nn
    assert theirs["ManifoldHyperConnection"] is ManifoldHyperConnection
    for package in (mhc_tile, mhc_tile.nn, mhc_tile.ops, mhc_tile.training):
        named = [getattr(package, name) for name in package.__all__]
        assert not any(isinstance(value, types.ModuleType) for value in named)
    for name in ("nn", "ops", "reference"):
        assert isinstance(getattr(mhc_tile, name), types.ModuleType)


def test_parameters_without_weight_decay():
    layers = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)]
    kinds = (ManifoldHyperConnection, HyperConnection)
    stack = HyperConnectedStack(kind(f, 8) for kind, f in zip(kinds, layers, strict=True))
    model = nn.Sequential(stack, Head(8))
    found = parameters_without_weight_decay(model)
    assert all(isinstance(parameter, nn.Parameter) for parameter in found)
    named = {name for name, p in model.named_parameters() if any(p is q for q in found)}
    decayed = set(dict(model.named_parameters())) - named
    assert len(found) == len(named)
    assert {name.split(".")[-1] for name in named} == {"alpha", "bias", "weight"}
    assert {name.removeprefix("0.connections.") for name in decayed} == {
        "0.phi", "1.theta", "0.layer.1.weight", "1.layer.1.weight", "1.phi",
    }  # fmt: skip


def test_the_optimizer_spares_them():
    model = Decoder(EXPERTS)
    model.stack[0].bias.requires_grad_(False)
    decayed, spared = build_optimizer(model, learning_rate=0.1, weight_decay=0.5).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    wanted = parameters_without_weight_decay(model)[: len(spared["params"]) + 1]
    assert [id(p) for p in spared["params"]] == [id(p) for p in wanted if p.requires_grad]
    both = decayed["params"] + spared["params"]
    assert len(both) == sum(p.requires_grad for p in model.parameters())
    assert all(p.dim() >= 2 for p in decayed["params"])


def test_stacks_are_copied_and_saved_whole(tmp_path):
    stack = HyperConnectedStack(ManifoldHyperConnection(nn.Linear(8, 8), 8) for _ in range(2))
    x = torch.randn(3, 4, 8)
    torch.save(stack, tmp_path / "stack.pt")
    for other in (copy.deepcopy(stack), torch.load(tmp_path / "stack.pt", weights_only=False)):
        assert torch.equal(other(x), stack(x))
        assert not {id(m) for m in other.modules()} & {id(m) for m in stack.modules()}
