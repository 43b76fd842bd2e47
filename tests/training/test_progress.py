"""What only shows progress ends no run, costs no checkpoint and changes no exit code."""

import asyncio
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhc_tile.__main__ import main
from mhc_tile.training import TrainConfig, demo, loop, progress, read_metrics, resume, train
from mhc_tile.training.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from mhc_tile.training.demo import DemoSettings, run_legs, start_demo
from mhc_tile.training.progress import Progress, say, settle
from tiny_models import TINY

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {index}: {index * index}\n" for index in range(400)))
    return str(path)


@pytest.fixture
def config(text) -> TrainConfig:
    small = {"batch_size": 2, "sequence_length": 16, "eval_batches": 2, "device": "cpu"}
    return TrainConfig(model=TINY, corpus=text, steps=4, log_every=1, checkpoint_every=0, **small)


def command(text: str, out: Path, *more: str) -> list[str]:
    options = "--no-tensorboard --steps 2 --batch-size 2 --sequence-length 16 --checkpoint-every 0"
    return ["train", *options.split(), "--device", "cpu", "--corpus", text, "--out", out, *more]


def saved_step(run_dir: Path) -> int:
    return load_checkpoint(find_checkpoint(run_dir))["step"]


# streams


class Broken(io.StringIO):
    """A stream that fails at every write, and with a terminal, on request."""

    def __init__(self, error: Exception, terminal: bool = False):
        super().__init__()
        self.error, self.terminal = error, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, _text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("closed")])
def test_streams_that_take_nothing_cost_nothing(text, tmp_path, monkeypatch, error, terminal):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error, terminal))
    assert main(command(text, str(tmp_path / "run"))) == 0
    assert main(["train", "--resume", str(tmp_path / "none")]) == 1
    monkeypatch.undo()
    assert saved_step(tmp_path / "run") == 2


def test_streams_that_are_closed_from_the_start_cost_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(command(text, str(tmp_path / "run"))) == 0
    assert saved_step(tmp_path / "run") == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("streams", [">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_the_exit_code_says_that_it_trained(text, tmp_path, streams):
    """Also after the interpreter's last flush, which alone would make it 120."""
    words = [sys.executable, "-m", "mhc_tile", *command(text, "run")]
    process = subprocess.run(
        ["sh", "-c", f'"$@" {streams}', "sh", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0
    assert saved_step(tmp_path / "run") == 2


def test_a_stream_that_took_nothing_is_flushed_into_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        with pytest.raises(BrokenPipeError):
            print("line", file=stream, flush=True)
        settle(stream)
        stream.flush()
    settle(stream)  # closed


def test_characters_that_stdout_lacks_are_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    say("gr\u00f6\u00dfe \udce4")
    assert stream.buffer.getvalue() == b"gr\\xf6\\xdfe \\udce4\n"


# listeners


ENDING = (KeyboardInterrupt, GeneratorExit, asyncio.CancelledError)


def failing(_rows):
    raise RuntimeError("no network")


def raising(kind):
    def on_rows(_rows):
        raise kind

    return on_rows


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


def test_a_listener_whose_error_has_no_words_ends_nothing(config, tmp_path):
    with pytest.warns(
        RuntimeWarning, match=r"got .*Mute: <exception str\(\) failed>; the run goes on"
    ):
        assert train(config, tmp_path / "run", on_rows=raising(Mute)).status == "done"


def test_a_listener_that_raises_ends_nothing(config, tmp_path):
    with pytest.warns(RuntimeWarning, match=r"on_rows must not raise, got RuntimeError: no netw"):
        result = train(config, tmp_path / "run", on_rows=failing)
    assert (result.status, saved_step(tmp_path / "run")) == ("done", 4)
    with pytest.warns(RuntimeWarning, match="on_rows must not raise"):
        assert resume(tmp_path / "run", on_rows=failing).status == "done"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ends", [failing, lambda rows: sys.exit(3), *map(raising, ENDING)])
def test_a_listener_that_does_end_the_run_costs_no_step(config, tmp_path, ends):
    def on_rows(rows):
        if rows[-1]["step"] == 2:
            ends(rows)

    with pytest.raises((RuntimeWarning, SystemExit, *ENDING)):
        train(config, tmp_path / "run", on_rows=on_rows)
    assert saved_step(tmp_path / "run") == 2
    assert resume(tmp_path / "run").status == "done"


def test_the_listener_hears_of_a_step_when_it_is_saved(config, tmp_path):
    steps = []

    def on_rows(_rows):
        steps.append([path.stem for path in list_checkpoints(tmp_path / "run")][-1:])

    train(config.replace(steps=1), tmp_path / "run", on_rows=on_rows)
    assert steps == [[], ["step_00000001"], ["step_00000001"]]  # the run, the step, the validation


@pytest.mark.parametrize("fails", ["_write", "_evaluate"])
def test_records_that_fail_do_not_cost_the_steps(config, tmp_path, monkeypatch, fails):
    def fail(self, *_):
        if self.step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop._Run, fails, fail)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path / "run")
    assert saved_step(tmp_path / "run") == 4
    monkeypatch.undo()
    assert resume(tmp_path / "run").status == "done"


def test_a_run_directory_that_is_gone_does_not_cost_the_steps(config, tmp_path):
    def remove(rows):
        if rows[-1]["step"] == 2:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        train(config, tmp_path / "run", on_rows=remove)
    assert saved_step(tmp_path / "run") == 3
    assert resume(tmp_path / "run").status == "done"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "step"] == [3, 4]


@pytest.mark.parametrize("fails", ["add_scalar", "close"])
def test_tensorboard_may_fail(config, tmp_path, monkeypatch, fails):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    monkeypatch.setattr(writer, fails, unwritable)
    with pytest.warns(RuntimeWarning, match="TensorBoard's events end here"):
        result = train(config.replace(tensorboard=True), tmp_path / "run")
    assert (result.status, saved_step(tmp_path / "run")) == ("done", 4)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 6


@pytest.mark.parametrize("fails", ["full", "file", "bytes"])
def test_tensorboard_may_not_even_open(config, tmp_path, monkeypatch, fails):
    module = pytest.importorskip("torch.utils.tensorboard")
    run = tmp_path / ("run\udce4" if fails == "bytes" else "run")
    train(config, run)
    if fails == "file":
        (run / "tensorboard").touch()
    elif fails == "full":
        monkeypatch.setattr(module, "SummaryWriter", unwritable)
    change = find_checkpoint(run)
    state = load_checkpoint(change)
    state["config"]["tensorboard"] = True
    torch.save(state, change)
    with pytest.warns(RuntimeWarning, match="TensorBoard's events end here") as warned:
        assert resume(run, steps=8).step == 8
    assert len(warned) == 1
    assert saved_step(run) == 8


@pytest.mark.parametrize("package", ["numpy", "tensorboard"])
def test_the_package_that_tensorboard_misses_is_named(config, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=f"TensorBoard metrics: the package '{package}' must"):
        train(config.replace(tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def unwritable(*_, **__):
    raise OSError(28, "No space left on device")


def test_figures_may_fail(text, tmp_path, monkeypatch):
    pytest.importorskip("tabulate")
    legs = DemoSettings.legs
    small = {"model": TINY, "batch_size": 2, "sequence_length": 16, "eval_batches": 2}
    monkeypatch.setattr(
        DemoSettings,
        "legs",
        lambda settings: {name: leg.replace(**small) for name, leg in legs(settings).items()},
    )

    def fail(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(demo, "draw_all", fail)
    start_demo(tmp_path / "demo", DemoSettings(steps=6, stress_steps=3, corpus=text))
    with pytest.warns(RuntimeWarning, match="the report has no figures"):
        result = run_legs(tmp_path / "demo", lambda name, config: lambda rows: None)
    assert "| residual" in result.report.read_text()


# what is shown


def step(number: int, **values) -> dict:
    return {"kind": "step", "step": number, "loss": 1.5, **values}


def test_without_a_terminal_a_line_comes_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress("mhc", 1000)
    for number in range(1, 101):
        now[0] += 1.0
        shown([step(number)])
    said = capsys.readouterr().out.splitlines()
    assert said == [f"mhc: step {number} of 1000, loss 1.500" for number in (1, 31, 61, 91)]


def test_the_last_line_has_the_last_values(capsys):
    shown = Progress("mhc", 2)
    shown([step(2), {"kind": "gain", "step": 2, "composite_forward": None}])
    shown([{"kind": "validation", "step": 2, "loss": 1.25}])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "mhc: loss 1.500, composite gain not finite, validation 1.250"


def test_a_bar_on_a_terminal_counts_steps(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("train", None)
    shown([{"kind": "run", "step": 0, "config": {"steps": 4}}, step(1), step(2)])
    shown([{"kind": "warning", "step": 2, "message": "watch out"}])
    assert "2/4" in terminal.getvalue()
    assert capsys.readouterr().out == "train: watch out\n"
    shown([step(4), {"kind": "validation", "step": 4, "loss": 1.0}])
    assert "4/4" in terminal.getvalue()


def test_what_was_read_and_left_out_is_said(tmp_path, capsys):
    folder = tmp_path / "text"
    (folder / "run").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text("some words " * 100)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    for name in (".hidden", "empty.txt", "run/metrics.jsonl"):
        (folder / name).touch()
    assert main(command(str(folder), str(tmp_path / "run"))) == 0
    said = capsys.readouterr().out
    assert f"mhc: 3 files read from {folder}, 4 left out (hidden, empty, not UTF-8" in said
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert f"train: 3 files read from {folder}, 4 left out" in capsys.readouterr().out


def test_a_run_needs_no_numpy(config, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", missing)
    monkeypatch.setattr(torch, "from_numpy", missing)
    assert train(config, tmp_path / "run").status == "done"
    assert resume(tmp_path / "run").status == "done"
