"""Signals that end a run: a checkpoint, the exit code of the signal, handlers as before."""

import os
import signal
import threading

import pytest

from mhc_tile.__main__ import main
from mhc_tile.training import TrainConfig, cli, demo, resume, train
from mhc_tile.training.checkpoint import find_checkpoint, load_checkpoint
from mhc_tile.training.demo import DemoSettings
from mhc_tile.training.signals import StopRequest
from tiny_models import TINY

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals")
ENDING = ["SIGINT", "SIGTERM", "SIGHUP"]


class Unhandled(Exception):
    """What the handlers of these tests raise."""


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that do not end the tests, also where these run in the background."""

    def raise_(number, _frame):
        raise Unhandled(number)

    numbers = [getattr(signal, name) for name in ENDING]
    before = {number: signal.signal(number, raise_) for number in numbers}
    yield raise_
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {index}: {index * index}\n" for index in range(200)))
    small = {"batch_size": 2, "sequence_length": 16, "eval_batches": 2, "device": "cpu"}
    return TrainConfig(
        model=TINY,
        corpus=text,
        steps=8,
        log_every=1,
        checkpoint_every=0,
        tensorboard=False,
        **small,
    )


def send(*names: str, at: int = 2):
    """A listener that sends signals when it hears of a step, once."""
    left = [getattr(signal, name) for name in names]

    def on_rows(rows):
        while left and rows[-1]["step"] == at:
            os.kill(os.getpid(), left.pop(0))

    return on_rows


@pytest.mark.parametrize("name", ENDING)
def test_a_signal_leaves_a_checkpoint_and_the_handlers(config, tmp_path, name, handlers):
    result = train(config, tmp_path / "run", on_rows=send(name))
    assert (result.status, result.step, result.stop_requested) == ("interrupted", 3, True)
    assert result.stop_signal == getattr(signal, name)
    assert load_checkpoint(find_checkpoint(tmp_path / "run"))["step"] == 3
    assert all(signal.getsignal(getattr(signal, name)) is handlers for name in ENDING)
    assert resume(tmp_path / "run").stop_signal is None


@pytest.mark.parametrize("names", [["SIGTERM", "SIGTERM"], ["SIGHUP", "SIGHUP", "SIGTERM"]])
def test_a_sender_that_insists_costs_no_checkpoint(config, tmp_path, names):
    """As a terminal that closes: its shell and the kernel both send."""
    result = train(config, tmp_path / "run", on_rows=send(*names))
    assert (result.status, result.stop_signal) == ("interrupted", getattr(signal, names[0]))


def test_a_second_ctrl_c_ends_it_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(Unhandled):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so(config, tmp_path):
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert train(config, tmp_path / "run", on_rows=send("SIGHUP")).status == "done"


def test_another_thread_handles_no_signals():
    found = []

    def use():
        with StopRequest() as stop:
            found.append(stop.number)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_exit_code_of_train_is_that_of_the_signal(
    config, tmp_path, monkeypatch, capsys, name, code
):
    monkeypatch.setattr(cli, "Progress", lambda *_: send(name))
    options = "--batch-size 2 --sequence-length 16 --log-every 1 --no-tensorboard --device cpu"
    words = [*options.split(), "--corpus", config.corpus, "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == code
    assert f"continue with: mhc-tile train --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert load_checkpoint(find_checkpoint(tmp_path / "run"))["step"] == 3


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_exit_code_of_demo_is_that_of_the_signal(
    config, tmp_path, monkeypatch, capsys, name, code
):
    pytest.importorskip("matplotlib")
    legs = {leg: config.replace(residual=leg, steps=4) for leg in ("residual", "hc")}
    monkeypatch.setattr(DemoSettings, "legs", lambda settings: legs)
    monkeypatch.setattr(cli, "Progress", lambda leg, *_, **__: send(name, at=4))
    monkeypatch.setattr(demo, "draw_all", lambda *_: pytest.fail("it goes on"))
    assert main(["demo", "--out", str(tmp_path / "demo"), "--threads", "1"]) == code
    assert "continue with: mhc-tile demo --resume" in capsys.readouterr().out
    assert load_checkpoint(find_checkpoint(tmp_path / "demo" / "residual"))["step"] == 4
    assert not (tmp_path / "demo" / "hc").exists()


def test_a_signal_before_the_first_step_ends_the_command(config, tmp_path, monkeypatch, capsys):
    def load(_path):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mhc_tile.training.loop.load_corpus", load)
    assert main(["train", "--out", str(tmp_path / "run")]) == 143
    assert "there is nothing to resume" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
