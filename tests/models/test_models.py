"""The decoder: causal, the same sublayers for every residual, the plain residual as a limit."""

import pytest
import torch

from mhc_tile import MHCConfig
from mhc_tile.models import (
    RESIDUALS,
    Decoder,
    ModelConfig,
    model_config,
)
from mhc_tile.models.layers import Attention, FeedForward
from mhc_tile.models.mla import LatentAttention
from mhc_tile.models.moe import MixtureOfExperts
from mhc_tile.nn import HyperConnection, ManifoldHyperConnection, Residual
from tiny_models import EXPERTS, TINY

SHAPES = [pytest.param(TINY, id="dense"), pytest.param(EXPERTS, id="experts")]


@pytest.fixture
def _double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def decoder(residual: str, connection: MHCConfig | None = None, config: ModelConfig = TINY):
    torch.manual_seed(0)
    return Decoder(config, residual, connection)


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_future_does_not_reach_the_past(residual, config):
    model = decoder(residual, config=config).double()
    before = tokens()
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 256

    def moved() -> torch.Tensor:
        return (model(before) - model(after)).abs().amax(dim=(0, 2))

    for router in (m.router for m in model.modules() if isinstance(m, MixtureOfExperts)):
        # a BLAS rounds a product by how many rows there are: every expert keeps its number of them
        router.expert_bias[: router.experts_per_token] = 2.0
    logits, changed = model(before), model(after)
    assert torch.equal(logits[:, :7], changed[:, :7])
    assert moved()[7:].min() > 1e-6
    for router in (m.router for m in model.modules() if isinstance(m, MixtureOfExperts)):
        router.expert_bias.zero_()
        assert moved()[:7].max() <= 1e-15  # whatever it chooses, up to that rounding
        assert moved()[7:].min() > 1e-6


@pytest.mark.parametrize("residual", RESIDUALS)
def test_positions_matter(residual):
    """With one repeated token every position would answer alike, were it not for the rotation."""
    model = decoder(residual).double()
    sequence = torch.tensor([[5, 6, 5, 6, 5, 6, 7]])
    swapped = torch.tensor([[6, 5, 6, 5, 5, 6, 7]])
    difference = model(sequence)[0, -1] - model(swapped)[0, -1]
    assert difference.abs().max() > 1e-9


@pytest.mark.parametrize("config", SHAPES)
def test_one_seed_gives_every_residual_the_same_sublayers(config):
    plain = dict(decoder("residual", config=config).named_parameters())
    for residual in ("hc", "mhc"):
        own = {"phi", "theta", "alpha", "bias"}
        others = dict(decoder(residual, config=config).named_parameters())
        shared = {name for name in others if name.rpartition(".")[2] not in own}
        assert shared == set(plain)
        assert all(torch.equal(plain[name], others[name]) for name in shared)


@pytest.mark.usefixtures("_double_by_default")  # maps are started in float64 only then
@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_starts_as_the_plain_residual_network(residual, streams, config):
    connection = MHCConfig.paper(init="residual", num_streams=streams)
    plain, other = decoder("residual", config=config), decoder(residual, connection, config)
    expected, actual = plain(tokens()), other(tokens())
    assert expected.norm() > 1
    assert (actual - expected).abs().max() < 1e-12


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("streams", [1, 3])
def test_every_parameter_gets_a_gradient(residual, streams, config):
    model = decoder(residual, MHCConfig.paper(num_streams=streams), config)
    model(tokens()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_each_sublayer_has_its_own_connection():
    for residual, kind in (
        ("residual", Residual),
        ("hc", HyperConnection),
        ("mhc", ManifoldHyperConnection),
    ):
        found = [module for module in decoder(residual).modules() if isinstance(module, kind)]
        assert len(found) == 2 * TINY.num_layers


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_streams_have_the_autocast_dtype(residual, config):
    model = decoder(residual, config=config)
    seen = []
    model.stack.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].shape == ((2, 12, 24) if residual == "residual" else (2, 12, 4, 24))
    exact = model(tokens())
    assert (logits - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_runs_on_meta(residual, config):
    with torch.device("meta"):
        model = Decoder(config, residual)
    logits = model(tokens().to("meta"))
    assert (logits.shape, logits.device.type) == ((2, 12, 256), "meta")


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_decoder_made_on_meta_loads(residual, config):
    model = decoder(residual, config=config)
    with torch.device("meta"):
        loaded = Decoder(config, residual)
    loaded.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    for module in loaded.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    loaded.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(loaded(tokens()), model(tokens()))
    for buffer, other in zip(loaded.buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, other)


def kinds(config: ModelConfig) -> list[type]:
    with torch.device("meta"):
        model = Decoder(config, "residual")
    return [type(connection.layer) for connection in model.stack.connections]


def test_which_layers_have_experts():
    attention, dense, experts = LatentAttention, FeedForward, MixtureOfExperts
    assert kinds(TINY) == [Attention, dense] * 2
    assert kinds(EXPERTS) == [attention, dense, attention, experts]
    slice_of_two = model_config("paper-3b", num_layers=2, moe={"leading_dense_layers": 0})
    assert kinds(slice_of_two) == [attention, experts] * 2
    assert kinds(EXPERTS.replace(moe=None)) == [attention, dense] * 2
    assert kinds(EXPERTS.replace(mla=None)) == [Attention, dense, Attention, experts]


def test_matrices_start_small_and_smaller_where_a_sublayer_ends():
    config = EXPERTS.replace(hidden_size=96, moe={"leading_dense_layers": 0})
    ends = {"project_out", "experts_out", "shared.project_out"}
    for name, parameter in decoder("residual", config=config).named_parameters():
        if parameter.dim() > 1:
            name = name.partition("layer.")[2].removesuffix(".weight") or "embedding"
            std = 0.01 if name in ends else 0.02  # four sublayers
            assert abs(parameter.std() / std - 1) < 0.15, name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_balancing_moves_the_bias_of_every_router():
    model = decoder("mhc", config=EXPERTS.replace(moe={"leading_dense_layers": 0}))
    model(tokens())
    model.balance_experts()
    biases = [m.expert_bias for m in model.modules() if hasattr(m, "expert_bias")]
    assert len(biases) == 2
    assert all(bias.abs().max().item() == pytest.approx(1e-3) for bias in biases)
    decoder("mhc").balance_experts()  # no experts, nothing to do


def test_the_head_is_tied():
    model = decoder("mhc")
    assert sum(parameter.shape == (256, 24) for parameter in model.parameters()) == 1


def test_bad_decoder_input():
    with pytest.raises(ValueError, match=r"Decoder: residual must be one of .* got 'mch'"):
        Decoder(TINY, residual="mch")
    model = decoder("residual")
    with pytest.raises(ValueError, match=r"with S at most 32, got \[2, 33\]"):
        model(tokens(length=33))
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, S\].*got \[12\]"):
        model(tokens()[0])
    with pytest.raises(ValueError, match=r"tokens must be int64 or int32, got torch.float32"):
        model(tokens().float())
