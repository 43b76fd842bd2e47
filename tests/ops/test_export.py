"""torch.export with dynamic batch and sequence: a program takes sizes it was not traced with."""

import pytest
import torch
from torch import nn

from mhc_tile import (
    Collapse,
    Expand,
    Head,
    HyperConnectedStack,
    HyperConnection,
    ManifoldHyperConnection,
    Residual,
)
from mhc_tile.models import Decoder, ModelConfig
from mhc_tile.models.layers import Attention, FeedForward
from mhc_tile.models.mla import LatentAttention
from mhc_tile.models.moe import MixtureOfExperts
from tiny_models import EXPERTS, TINY

WIDTH = TINY.hidden_size
BATCH, SEQUENCE = torch.export.Dim("batch", max=64), torch.export.Dim("sequence", max=32)
OTHERS = [(3, 7), (1, 32), (5, 1)]


def connected(kind: type) -> nn.Module:
    layers = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
    stack = HyperConnectedStack(kind(layer, WIDTH) for layer in layers)
    return nn.Sequential(Expand(4), stack, Collapse())


MODULES = {
    "attention": lambda: Attention(TINY),
    "latent attention": lambda: LatentAttention(EXPERTS),
    "latent queries": lambda: LatentAttention(EXPERTS.replace(mla={"query_rank": 8})),
    "feed-forward": lambda: FeedForward(TINY),
    "experts": lambda: MixtureOfExperts(EXPERTS),
    "residual": lambda: Residual(nn.Linear(WIDTH, WIDTH)),
    "hc": lambda: connected(HyperConnection),
    "mhc": lambda: connected(ManifoldHyperConnection),
    "head": lambda: nn.Sequential(Expand(4), Head(WIDTH)),
}


def check(module: nn.Module, inputs) -> None:
    """Export for (2, 16), then run others; inputs makes what the module reads of a size."""
    program = torch.export.export(
        module, (inputs(2, 16),), dynamic_shapes=({0: BATCH, 1: SEQUENCE},)
    ).module()
    for size in OTHERS:
        given = inputs(*size)
        truth = module(given)
        assert truth.norm() > 0
        assert (program(given) - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("name", MODULES)
def test_modules_take_other_sizes(name):
    torch.manual_seed(0)
    check(MODULES[name](), lambda *size: torch.randn(*size, WIDTH))


@pytest.mark.parametrize(
    ("config", "residual"),
    [
        pytest.param(TINY, "mhc", id="dense mhc"),
        pytest.param(EXPERTS, "mhc", id="experts mhc"),
        pytest.param(EXPERTS.replace(mla=None), "hc", id="experts hc"),
        pytest.param(EXPERTS, "residual", id="experts residual"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_decoders_take_other_sizes(config: ModelConfig, residual: str, training: bool):
    torch.manual_seed(0)
    model = Decoder(config.replace(num_layers=1, **one_mixture(config)), residual).train(training)
    check(model, lambda *size: torch.randint(256, size))


def one_mixture(config: ModelConfig) -> dict:
    return {"moe": {"leading_dense_layers": 0}} if config.moe else {}


def test_experts_compile_once_for_every_number_of_tokens():
    torch._dynamo.reset()
    module = MixtureOfExperts(EXPERTS)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for size in ((2, 16), (3, 7), (5, 12)):  # a size of 1 compiles again, whatever the module
        hidden = torch.randn(*size, WIDTH)
        with torch.compiler.set_stance("default" if size == (2, 16) else "fail_on_recompile"):
            found = compiled(hidden)
        assert (found - module(hidden)).norm() <= 1e-5 * found.norm()
