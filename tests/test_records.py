"""Result files: what is written is read, and what is none is refused by name."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mhc_tile.autotune.timing import Sample
from mhc_tile.perf import records
from mhc_tile.perf.records import Record, percent_of_roofline
from results import full, overhead, record, row


@pytest.mark.parametrize("result", [full(), overhead(), record()])
def test_what_is_written_is_read(result, tmp_path):
    path = tmp_path / "new" / "run.json"
    records.write(result, path)
    assert records.read(path) == result
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_record_knows_its_cases():
    other = "merge/forward/1x8/n4/bfloat16"
    result = record(row(), row(contender="peer"), row(case=other))
    assert result.cases == [row().case, other]
    assert [r.contender for r in result.of(row().case)] == ["mhc_tile", "peer"]
    assert row(10.0).sample == Sample(10.0, 9.9, 10.1, 20)
    assert row(None).sample is None


def test_percent_of_the_roofline():
    timed = row(100.0, bytes=210_000_000)
    assert percent_of_roofline(timed, 4.2e12) == pytest.approx(50)
    assert percent_of_roofline(timed, 2.1e12) == pytest.approx(100)
    assert percent_of_roofline(timed, None) is None
    assert percent_of_roofline(row(None, bytes=1), 1e12) is None
    assert percent_of_roofline(row(1.0), 1e12) is None


def text_of(**changes) -> str:
    values = {"schema": records.SCHEMA, "kind": "run", "environment": {}, "rows": []}
    return json.dumps({**values, **changes})


WHOLE = text_of(environment={"gpu": None})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (text_of(schema=2), "must have schema 1, got 2: measure again"),
        (text_of(schema="1"), "must have schema 1, got 1"),
        ("[]", "must be a result of `mhc-tile perf`, got other JSON"),
        ("null", "got other JSON"),
        ('{"name": "tables"}', "got other JSON"),
        ("", "must be a JSON result file"),
        (WHOLE[: len(WHOLE) // 2], "must be a JSON result file"),
        ("<<<<<<< ours\n" + WHOLE, "must be a JSON result file"),
        (text_of(kind="walk"), "must be of kind .*, got 'walk'"),
        (text_of(rows=[{"case": "x"}]), "must hold rows of schema 1, got .*missing"),
        (text_of(rows=[{"case": "x", "speed": 1}]), "must hold rows of schema 1, got .*speed"),
        (text_of(rows=None), "must hold rows of schema 1"),
        (text_of(environment=7), "must hold rows of schema 1"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path, text, why):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"perf: .*some.json {why}" if why[0] == "m" else why):
        records.read(path)


def test_other_bytes_and_missing_files(tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be a JSON result file"):
        records.read(path)
    with pytest.raises(FileNotFoundError):
        records.read(tmp_path / "none.json")


WRITER = """
import json, os, sys, time
from pathlib import Path
from mhc_tile.perf import records
path = Path(sys.argv[1])
replace = os.replace
def slow(source, target):
    Path(sys.argv[1] + ".reached").touch()
    time.sleep(60)
    replace(source, target)
os.replace = slow
records.write(records.Record("overhead", {}, []), path)
"""


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path, reached = tmp_path / "run.json", tmp_path / "run.json.reached"
    records.write(record(row()), path)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not reached.exists() and writer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert reached.exists()
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert records.read(path) == record(row())


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    records.write(record(row()), path)
    with pytest.raises(TypeError):
        records.write(record(row(details={"x": object()})), path)
    assert records.read(path) == record(row())
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_where_a_result_is_made_is_said():
    found = records.environment(None, device="cpu")
    assert found["gpu"] is None
    assert found["copy_bytes_per_s"] is None
    assert "CPU" in found["device"]
    assert found["packages"].keys() == set(records.PACKAGES)
    assert found["command"][0] == "mhc-tile"
    records_of = Record("run", found, [])
    assert json.loads(json.dumps(found)) == {**records_of.environment}
    assert records.version("no-such-package") is None
