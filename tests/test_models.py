"""The decoder: causal, the same sublayers for every residual, the plain residual as a limit."""

import pytest
import torch

from mhc_tile import MHCConfig
from mhc_tile.models import CONFIGS, RESIDUALS, Decoder, ModelConfig, count_parameters, model_config
from mhc_tile.nn import HyperConnection, ManifoldHyperConnection, Residual

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    head_size=8,
    ffn_size=40,
    context_length=32,
)


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


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_future_does_not_reach_the_past(residual):
    model = decoder(residual).double()
    before = tokens()
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 256
    logits, changed = model(before), model(after)
    assert torch.equal(logits[:, :7], changed[:, :7])
    assert (logits[:, 7:] - changed[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("residual", RESIDUALS)
def test_positions_matter(residual):
    """With one repeated token every position would answer alike, were it not for the rotation."""
    model = decoder(residual).double()
    sequence = torch.tensor([[5, 6, 5, 6, 5, 6, 7]])
    swapped = torch.tensor([[6, 5, 6, 5, 5, 6, 7]])
    difference = model(sequence)[0, -1] - model(swapped)[0, -1]
    assert difference.abs().max() > 1e-9


def test_one_seed_gives_every_residual_the_same_sublayers():
    plain = dict(decoder("residual").named_parameters())
    for residual in ("hc", "mhc"):
        own = {"phi", "theta", "alpha", "bias"}
        others = dict(decoder(residual).named_parameters())
        shared = {name for name in others if name.rpartition(".")[2] not in own}
        assert shared == set(plain)
        assert all(torch.equal(plain[name], others[name]) for name in shared)


@pytest.mark.usefixtures("_double_by_default")  # maps are started in float64 only then
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_starts_as_the_plain_residual_network(residual, streams):
    connection = MHCConfig.paper(init="residual", num_streams=streams)
    plain, other = decoder("residual"), decoder(residual, connection)
    expected, actual = plain(tokens()), other(tokens())
    assert expected.norm() > 1
    assert (actual - expected).abs().max() < 1e-12


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("streams", [1, 3])
def test_every_parameter_gets_a_gradient(residual, streams):
    model = decoder(residual, MHCConfig.paper(num_streams=streams))
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


@pytest.mark.parametrize("residual", RESIDUALS)
def test_streams_have_the_autocast_dtype(residual):
    model = decoder(residual)
    seen = []
    model.stack.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].shape == ((2, 12, 24) if residual == "residual" else (2, 12, 4, 24))
    exact = model(tokens())
    assert (logits - exact).norm() < 0.05 * exact.norm()


def test_the_head_is_tied():
    model = decoder("mhc")
    assert sum(parameter.shape == (256, 24) for parameter in model.parameters()) == 1


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("1m", 0.8e6, 1.2e6),
        ("10m", 9e6, 11e6),
        ("100m", 95e6, 105e6),
        ("paper-3b-dense", 0.59e9, 0.64e9),  # active parameters of the paper's 3B: 612M
        ("paper-9b-dense", 1.6e9, 1.8e9),  # 1.66B
        ("paper-27b-dense", 4.0e9, 4.5e9),  # 4.14B
    ],
)
def test_named_sizes(name, low, high):
    for residual in RESIDUALS:
        assert low < count_parameters(model_config(name), residual) < high


def test_counting_agrees_with_an_allocated_model():
    for residual in RESIDUALS:
        allocated = sum(parameter.numel() for parameter in decoder(residual).parameters())
        assert count_parameters(TINY, residual) == allocated


def test_paper_shapes():
    config = CONFIGS["paper-27b-dense"]
    shape = (config.hidden_size, config.num_layers, config.num_heads, config.head_size)
    assert shape == (2560, 30, 32, 128)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"got '27b-dense'; did you mean 'paper-27b-dense'\?"):
        model_config("27b-dense")
    with pytest.raises(ValueError, match=r"model_config: name must be one of \['1m'"):
        model_config("?")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "ModelConfig: hidden_size must be at least 1, got 0"),
        ({"head_size": 7}, "ModelConfig: head_size must be even, got 7"),
        ({"rope_theta": 0.0}, "ModelConfig: rope_theta must be finite and above 0, got 0.0"),
        ({"norm_eps": -1.0}, "ModelConfig: norm_eps must be finite and at least 0, got -1.0"),
    ],
)
def test_bad_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


def test_a_count_must_be_an_int():
    with pytest.raises(TypeError, match=r"ModelConfig: num_layers must be an int, got 2.0"):
        TINY.replace(num_layers=2.0)


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
