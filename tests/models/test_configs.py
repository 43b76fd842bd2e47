"""Configurations: named sizes against the paper's, parts, JSON, refusals."""

import dataclasses
import json

import pytest

from mhc_tile.models import (
    CONFIGS,
    RESIDUALS,
    Decoder,
    ModelConfig,
    MoEConfig,
    count_active_parameters,
    count_parameters,
    model_config,
)
from tiny_models import EXPERTS, TINY


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("1m", 0.8e6, 1.2e6),
        ("10m", 9e6, 11e6),
        ("100m", 95e6, 105e6),
        ("300m", 295e6, 305e6),
        ("2m-moe", 1.7e6, 2.0e6),
        ("paper-3b-dense", 0.59e9, 0.64e9),  # active parameters of the paper's 3B: 612M
        ("paper-9b-dense", 1.6e9, 1.8e9),  # 1.66B
        ("paper-27b-dense", 4.0e9, 4.5e9),  # 4.14B
    ],
)
def test_named_sizes(name, low, high):
    for residual in RESIDUALS:
        assert low < count_parameters(model_config(name), residual) < high


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("paper-3b", 2.97e9, 612e6),
        ("paper-9b", 9.18e9, 1.66e9),
        ("paper-27b", 27.0e9, 4.14e9),
    ],
)
def test_sizes_of_the_paper(name, total, active):
    """Its totals count a head of its own, its active parameters one of head and embedding."""
    config = CONFIGS[name]
    head = config.vocab_size * config.hidden_size
    assert count_parameters(config) + head == pytest.approx(total, rel=0.002)
    assert count_active_parameters(config) == pytest.approx(active, rel=0.001)


def test_active_parameters_leave_idle_experts_out():
    named = Decoder(EXPERTS).named_parameters()
    experts = sum(p.numel() for name, p in named if "experts_" in name)
    assert count_active_parameters(EXPERTS) == count_parameters(EXPERTS) - experts // 2
    for config in (TINY, EXPERTS.replace(num_layers=1)):
        assert count_active_parameters(config) == count_parameters(config)


def test_counting_agrees_with_an_allocated_model():
    for residual in RESIDUALS:
        allocated = sum(p.numel() for p in Decoder(TINY, residual).parameters())
        assert count_parameters(TINY, residual) == allocated


def test_paper_shapes():
    config = CONFIGS["paper-27b-dense"]
    shape = (config.hidden_size, config.num_layers, config.num_heads, config.head_size)
    assert shape == (2560, 30, 32, 128)


def test_the_paper_s_mixtures():
    config = CONFIGS["paper-27b"]
    assert config.norm_eps == 1e-20
    assert (config.mla.kv_rank, config.mla.rope_size, config.mla.query_rank) == (512, 64, None)
    assert config.moe == MoEConfig(72, 1536, experts_per_token=6, shared_experts=2)
    assert config.moe.leading_dense_layers == 1
    assert config.ffn_size == 8 * config.moe.expert_ffn_size


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json(name):
    values = json.loads(json.dumps(dataclasses.asdict(CONFIGS[name])))
    assert ModelConfig.from_dict(values) == CONFIGS[name]


def test_parts_are_changed_by_field():
    config = model_config("2m-moe", moe={"num_experts": 16}, mla={"query_rank": 32})
    assert (config.moe.num_experts, config.moe.experts_per_token) == (16, 2)
    assert (config.mla.query_rank, config.mla.kv_rank) == (32, 64)
    with pytest.raises(ValueError, match="ModelConfig: moe must be set to change fields of it"):
        model_config("1m", moe={"num_experts": 16})


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"got '27b-dense'; did you mean 'paper-27b-dense'\?"):
        model_config("27b-dense")
    with pytest.raises(ValueError, match=r"model_config: name must be one of \['1m'"):
        model_config("?")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "ModelConfig: hidden_size must be an int of at least 1, got 0"),
        ({"head_size": 7}, "ModelConfig: head_size must be even, got 7"),
        ({"rope_theta": 0.0}, "ModelConfig: rope_theta must be finite and above 0, got 0.0"),
        ({"norm_eps": -1.0}, "ModelConfig: norm_eps must be finite and at least 0, got -1.0"),
    ],
)
def test_bad_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("moe", {"num_experts": 0}, "num_experts must be an int of at least 1, got 0"),
        ("moe", {"num_experts": 1024}, "MoEConfig: num_experts must be at most 1023, got 1024"),
        ("moe", {"experts_per_token": 0}, "experts_per_token must be an int of at least 1, got 0"),
        ("moe", {"experts_per_token": 5}, "experts_per_token must be at most 4, got 5"),
        (
            "moe",
            {"shared_experts": -1},
            "shared_experts must be an int of at least 0, got -1",
        ),
        (
            "moe",
            {"expert_ffn_size": 0},
            "expert_ffn_size must be an int of at least 1, got 0",
        ),
        (
            "moe",
            {"leading_dense_layers": -1},
            "leading_dense_layers must be an int of at least 0, got -1",
        ),
        ("moe", {"balance_rate": float("inf")}, "balance_rate must be finite and at least 0, got"),
        ("mla", {"kv_rank": 0}, "MLAConfig: kv_rank must be an int of at least 1, got 0"),
        ("mla", {"rope_size": 3}, "MLAConfig: rope_size must be even, got 3"),
        ("mla", {"query_rank": 0}, "query_rank must be an int of at least 1, got 0"),
    ],
)
def test_bad_parts(part, changes, message):
    with pytest.raises(ValueError, match=message):
        EXPERTS.replace(**{part: changes})


def test_parts_have_their_types():
    with pytest.raises(TypeError, match=r"num_experts must be an int of at least 1, got 4.0"):
        EXPERTS.replace(moe={"num_experts": 4.0})
    with pytest.raises(TypeError, match=r"query_rank must be an int of at least 1, got True"):
        EXPERTS.replace(mla={"query_rank": True})
    with pytest.raises(TypeError, match=r"ModelConfig: mla must be of MLAConfig or None, got 7"):
        EXPERTS.replace(mla=7)


def test_a_count_must_be_an_int():
    with pytest.raises(TypeError, match=r"num_layers must be an int of at least 1, got 2.0"):
        TINY.replace(num_layers=2.0)
