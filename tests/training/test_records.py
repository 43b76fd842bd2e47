"""Checkpoints and metrics: whole or absent, refused with a reason, valid after any end."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhc_tile.training import read_metrics
from mhc_tile.training.checkpoint import (
    Checkpoints,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from mhc_tile.training.extras import require
from mhc_tile.training.metrics import MetricsLog, replace_metrics, to_json_line

ROOT = Path(__file__).resolve().parents[2]


def test_the_newest_and_the_previous_checkpoint_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30):
        checkpoints.save(step, {"value": torch.tensor(step)})
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (20, 30)]
    newest = load_checkpoint(find_checkpoint(tmp_path))
    assert (newest["step"], newest["value"].item()) == (30, 30)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_truncated_checkpoint_is_refused_and_the_older_one_named_and_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    older = checkpoints.save(10, {"value": torch.zeros(100)})
    newer = checkpoints.save(20, {"value": torch.zeros(100)})
    whole = newer.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        newer.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="resume: checkpoint must be a complete one") as error:
            load_checkpoint(find_checkpoint(tmp_path))
        assert f"the older one is kept, resume from it: '{older}'" in str(error.value)
    assert load_checkpoint(older)["step"] == 10


def test_after_going_back_the_older_course_survives_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    older = checkpoints.save(10, {})
    checkpoints.save(20, {}).write_bytes(b"broken")
    resumed = Checkpoints(tmp_path, resumed=older)
    assert resumed.save(15, {}).exists()
    assert [path.stem for path in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000015"]


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="got a file of another kind") as error:
        load_checkpoint(path)
    assert "older" not in str(error.value)
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="got a file that cannot be read"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="resume: checkpoint must be in the folder"):
        find_checkpoint(path)
    with pytest.raises(ValueError, match="resume: path must be a checkpoint or a run directory"):
        find_checkpoint(tmp_path / "nothing")


def test_a_failed_save_leaves_the_old_checkpoint_and_no_part(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, {"value": 1})

    def fail(_state, file):
        file.write(b"half a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(20, {"value": 2})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000010.pt"]
    assert load_checkpoint(find_checkpoint(tmp_path))["value"] == 1


def test_metrics_are_strict_json_whatever_the_values(tmp_path):
    log = MetricsLog(tmp_path)
    log.write([{"kind": "step", "step": 1, "loss": math.nan, "gains": [1.0, math.inf]}])
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row == {"kind": "step", "step": 1, "loss": None, "gains": [1.0, None]}


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(3):
        log.write([{"kind": "step", "step": step}])
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == step + 1
    log.close()


class Parts:
    """A file that takes three bytes at a time."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        return self.file.write(content[:3])

    def close(self):
        self.file.close()


def test_a_write_in_parts_is_finished(tmp_path):
    log = MetricsLog(tmp_path)
    log.file = Parts(log.file)
    for step in range(3):
        log.write([{"kind": "step", "step": step}])
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_write_that_stops_in_a_row_is_an_error_and_leaves_none_of_it(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path)
    log.write([{"kind": "step", "step": 1}])
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))  # as a disk that is full
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            log.write([{"kind": "step", "step": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    log.write([{"kind": "step", "step": 3}])  # there is room again
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_error(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="train: checkpoint must be written whole") as error:
            checkpoints.save(2, {"value": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001.pt"]


def test_a_file_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    replace_metrics(path, [{"kind": "step", "step": 1}])

    def fail(_file):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        replace_metrics(path, [])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(read_metrics(path)) == 1


def test_resuming_drops_later_rows_and_a_cut_off_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    replace_metrics(path, [{"kind": "step", "step": step} for step in range(1, 6)])
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    log = MetricsLog(tmp_path, resumed_step=3)
    log.write([{"kind": "step", "step": 4, "again": True}])
    log.close()
    assert [row["step"] for row in log.kept] == [1, 2, 3]
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert path.read_text().endswith(to_json_line({"kind": "step", "step": 4, "again": True}))


@pytest.mark.parametrize("line", [b'{"kind": "st', b"caf\xe9", b"[1]", b'{"step": 2}', b'"kind"'])
def test_a_damaged_line_is_named_and_the_file_stays_as_it_is(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    whole = to_json_line({"kind": "step", "step": 1}).encode()
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(ValueError, match="metrics: every line must be a JSON object") as error:
        MetricsLog(tmp_path, resumed_step=1)
    assert f"got {line!r} in line 2 of '{path}'" in str(error.value)
    assert path.read_bytes() == whole + line + b"\n" + whole


def test_a_missing_package_names_the_extra():
    with pytest.raises(RuntimeError, match=r"figures: .*'no_such_package'.*mhc-tile\[train\]"):
        require("no_such_package.part", "figures")


def test_training_is_importable_without_the_extra():
    code = """
import sys
for name in ("matplotlib", "tabulate", "tensorboard", "tqdm", "torch.utils.tensorboard"):
    sys.modules[name] = None
import mhc_tile.training.cli
from mhc_tile.training.extras import require
require("tqdm", "progress bar")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "progress bar: the package 'tqdm' must be installed" in result.stderr.splitlines()[-1]
