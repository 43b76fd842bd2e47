"""Resuming: what is refused beside it, damaged records, and Ctrl-C when a run is all but done."""

import os
import signal
from pathlib import Path

import pytest
import torch

from mhc_tile.__main__ import main
from mhc_tile.training import TrainConfig, cli, loop, read_metrics, resume, train
from mhc_tile.training.checkpoint import find_checkpoint
from mhc_tile.training.device import pick_device
from mhc_tile.training.schedule import learning_rate
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
        (["--no-tensorboard"], "--no-tensorboard must be left out with --resume, got False"),
    ],
)
def test_resume_refuses_what_it_would_ignore(tmp_path, capsys, options, said):
    assert main(["train", "--resume", str(tmp_path), *options]) == 1
    taken = "; --resume may be given with --corpus and --steps, and keeps the rest"
    assert f"train: {said}{taken}\n" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--num-streams", "4"], ["--model", "1m"]])
def test_resume_refuses_an_option_that_is_its_default(run, capsys, option):
    assert main(["train", "--resume", str(run), *option]) == 1
    assert f"train: {option[0]} must be left out with --resume" in capsys.readouterr().err


def test_a_finished_run_goes_on_to_more_steps(config, run, tmp_path):
    resumed = resume(run, steps=20)
    assert (resumed.status, resumed.step) == ("done", 20)
    steps = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 21))
    rates = [
        learning_rate(step, peak=config.learning_rate, warmup_steps=config.warmup_steps, steps=20)
        for step in range(3, 21)
    ]
    assert [row["learning_rate"] for row in steps[2:]] == rates
    again = resume(run, steps=20)
    assert (again.status, again.step) == ("done", 20)
    for few in (2, 19):
        with pytest.raises(ValueError, match=f"steps must be at least the run's 20, got {few}"):
            resume(run, steps=few)
    with pytest.raises(ValueError, match=r"steps must be an int of at least 1, got 20\.5"):
        resume(run, steps=20.5)


def test_a_run_that_goes_on_is_resumed_exactly(config, tmp_path):
    """Stopped on its way to the new length, which it knows from then on."""
    for name in ("whole", "part"):
        train(config.replace(log_every=1), tmp_path / name)

    def stop(rows, sent=[]):  # noqa: B006 - remembers that it was sent
        if rows[-1]["step"] == 4 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    whole = resume(tmp_path / "whole", steps=10)
    assert resume(tmp_path / "part", steps=10, on_rows=stop).status == "interrupted"
    part = resume(tmp_path / "part")
    assert (part.status, part.step) == ("done", 10)
    assert part.validation_loss == whole.validation_loss
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[key])
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "part")]
    for row in (row for side in rows for row in side):
        row.pop("ms_per_step", None)
    assert rows[0] == rows[1]
    assert [row["config"]["steps"] for row in rows[0] if row["kind"] == "run"] == [2, 10]


def test_a_new_length_survives_a_kill_before_the_first_save(run, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        resume(run, steps=6)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="steps must be at least the run's 6, got 5"):
        resume(run, steps=5)
    resumed = resume(run)
    assert (resumed.status, resumed.step) == ("done", 6)


def test_the_command_goes_on_to_more_steps(run, capsys):
    assert main(["train", "--resume", str(run), "--steps", "6"]) == 0
    assert "train: step 2 of 6" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 1
    assert "resume: steps must be at least the run's 6, got 5" in capsys.readouterr().err


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
    with pytest.raises(ValueError, match=f"resume: checkpoint must .* field `{part}`") as error:
        resume(run)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda config: config.update(dropout=0.1), "unexpected keyword argument 'dropout'"),
        (lambda config: config.update(steps=2.5), "steps must be an int of at least 1, got 2.5"),
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


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state["model"].update({"extra": torch.zeros(3)}),
        lambda state: state["model"].update({name: torch.zeros(7) for name in state["model"]}),
        lambda state: state["model"].clear(),
        lambda state: state.update(model=None),
        lambda state: state.update(optimizer={}),
        lambda state: state["optimizer"]["param_groups"].pop(),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)),
        lambda state: state.update(step="2"),
        lambda state: state.update(step=3),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(run, capsys, edit):
    path = change(run, edit)
    assert main(["train", "--resume", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mhc-tile: resume: checkpoint must be a complete one of ")
    assert str(path) in said
    assert said.count("\n") == 1
    assert len(said) < 700


def test_rows_without_their_values_are_refused_in_one_line(run, capsys):
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "gain", "step": 2}\n')
    assert main(["train", "--resume", str(run)]) == 1
    said = capsys.readouterr().err
    assert (
        "metrics: every row must have the values of its kind, got Object missing required field"
        in said
    )
    assert str(metrics) in said


# what else a user can cause


@pytest.mark.parametrize("name", ["mps", "meta", "xpu", "hpu", "cuda:99", "abacus", "cuda:x"])
def test_a_device_that_is_not_there_is_named(tmp_path, capsys, name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=f"train: device must be .* got '{name}'") as error:
        pick_device(name)
    assert "\n" not in str(error.value)
    out = tmp_path / "run"
    assert main(["train", "--device", name, "--out", str(out), "--sequence-length", "8"]) == 1
    assert capsys.readouterr().err == f"mhc-tile: {error.value}\n"
    assert not out.exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
        MemoryError(),
    ],
)
def test_what_does_not_fit_into_the_memory_is_one_line(run, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "resume", fail)
    assert main(["train", "--resume", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mhc-tile: train: model, batch and validation must fit into the memory")
    assert said.count("\n") == 1


def test_another_fault_keeps_its_traceback(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cli, "resume", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        main(["train", "--resume", str(run)])


@pytest.mark.parametrize("option", ["num-streams", "iters", "batch-size", "eval-batches", "steps"])
def test_a_number_that_torch_cannot_take_is_named(tmp_path, capsys, option):
    large = str(10**20)
    assert main(["train", "--out", str(tmp_path / "run"), f"--{option}", large]) == 1
    said = capsys.readouterr().err
    assert said == f"mhc-tile: train: --{option} must be below 2147483648, got {large}\n"


@pytest.mark.parametrize("threads", ["0", "-1", "2000000000"])
def test_a_number_of_threads_that_cannot_be_is_named(tmp_path, capsys, threads):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--out", str(tmp_path / "demo"), "--threads", threads]) == 1
    said = capsys.readouterr().err
    assert said == f"mhc-tile: demo: --threads must be from 1 to 1024, got {threads}\n"


@pytest.mark.parametrize("settings", ['{"steps": "x"}', '{"corpus": 3}', '{"seed": -1}', "[1]"])
def test_damaged_settings_of_a_demo_are_one_line(tmp_path, capsys, settings):
    pytest.importorskip("matplotlib")
    (tmp_path / "demo.json").write_text(settings)
    threads = str(torch.get_num_threads())
    assert main(["demo", "--resume", str(tmp_path), "--threads", threads]) == 1
    said = capsys.readouterr().err
    assert "demo: resume must be the folder of a demo with its settings" in said
    assert not (tmp_path / ".lock").exists()
