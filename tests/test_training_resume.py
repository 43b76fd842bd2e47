"""Resuming: what is refused beside it, damaged records, and Ctrl-C when a run is all but done."""

import os
import signal
from pathlib import Path

import pytest
import torch

from mhc_tile.__main__ import main
from mhc_tile.training import TrainConfig, cli, resume, train
from mhc_tile.training.checkpoint import find_checkpoint
from tiny_models import TINY


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Also where the tests run in the background, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {index}: {index * index}\n" for index in range(200)))
    small = {"batch_size": 2, "sequence_length": 16, "eval_batches": 2, "device": "cpu"}
    return TrainConfig(model=TINY, corpus=str(text), steps=2, **small)


@pytest.fixture
def run(config, tmp_path) -> Path:
    """A finished run."""
    train(config, tmp_path / "run")
    return tmp_path / "run"


def stop_at(kind: str):
    """A listener that presses Ctrl-C when rows of this kind are written behind the last step."""

    def on_rows(rows):
        if (rows[-1]["kind"], rows[-1]["step"]) == (kind, 2):
            os.kill(os.getpid(), signal.SIGINT)

    return on_rows


def change(run: Path, edit) -> Path:
    """Edit the state in the newest checkpoint."""
    path = find_checkpoint(run)
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["gain", "validation"])
def test_ctrl_c_behind_the_last_step_is_passed_on(config, tmp_path, kind):
    config = config.replace(monitor_every=1)
    result = train(config, tmp_path / "run", on_rows=stop_at(kind))
    assert (result.status, result.step, result.stop_requested) == ("done", 2, True)
    assert not resume(tmp_path / "run").stop_requested


def test_the_command_ends_with_130_then(config, run, monkeypatch, capsys):
    def stopped(out, on_rows):
        return train(config, out.with_name("again"), on_rows=stop_at("validation"))

    monkeypatch.setattr(cli, "resume", stopped)
    assert main(["train", "--resume", str(run)]) == 130
    assert "nats per byte; written to" in capsys.readouterr().out


def test_a_run_beside_its_corpus_resumes(config, tmp_path):
    (tmp_path / "more.txt").write_text("another text " * 50)
    config = config.replace(corpus=tmp_path)
    assert config.corpus == str(tmp_path)
    train(config, tmp_path / "runs" / "first")
    assert resume(tmp_path / "runs" / "first").status == "done"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", "8"], "--batch-size must be left out with --resume, got 8"),
        (["--learning-rate", "5"], "--learning-rate must be left out with --resume, got 5.0"),
        (["--residual", "hc"], "--residual must be left out with --resume, got 'hc'"),
        (["--out", "x"], "--out must be left out with --resume, got 'x'"),
        (["--no-tensorboard"], "--no-tensorboard must be left out with --resume, got True"),
    ],
)
def test_resume_refuses_what_it_would_ignore(tmp_path, capsys, options, said):
    assert main(["train", "--resume", str(tmp_path), *options]) == 1
    assert f"train: {said}" in capsys.readouterr().err


def test_a_finished_run_without_metrics_is_resumed(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert "validation loss - nats per byte" in capsys.readouterr().out


def test_a_lost_line_of_metrics_is_borne(config, tmp_path):
    train(config.replace(monitor_every=1), tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"kind": "step"' not in line))
    assert resume(tmp_path / "run").status == "done"


@pytest.mark.parametrize("part", ["step", "config", "corpus", "model", "optimizer"])
def test_a_checkpoint_without_a_part_is_refused(run, part):
    path = change(run, lambda state: state.pop(part))
    with pytest.raises(ValueError, match=f"resume: checkpoint must .* without '{part}'") as error:
        resume(run)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda config: config.update(dropout=0.1), "unexpected keyword argument 'dropout'"),
        (lambda config: config.update(steps=2.5), "steps must be an integer, got 2.5"),
        (lambda config: config.update(model="1m"), "AttributeError"),
        (lambda config: config.pop("connection"), "KeyError: 'connection'"),
    ],
)
def test_a_configuration_of_another_version_is_refused(run, edit, said):
    path = change(run, lambda state: edit(state["config"]))
    with pytest.raises(ValueError, match=r"resume: checkpoint must .* configuration") as error:
        resume(run)
    assert said in str(error.value)
    assert str(path) in str(error.value)
