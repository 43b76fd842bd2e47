"""When a run says that the GPU waits for the host: with made-up readings."""

import pytest
import torch

from mhc_tile.training import TrainConfig, cli, loop, train
from mhc_tile.training.waiting import ENOUGH, WARM_UP, GpuWaits
from tiny_models import TINY


def after(readings: list[bool]) -> GpuWaits:
    waits = GpuWaits(torch.device("cpu"))
    for idle in readings:
        waits.count(idle)
    return waits


@pytest.mark.parametrize(
    ("readings", "share"),
    [
        ([True] * (WARM_UP + ENOUGH), "100%"),
        ([False] * WARM_UP + [True] * ENOUGH, "100%"),
        ([False] * WARM_UP + [True] * 30 + [False] * 10, "75%"),
    ],
)
def test_a_gpu_that_waits_is_said_with_what_helps(readings, share):
    said = f"the GPU waited for the host in {share} of the steps: "
    for mode in ("off", "default"):
        assert after(readings).advice(mode) == said + "--compile graphs or a larger batch helps"
    assert after(readings).advice("graphs") == said + "a larger batch helps"


@pytest.mark.parametrize(
    "readings",
    [
        [],
        [True] * (WARM_UP + ENOUGH - 1),  # too few to say
        [True] * WARM_UP + [False] * 100,  # only while it warms up
        [False] * WARM_UP + [True] * 20 + [False] * 20,
    ],
)
def test_a_gpu_that_works_is_not(readings):
    assert after(readings).advice("off") is None


def test_another_device_counts_nothing():
    waits = GpuWaits(torch.device("cpu"))
    for _ in range(100):
        waits.mark()
        waits.read()
    assert waits.advice("off") is None


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {index}: {index * index}\n" for index in range(200)))
    small = {"batch_size": 2, "sequence_length": 16, "eval_batches": 2, "device": "cpu"}
    return TrainConfig(model=TINY, corpus=str(text), steps=WARM_UP + ENOUGH, **small)


class Event:
    """A mark that the GPU has reached, or not."""

    def __init__(self, reached: bool):
        self.reached, self.recorded = reached, 0

    def record(self, _stream) -> None:
        self.recorded += 1

    def query(self) -> bool:
        return self.reached


@pytest.mark.parametrize("reached", [True, False])
def test_the_closing_summary_says_it(config, tmp_path, monkeypatch, capsys, reached):
    event = Event(reached)

    def waits(device):
        made = GpuWaits(device)
        made._event = event
        return made

    monkeypatch.setattr(loop, "GpuWaits", waits)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    result = train(config, tmp_path / "run")
    assert event.recorded == config.steps
    assert (result.advice is not None) == reached
    assert cli._finish_train(result) == 0
    assert ("the GPU waited for the host in 100%" in capsys.readouterr().out) == reached


@pytest.mark.gpu
def test_a_mark_is_reached_on_the_gpu():
    waits = GpuWaits(torch.device("cuda"))
    torch.cuda._sleep(2_000_000_000)
    waits.mark()
    waits.read()
    assert waits.idle == 0
    waits.measured = 0
    torch.cuda._sleep(2_000_000_000)
    waits.mark()
    waits.read()
    assert (waits.idle, waits.measured) == (0, 1)
    torch.cuda.synchronize()
    waits.read()
    assert (waits.idle, waits.measured) == (1, 2)
