"""Result files: what is written is read, and what is none is refused by name."""

import json
import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from mhc_tile.autotune.timing import Sample
from mhc_tile.perf import output, records
from mhc_tile.perf.records import percent_of_roofline
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


def with_row(**changes) -> str:
    return text_of(rows=[{**msgspec.structs.asdict(row()), **changes}])


def test_a_time_of_nothing_has_no_share_of_the_roofline():
    row = records.Row("c", "o", "merge", "forward", 1, 8, 4, "bfloat16", us=0.0, bytes=1)
    assert records.percent_of_roofline(row, 1e12) is None


WHOLE = text_of(environment={"gpu": None})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (text_of(schema=2), "have schema 1, got 2: measure again"),
        (text_of(schema="1"), "be a result .* got: Expected `int`, got `str` - at `\\$.schema`"),
        ("[]", "be a result of `mhc-tile perf` in JSON, got: Expected `object`, got `array`"),
        ("null", "be a result .* got: Expected `object`"),
        ('{"name": "tables"}', "be a result .* got: .*missing required field `schema`"),
        ("", "be a result of `mhc-tile perf` in JSON"),
        (WHOLE[: len(WHOLE) // 2], "be a result of `mhc-tile perf` in JSON"),
        ("<<<<<<< ours\n" + WHOLE, "be a result of `mhc-tile perf` in JSON"),
        (text_of(kind="walk"), "got: Invalid enum value 'walk' - at `\\$.kind`"),
        (text_of(rows=[{"case": "x"}]), "got: .*missing required field .* at `\\$.rows\\[0\\]`"),
        (with_row(speed=1), "got: .*unknown field `speed` - at `\\$.rows\\[0\\]`"),
        (text_of(rows=None), "got: Expected `array`, got `null` - at `\\$.rows`"),
        (text_of(environment=7), "got: Expected `object`, got `int` - at `\\$.environment`"),
        (text_of(environment={"gpu": 7}), "got `int` - at `\\$.*.gpu`"),
        (text_of(environment={"packages": []}), "got `array` - at `\\$.*.packages`"),
        (text_of(environment={"left_out": [1]}), "got `int` - at `\\$.*.left_out\\[0\\]`"),
        (text_of(environment={"copy_bytes_per_s": "4"}), "got `str` - at `\\$.*.copy_bytes_per_s`"),
        (text_of(environment={"copy_bytes_per_s": True}), "got `bool` - at .*.copy_bytes_per_s`"),
        (with_row(us="91"), "got: Expected `float \\| null`, got `str` - at `\\$.rows\\[0\\].us`"),
        (with_row(us=float("nan")), "got: JSON is malformed"),
        (with_row(us=0.5).replace("0.5", "1e999"), "got: Number out of range - at .*.us`"),
        (with_row(turns=1.5), "got `float` - at `\\$.rows\\[0\\].turns`"),
        (with_row(turns=True), "got `bool` - at `\\$.rows\\[0\\].turns`"),
        (with_row(us=True), "got `bool` - at `\\$.rows\\[0\\].us`"),
        (with_row(captured=1), "got `int` - at `\\$.rows\\[0\\].captured`"),
        (with_row(status="good"), "Invalid enum value 'good' - at `\\$.rows\\[0\\].status`"),
        (with_row(case=None), "got `null` - at `\\$.rows\\[0\\].case`"),
        (with_row(parts={"pre": "1"}), "got `str` - at `\\$.rows\\[0\\].parts"),
        (with_row(details=[]), "got `array` - at `\\$.rows\\[0\\].details`"),
        (with_row(details={"x": "["}).replace('"["', "[" * 100_000), "be a result"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path, text, why):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^perf: .*some.json must .*{why}"):
        records.read(path)


def test_other_bytes_and_missing_files(tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be a result of `mhc-tile perf` in JSON"):
        records.read(path)
    with pytest.raises(FileNotFoundError):
        records.read(tmp_path / "none.json")


@pytest.mark.parametrize("values", [{"us": 91}, {"us": None}, {"details": {"x": [1, None]}}])
def test_values_that_may_be_there_are_read(tmp_path, values):
    path = tmp_path / "some.json"
    path.write_text(with_row(**values))
    assert records.read(path).rows == [row().replace(**values)]


def test_what_is_not_a_number_is_written_as_not_measured(tmp_path):
    path = tmp_path / "run.json"
    records.write(record(row(float("nan"), details={"x": float("inf")})), path)
    (kept,) = records.read(path).rows
    assert (kept.us, kept.details) == (None, {"x": None})


WRITER = """
import json, os, sys, time
from pathlib import Path
from mhc_tile.perf import output, records
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


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe must be a file, got something else"):
        records.write(record(row()), pipe)
    with pytest.raises(ValueError, match=r"--out must be a file, got the device .*pipe"):
        output.check_file("perf", "out", pipe)
    output.check_file("perf", "markdown", pipe, replaced=False)
    with pytest.raises(ValueError, match="--out must be a file, got the folder"):
        output.check_file("perf", "out", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]
    assert pipe.is_fifo()


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    records.write(record(row()), path)
    with pytest.raises(TypeError):
        records.write(record(row(details={"x": object()})), path)
    assert records.read(path) == record(row())
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
