"""Numbers of other classes become Python's; what is out of range is named."""

import enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mhc_tile
from mhc_tile import Head, HyperConnection, ManifoldHyperConnection, MHCConfig
from mhc_tile.models import model_config
from mhc_tile.training import TrainConfig, resume, train

HUGE = 10**400


class Steps(enum.IntEnum):
    TWO = 2


class Precision(str, enum.Enum):
    FP32 = "fp32"


def test_small_integers_of_numpy_do_not_overflow():
    assert ManifoldHyperConnection(nn.Identity(), np.uint8(200)).phi.shape == (24, 800)
    assert Head(np.uint8(200)).phi.shape == (4, 800)
    assert HyperConnection(nn.Identity(), np.uint8(200)).theta.shape == (6, 200)


def test_a_checkpoint_of_other_classes_of_numbers_is_resumed(tmp_path: Path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(9):
        (folder / f"{index}.txt").write_text("some words " * 60)
    model = model_config("1m", context_length=np.int64(32), rope_theta=np.float64(1e4))
    config = TrainConfig(
        model=model, corpus=folder, steps=Steps.TWO, batch_size=np.int64(2), sequence_length=32,
        learning_rate=np.float64(1e-3), weight_decay=np.float32(0.1), residual=np.str_("mhc"),
        device=np.str_("cpu"), precision=Precision.FP32, eval_batches=1, warmup_steps=0,
        connection=MHCConfig.paper(norm_eps=np.float64(1e-6), iters=Steps.TWO),
    )  # fmt: skip
    kinds = {type(value) for value in config.to_dict().values()}
    assert kinds <= {int, float, str, bool, dict}
    train(config, tmp_path / "run")
    assert resume(tmp_path / "run", steps=3).step == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: MHCConfig(norm_eps=HUGE),
        lambda: MHCConfig(num_streams=HUGE),
        lambda: model_config("1m", rope_theta=HUGE),
        lambda: TrainConfig(learning_rate=HUGE),
        lambda: TrainConfig(clip=True),
        lambda: mhc_tile.sinkhorn(torch.zeros(2, 2), eps=HUGE),
        lambda: mhc_tile.sinkhorn(torch.zeros(2, 2), iters=HUGE),
        lambda: mhc_tile.expand(torch.zeros(2), -HUGE),
        lambda: ManifoldHyperConnection(nn.Identity(), HUGE),
    ],
)
def test_what_no_number_can_be_is_named(call):
    with pytest.raises(ValueError, match=r"\w+: \w+ must "):
        call()


def test_switches_of_functions_are_bools():
    with pytest.raises(TypeError, match=r"set_batch_invariant: enabled must be True or False"):
        mhc_tile.set_batch_invariant("false")
    parameters = torch.zeros(24, 32), torch.zeros(3), torch.zeros(24)
    with pytest.raises(TypeError, match=r"pre: return_x must be True or False, got 'no'"):
        mhc_tile.pre(torch.zeros(2, 4, 8), *parameters, norm_eps=1e-6, return_x="no")
