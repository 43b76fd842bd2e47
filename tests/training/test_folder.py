"""Paths as users type them, and a folder that one run owns: from elsewhere, twice at once."""

import os
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from mhc_tile.__main__ import main
from mhc_tile.training import TrainConfig, cli, demo, folder, load_corpus, loop, resume, train
from mhc_tile.training.checkpoint import Checkpoints, list_checkpoints
from mhc_tile.training.demo import DemoSettings, run_legs, start_demo, stored_settings
from mhc_tile.training.folder import FolderInUseError, full_path, owned
from tiny_models import TINY


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home directory, with a corpus, and the working directory beside it."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    lines = (f"line {index}: {index * index}\n" for index in range(200))
    (tmp_path / "home" / "text.txt").write_text("".join(lines))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def config(home) -> TrainConfig:
    small = {"batch_size": 2, "sequence_length": 16, "eval_batches": 2, "device": "cpu"}
    return TrainConfig(model=TINY, corpus="~/text.txt", steps=2, **small)


def command(*more: str) -> list[str]:
    options = "--no-tensorboard --steps 2 --batch-size 2 --sequence-length 16 --device cpu"
    return ["train", *options.split(), *more]


# paths


def test_a_path_means_the_same_from_any_working_directory(home):
    here = Path.cwd()
    assert full_path("x", "a") == here / "x"
    assert full_path("~/x", "a") == home / "x"
    assert full_path("../x", "a") == here.parent / "x"
    assert full_path("~no_such_user/x", "a") == here / "~no_such_user" / "x"


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_path_is_not_the_working_directory(config, empty):
    for call, name in (
        (lambda: load_corpus(empty), "corpus: path"),
        (lambda: config.replace(corpus=empty), "TrainConfig: corpus"),
        (lambda: train(config, empty), "train: run_dir"),
        (lambda: resume(empty), "resume: path"),
        (lambda: DemoSettings(corpus=empty), "demo: corpus"),
    ):
        with pytest.raises(ValueError, match=f"{name} must not be empty, got {empty!r}"):
            call()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("train", option) for option in ("resume", "out", "corpus", "model", "device")),
        *(("demo", option) for option in ("resume", "out", "corpus")),
    ],
)
def test_an_option_that_is_empty_is_named(home, capsys, name, option):
    assert main([name, f"--{option}", ""]) == 1
    said = capsys.readouterr().err
    assert said == f"mhc-tile: {name}: --{option} must not be empty, got ''\n"
    assert not list(Path.cwd().iterdir())


def test_a_run_is_found_and_resumed_from_elsewhere(home, capsys, monkeypatch):
    (home / "text.txt").rename("text.txt")
    assert main(command("--corpus", "text.txt", "--out", "~/my run")) == 0
    assert f"written to {home / 'my run'}" in capsys.readouterr().out
    monkeypatch.chdir(home)
    assert main(["train", "--resume", "my run"]) == 0
    assert not (home / "~").exists()


def test_a_corpus_that_moved_is_named_anew(config, home, capsys):
    train(config, "~/run")
    (home / "text.txt").rename("moved.txt")
    assert main(["train", "--resume", "~/run"]) == 1
    said = capsys.readouterr().err
    assert f"resume: corpus must exist, got '{home / 'text.txt'}'" in said
    assert "--corpus" in said
    Path("other.txt").write_text("other text\n" * 100)
    assert main(["train", "--resume", "~/run", "--corpus", "other.txt"]) == 1
    assert "resume: corpus must be the one that" in capsys.readouterr().err
    resumed = ["train", "--resume", "~/run", "--steps"]
    assert main([*resumed, "4", "--corpus", "moved.txt"]) == 0
    assert main([*resumed, "6"]) == 0  # which stored where it is now


def test_the_corpus_of_a_demo_may_move(home, monkeypatch):
    monkeypatch.setattr(demo, "draw_all", lambda _folder, _legs: [])
    legs = DemoSettings.legs
    small = {"model": TINY, "batch_size": 2, "sequence_length": 16, "eval_batches": 2}
    monkeypatch.setattr(
        DemoSettings,
        "legs",
        lambda settings: {name: leg.replace(**small) for name, leg in legs(settings).items()},
    )
    out = start_demo(home / "demo", DemoSettings(steps=6, stress_steps=3, corpus="~/text.txt"))
    assert run_legs(out, lambda name, config: lambda rows: None).report
    (home / "text.txt").rename("moved.txt")
    Path("other.txt").write_text("other text\n" * 100)
    with pytest.raises(ValueError, match="name its new place"):
        run_legs(out, lambda name, config: lambda rows: None)
    with pytest.raises(ValueError, match="resume: corpus must be the one"):
        run_legs(out, lambda name, config: lambda rows: None, corpus="other.txt")
    assert stored_settings(out).corpus == str(home / "text.txt")
    assert run_legs(out, lambda name, config: lambda rows: None, corpus="moved.txt").report
    assert stored_settings(out).corpus == str(Path.cwd() / "moved.txt")


def test_the_command_to_continue_survives_a_shell(home):
    said = cli._resume_hint("train", home / "my run's")
    words = shlex.split(said.removeprefix("continue with: "))
    assert words == ["mhc-tile", "train", "--resume", str(home / "my run's")]


# one owner


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    with owned(tmp_path / "run", "it", new=True):
        for new in (True, False):
            with (
                pytest.raises(FolderInUseError, match="it must not be in use by another process"),
                owned(tmp_path / "run", "it", new=new),
            ):
                pytest.fail("two owners")
    with owned(tmp_path / "run", "it", new=True):  # a lock alone is no content
        (tmp_path / "run" / "x").touch()
    with (
        pytest.raises(FolderInUseError, match="it must not exist yet or be empty"),
        owned(tmp_path / "run", "it", new=True),
    ):
        pytest.fail("not new")


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(folder.FileLock, "acquire", fail)
    with pytest.warns(UserWarning, match="cannot be locked"), owned(tmp_path, "it"):
        pass


def inside(work, use):
    """A listener that uses the run's folder while the run goes on, once."""
    found = []

    def on_rows(_rows):
        if not found:
            found.append(None)
            with pytest.raises(FolderInUseError) as error:
                use()
            found[0] = str(error.value)

    work(on_rows)
    return found[0]


def test_a_run_owns_its_folder_to_the_end(config, tmp_path):
    run = tmp_path / "run"
    said = inside(lambda on_rows: train(config, run, on_rows=on_rows), lambda: train(config, run))
    assert "run_dir must not exist yet or be empty" in said
    said = inside(lambda on_rows: resume(run, on_rows=on_rows), lambda: resume(run))
    assert said == f"resume: path must not be in use by another process, got '{run}'"
    assert resume(run).status == "done"


def test_a_demo_owns_its_folder_to_the_end(home, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_run_legs", lambda out, *_: run_legs(out, None))
    out = start_demo(tmp_path / "demo", DemoSettings())
    with pytest.raises(FolderInUseError, match="demo: resume must not be in use"):
        run_legs(out, None)
    with pytest.raises(FolderInUseError, match="demo: out must not exist yet or be empty"):
        start_demo(out, DemoSettings())


@pytest.mark.parametrize("running", [True, False])
def test_runs_that_start_in_one_second_have_folders_of_their_own(
    config, home, monkeypatch, capsys, running
):
    """Behind the look for a free name, and before the folder is made, another run makes it."""
    monkeypatch.setattr(cli.time, "strftime", lambda _form: "now")
    build, others = loop._Run, ExitStack()

    def built(*args):
        monkeypatch.setattr(loop, "_Run", build)
        if running:
            others.enter_context(owned(Path("runs/now"), "it", new=True))
        else:
            train(config, "runs/now")
        return build(*args)

    monkeypatch.setattr(loop, "_Run", built)
    with others:
        assert main(command("--corpus", "~/text.txt")) == 0
        assert f"written to {Path('runs/now-2').absolute()}" in capsys.readouterr().out
        if running:
            assert main(command("--corpus", "~/text.txt", "--out", "runs/now")) == 1
            said = capsys.readouterr().err
            assert "train: run_dir must not be in use by another process" in said
    assert list_checkpoints(Path("runs/now-2"))
    assert bool(list_checkpoints(Path("runs/now"))) != running


def test_the_lock_of_a_killed_process_is_gone(config, tmp_path):
    train(config, tmp_path / "run")
    code = (
        "import sys, filelock; a = filelock.FileLock(sys.argv[1]).acquire(); print(1, flush=True)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()", tmp_path / "run" / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        other.stdout.readline()
        with pytest.raises(FolderInUseError, match="resume: path must not be in use"):
            resume(tmp_path / "run")
    finally:
        other.kill()
        other.communicate()
    assert resume(tmp_path / "run").status == "done"


def test_checkpoints_may_be_on_another_disk(config, tmp_path):
    train(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "disk")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    assert resume(tmp_path / "run", steps=4).run_dir == tmp_path / "run"
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {
        "step_00000002.pt",
        "step_00000004.pt",
    }


def test_a_run_whose_checkpoints_are_elsewhere_is_locked_itself(config, tmp_path, monkeypatch):
    run, disk = tmp_path / "run", tmp_path / "disk" / "checkpoints"
    train(config, run)
    disk.parent.mkdir()
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    name = list_checkpoints(run)[-1].name
    Path("relative.pt").symlink_to(f"../run/checkpoints/{name}")
    (disk / "latest.pt").symlink_to(name)
    linked = run / "checkpoints"
    names = [linked / name, f"../run/checkpoints/{name}", "relative.pt", linked / "latest.pt"]
    for path in names:
        with owned(run, "it"), pytest.raises(FolderInUseError, match="resume: path must not"):
            resume(path)
        assert resume(path).run_dir == run
    assert [path.name for path in disk.parent.iterdir()] == ["checkpoints"]


def test_a_link_to_a_checkpoint_stands_for_its_run(config, tmp_path):
    train(config, tmp_path / "run")
    (tmp_path / "latest.pt").symlink_to(list_checkpoints(tmp_path / "run")[-1])
    assert resume(tmp_path / "latest.pt", steps=4).run_dir == tmp_path / "run"
    assert len(list_checkpoints(tmp_path / "run")) == 2


# files of others


def test_files_of_other_names_are_neither_deleted_nor_resumed_from(config, tmp_path):
    run = tmp_path / "run"
    train(config.replace(steps=4, checkpoint_every=1), run)
    names = ["step_best.pt", "step_00000009.pt.bak", "step_9.pt", "step_000000099.pt", "step_.pt"]
    for name in names:
        (run / "checkpoints" / name).write_text("mine")
    (run / "checkpoints" / "step_00000098.pt").mkdir()
    assert [path.stem for path in list_checkpoints(run)] == ["step_00000003", "step_00000004"]
    assert resume(run, steps=6).step == 6
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept >= {*names, "step_00000098.pt"}


def test_steps_are_ordered_as_numbers(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (99_999_999, 100_000_000):
        checkpoints.save(step, {})
    assert list_checkpoints(tmp_path)[-1].name == "step_100000000.pt"


def test_a_leg_that_is_begun_again_leaves_files_of_others(config, tmp_path):
    (tmp_path / "leg" / "checkpoints").mkdir(parents=True)
    mine = [tmp_path / "leg" / "notes.txt", tmp_path / "leg" / "checkpoints" / "step_best.pt"]
    for path in mine:
        path.write_text("mine")
    (tmp_path / "leg" / "metrics.jsonl").write_text('{"kind": "step", "st')
    assert demo._run_leg(tmp_path / "leg", config, lambda rows: None).step == 2
    assert all(path.read_text() == "mine" for path in mine)


def test_the_folder_survives_a_change_of_the_working_directory(config, tmp_path):
    result = train(config, "run", on_rows=lambda rows: os.chdir(tmp_path))
    assert list_checkpoints(result.run_dir)
    assert result.run_dir == tmp_path / "here" / "run"
