"""Counts and constants: other libraries' numbers pass, bools and words are refused by name."""

import dataclasses
import json
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from mhc_tile import (
    Expand,
    Head,
    HyperConnection,
    ManifoldHyperConnection,
    MHCConfig,
    ops,
    warmup,
)
from mhc_tile.models import Decoder, MLAConfig, ModelConfig, MoEConfig
from mhc_tile.training import GainMonitor, TrainConfig
from mhc_tile.training.demo import DemoSettings
from tiny_models import EXPERTS

WIDTH = 8
COUNTS = {
    "ManifoldHyperConnection: hidden_size": lambda v: ManifoldHyperConnection(nn.Identity(), v),
    "HyperConnection: hidden_size": lambda v: HyperConnection(nn.Identity(), v),
    "HyperConnection: layer_index": lambda v: HyperConnection(nn.Identity(), WIDTH, layer_index=v),
    "Head: hidden_size": lambda v: Head(v),
    "Expand: num_streams": lambda v: Expand(v),
    "expand: num_streams": lambda v: ops.expand(torch.zeros(2, WIDTH), v),
    "warmup: hidden_size": lambda v: warmup(MHCConfig(), v, tokens=8, device="cpu"),
    "warmup: tokens": lambda v: warmup(MHCConfig(), 8, tokens=v, device="cpu"),
    "warmup: threads": lambda v: warmup(MHCConfig(), 8, tokens=8, threads=v, device="cpu"),
    "sinkhorn: iters": lambda v: ops.sinkhorn(torch.zeros(4, 4), iters=v),
    "GainMonitor: max_tokens": lambda v: GainMonitor(nn.Linear(2, 2), v),
}
NO_COUNTS = [True, np.bool_(True), torch.tensor(True), 4.0, np.float64(4), "4", None, [4]]
NO_COUNTS += [np.array([4, 4]), torch.tensor([4, 4]), torch.tensor(4.0)]
NO_NUMBERS = [True, np.bool_(True), torch.tensor(True), "1e-6", None, [1.0], 1j]
NO_NUMBERS += [np.array([1.0, 1.0]), torch.tensor([1.0, 1.0])]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor])
def test_integers_of_other_libraries_count(name, kind):
    made = COUNTS[name](kind(4))
    if isinstance(made, nn.Module):
        assert type(getattr(made, name.split()[1])) is int
        assert name.split()[1] == "layer_index" or f"{name.split()[1]}=4" in repr(made)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_nothing_else_counts(name, value):
    if name == "warmup: tokens" and value is not None and np.ndim(value):
        pytest.skip("tokens may be several numbers")
    least = 0 if "index" in name else 1
    message = f"{name} must be an int of at least {least}, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        COUNTS[name](value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_ops_refuse_what_is_no_number(value):
    with pytest.raises(
        ValueError, match=re.escape(f"sinkhorn: eps must be a number, got {value!r}")
    ):
        ops.sinkhorn(torch.zeros(4, 4), eps=value)


CONFIGS = {
    "MHCConfig": MHCConfig(),
    "ModelConfig": EXPERTS,
    "MoEConfig": EXPERTS.moe,
    "MLAConfig": MLAConfig(query_rank=8),
    "TrainConfig": TrainConfig(),
    "DemoSettings": DemoSettings(),
}
MAY_BE_0 = {"shared_experts", "leading_dense_layers", "seed", "warmup_steps", "monitor_every"}
MAY_BE_0 |= {"eval_every", "checkpoint_every"}


def fields(*kinds):
    return [
        pytest.param(config, field.name, id=f"{name}.{field.name}")
        for name, config in CONFIGS.items()
        for field in dataclasses.fields(config)
        if field.type in kinds
    ]


@pytest.mark.parametrize(("config", "name"), fields(int, int | None))
@pytest.mark.parametrize("value", [v for v in NO_COUNTS if v is not None], ids=repr)
def test_a_count_of_a_configuration_is_named(config, name, value):
    least = 0 if name in MAY_BE_0 else 1
    message = f"{type(config).__name__}: {name} must be an int of at least {least}, got {value!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(("config", "name"), fields(float))
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_a_constant_of_a_configuration_is_named(config, name, value):
    message = f"{type(config).__name__}: {name} must be a number, got {value!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        dataclasses.replace(config, **{name: value})


def test_configurations_hold_numbers_of_python():
    config = MHCConfig(
        num_streams=np.int64(2), norm_eps=np.float32(0.25), pre_eps=torch.tensor(0.5),
        post_scale=Decimal("1.5"), iters=torch.tensor(7), sinkhorn_eps=Fraction(1, 8),
    )  # fmt: skip
    assert config == MHCConfig(2, 0.25, 0.5, 1.5, 7, 0.125)
    assert MHCConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    model = ModelConfig(*np.arange(8, 15), rope_theta=np.float32(2), moe=EXPERTS.moe)
    model = dataclasses.replace(
        model, moe=MoEConfig(*np.array([4, 16, 2])), mla=MLAConfig(np.int8(4))
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(model)))) == model
    assert repr(MHCConfig(norm_eps=0)) == repr(MHCConfig()).replace("1e-20", "0")  # as it was given


def test_a_decoder_names_what_is_no_configuration():
    with pytest.raises(TypeError, match="Decoder: config must be a ModelConfig, got dict"):
        Decoder({})
    for residual in ("residual", "mhc"):
        with pytest.raises(TypeError, match="Decoder: connection must be an MHCConfig, got ModelC"):
            Decoder(EXPERTS, residual, EXPERTS)
