"""Tables on disk: format, whose counts, and writers that are killed or come in pairs."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mhc_tile.autotune import lookup, registry, table
from mhc_tile.autotune.configs import decode
from mhc_tile.autotune.device import Device
from mhc_tile.autotune.problems import Problem, bucket
from mhc_tile.autotune.table import Table
from mhc_tile.autotune.timing import MARGIN
from tables import DEVICE, TARGET, ask, family, tables_of


def entries(read: Table) -> dict[tuple[str, int, int], float]:
    return {
        (key.kernel, key.channels, tokens): entry.us
        for key, member in read.families.items()
        for tokens, entry in member.entries.items()
    }


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "table.json"
    table.update(path, DEVICE, [family(), family("pre", at=4096)])
    read = table.read(path, DEVICE)
    assert (read.gpu, read.multiprocessors) == ("NVIDIA Test 1", 132)
    expected = dataclasses.replace(family(), source=str(path))
    assert read.families[expected.key] == expected
    assert table.render(read) == path.read_text()


def test_equal_tables_are_equal_files(tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    members = [family("merge"), family("pre"), family("merge", 1280)]
    table.update(one, DEVICE, members)
    for member in reversed(members):
        table.update(other, DEVICE, [member])
    assert one.read_bytes() == other.read_bytes()


def test_entries_of_one_order_of_sums_are_merged_and_those_of_another_replaced(tmp_path):
    path = tmp_path / "table.json"
    table.update(path, DEVICE, [family(at=64), family(at=256), family("pre")])
    assert set(entries(table.read(path))) == {
        ("merge", 2560, 64),
        ("merge", 2560, 256),
        ("pre", 2560, 64),
    }
    table.update(path, DEVICE, [family(order="('other',)", at=16)])
    assert set(entries(table.read(path))) == {("merge", 2560, 16), ("pre", 2560, 64)}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "must be a table in JSON, got: Input data was truncated"),
        ("[]", "must be a table in JSON, got: Expected `object`, got `array`"),
        ("[" * 100_000, "must be a table in JSON, got: "),
        ('{"schema": 2}', "schema must be 1, got 2; update mhc-tile"),
        (
            '{"schema": 1}',
            "must be a table in JSON, got: Object missing required field `gpu`",
        ),
        (
            '{"schema": 1, "gpu": "other", "multiprocessors": 132, "families": []}',
            "must be for NVIDIA Test 1 with 132 multiprocessors, got one for other with 132",
        ),
        (
            '{"schema": 1, "gpu": "NVIDIA Test 1", "multiprocessors": 132, "families": '
            '[{"kernel": "merge", "n": 4, "C": 1, "dtype": "x", "regime": "many", "order": "",'
            ' "tilelang": "", "driver": "", "date": "", "tokens": {}}]}',
            "must be a table in JSON, got: Expected `object` of length >= 1 - at "
            "`$.families[0].tokens`",
        ),
        (
            '{"schema": 1, "gpu": "x", "multiprocessors": Infinity, "families": []}',
            "must be a table in JSON, got: JSON is malformed: invalid character",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_reported_by_name_and_not_used(
    tmp_path, monkeypatch, text, why
):
    bad = tmp_path / f"{DEVICE.slug}.json"
    bad.write_text(text)
    with pytest.raises(table.TableError, match=re.escape(f"{bad}: {why}")):
        table.read(bad, DEVICE)
    good = tmp_path / "user"
    table.update(good / f"{DEVICE.slug}.json", DEVICE, [family()])
    monkeypatch.setenv(table.VARIABLE, str(bad))
    monkeypatch.setattr(table, "user_folder", lambda: good)
    tables = lookup.load(DEVICE)
    assert set(tables.families) == {family().key}
    (fault,) = tables.faults
    assert fault.startswith(f"{bad}: {why}")
    assert fault.endswith("it is not used")


def test_a_writer_keeps_a_broken_file_aside_and_leaves_anothers_alone(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{ broken")
    table.update(path, DEVICE, [family()])
    assert set(table.read(path).families) == {family().key}
    assert (tmp_path / "table.json.unreadable").read_text() == "{ broken"
    path.write_text("broken again")
    table.check(path, DEVICE)
    assert table.update(path, DEVICE, []).aside == tmp_path / "table.json.unreadable.1"
    assert (tmp_path / "table.json.unreadable").read_text() == "{ broken"
    for text in ('{"schema": 2}', table.render(Table("NVIDIA Other", 1))):
        path.write_text(text)
        for write in (table.check, lambda *where: table.update(*where, [family()])):
            with pytest.raises(table.TableError):
                write(path, DEVICE)
        assert path.read_text() == text


def test_a_place_that_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        table.check(tmp_path / "file" / "table.json", DEVICE)


@pytest.mark.parametrize("wrong", [{"C": -5}, {"n": 0}, {"us": float("nan")}])
def test_numbers_that_no_table_has(tmp_path, wrong):
    path = tmp_path / "table.json"
    table.update(path, DEVICE, [family()])
    values = json.loads(path.read_text())
    for place in (values["families"][0], values["families"][0]["tokens"]["64"]):
        place.update({name: value for name, value in wrong.items() if name in place})
    path.write_text(json.dumps(values))
    with pytest.raises(table.TableError, match="must be a table in JSON, got: "):
        table.read(path, DEVICE)


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """One table in each place, each with a merge family of its own time, pre in the last alone."""
    found = {name: tmp_path / name for name in ("given", "user", "shipped")}
    monkeypatch.setenv(table.VARIABLE, str(found["given"]))
    monkeypatch.setattr(table, "user_folder", lambda: found["user"])
    monkeypatch.setattr(table, "SHIPPED", found["shipped"])
    for us, (name, folder) in enumerate(found.items(), start=1):
        members = [family(us=us)] + ([family("pre", us=us)] if name == "shipped" else [])
        table.update(folder / f"{DEVICE.slug}.json", DEVICE, members)
    return found


def times() -> dict[str, float]:
    families = lookup.load(DEVICE).families
    return {key.kernel: member.entries[64].us for key, member in families.items()}


def test_the_variable_counts_most_then_the_users_then_the_shipped(places, monkeypatch):
    assert times() == {"merge": 1, "pre": 3}
    monkeypatch.setenv(table.VARIABLE, str(places["user"] / f"{DEVICE.slug}.json"))  # a file
    assert times() == {"merge": 2, "pre": 3}
    monkeypatch.delenv(table.VARIABLE)
    assert times() == {"merge": 2, "pre": 3}
    assert len(lookup.load(DEVICE).files) == 2
    (places["user"] / f"{DEVICE.slug}.json").unlink()
    assert times() == {"merge": 3, "pre": 3}


def test_entries_of_one_order_complete_each_other_wherever_they_are(places):
    """A user who tunes one number of tokens keeps what is shipped for the others."""
    name = f"{DEVICE.slug}.json"
    (places["given"] / name).unlink()
    table.update(places["shipped"] / name, DEVICE, [family(us=7, at=1), family(us=7, at=64)])
    asked = Problem("merge", 4, 2560, "bfloat16", 1)
    decision = lookup.decide(lookup.load(DEVICE), asked, arch="sm_90a")
    assert (decision.why, decision.source) == ("exact", str(places["shipped"] / name))
    decision = lookup.decide(lookup.load(DEVICE), asked.at(64), arch="sm_90a")
    assert (decision.why, decision.source) == ("exact", str(places["user"] / name))
    table.update(places["user"] / name, DEVICE, [family(order="('other',)", at=64)])
    assert set(lookup.load(DEVICE).families[family().key].entries) == {64}


def test_a_variable_that_names_nothing_is_a_fault(places, monkeypatch):
    monkeypatch.setenv(table.VARIABLE, str(places["given"] / "no such"))
    (fault,) = lookup.load(DEVICE).faults
    assert fault.startswith("MHC_TILE_TABLES: must be a table, a folder of tables or off, got ")
    plain = places["given"] / "table"  # a file, whatever its name
    plain.write_bytes((places["given"] / f"{DEVICE.slug}.json").read_bytes())
    monkeypatch.setenv(table.VARIABLE, str(plain))
    assert times()["merge"] == 1


def test_tables_can_be_switched_off(places, monkeypatch):
    monkeypatch.setenv(table.VARIABLE, "off")
    assert table.is_off()
    assert times() == {}


def test_a_table_of_another_tilelang_is_used_and_named(places):
    path = places["given"] / f"{DEVICE.slug}.json"
    values = json.loads(path.read_text())
    values["families"][0]["tilelang"] = "0.1.14"
    path.write_text(json.dumps(values))
    tables = lookup.load(DEVICE)
    assert "0.1.14" in tables.other_tilelang
    assert tables.families[family().key].entries[64].us == 1
    table.update(path, DEVICE, [family(at=256)])
    values = json.loads(path.read_text())["families"][0]
    assert values["tilelang"] == "0.1.15"
    assert [entry.get("tilelang") for entry in values["tokens"].values()] == ["0.1.14", None]
    assert "0.1.14" in lookup.load(DEVICE).other_tilelang


def test_an_order_with_a_knob_that_is_gone_is_the_same_order(tmp_path):
    path = tmp_path / "table.json"
    table.update(path, DEVICE, [family(order="('x', ('group', 16), ('batches', 1))", at=64)])
    table.update(path, DEVICE, [family(order="('x', ('group', 16))", at=256)])
    (member,) = table.read(path).families.values()
    assert set(member.entries) == {64, 256}


def test_buckets_are_powers_of_two_at_or_below():
    assert [bucket(t) for t in (1, 2, 3, 4, 1023, 1024, 1663, 65536)] == [
        1, 2, 2, 4, 512, 1024, 1024, 65536,
    ]  # fmt: skip


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from mhc_tile.autotune import table
from tables import DEVICE, family
print("ready", flush=True)
for width in range({first}, {last}):
    table.update(Path({path!r}), DEVICE, [family(width=width, us=width)])
    print(width, flush=True)
"""


def writer(path: Path, first: int, last: int) -> subprocess.Popen:
    tests = str(Path(__file__).parents[1])
    code = WRITER.format(tests=tests, path=str(path), first=first, last=last)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_every_table_that_it_finished(tmp_path):
    path = tmp_path / "table.json"
    process = writer(path, 1, 100_000)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    done = int(process.stdout.readline())
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        done = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    done = int((process.stdout.read().split() or [done])[-1])
    process.wait()
    found = {key[1] for key in entries(table.read(path, DEVICE))}
    assert found >= set(range(1, done + 1))
    assert len(found) <= done + 1
    table.update(path, DEVICE, [family(width=999_999)])  # its lock died with it
    assert len(table.read(path, DEVICE).families) == len(found) + 1


def test_a_crash_while_writing_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    table.update(path, DEVICE, [family()])
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(table.os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        table.update(path, DEVICE, [family("pre")])
    assert path.read_bytes() == before
    assert {item.name for item in tmp_path.iterdir()} <= {"table.json", "table.json.lock"}


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "table.json"
    pair = [writer(path, 1, 61), writer(path, 101, 161)]
    threads = [threading.Thread(target=process.communicate) for process in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.returncode for process in pair] == [0, 0]
    found = {key[1]: us for key, us in entries(table.read(path, DEVICE)).items()}
    assert found == {width: width for width in (*range(1, 61), *range(101, 161))}


@pytest.mark.parametrize("path", sorted(table.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_table_runs_what_it_says(path):
    """Every entry is found as it stands: what it was measured with is offered, in its regime."""
    pytest.importorskip("tilelang")
    shipped = table.read(path)
    device = Device(shipped.gpu, (9, 0), shipped.multiprocessors, 0, 0)
    tables = lookup.Tables(device, shipped.families)
    target = registry.Target("sm_90a", shipped.multiprocessors)
    for known, member in shipped.families.items():
        for tokens, measured in member.entries.items():
            asked = Problem(known.kernel, known.n, known.channels, known.dtype, tokens)
            decision = lookup.decide(tables, asked, arch="sm_90a")
            own = registry.default(asked, target)
            assert (decision.why, decision.family) == ("exact", known), asked
            assert (decision.config or own) == decode(measured.config), asked
            assert not measured.default or own == decode(measured.config), asked
            same_order = member.order == repr(registry.KERNELS[known.kernel].order(own))
            if not measured.default and same_order:
                assert measured.us < measured.default_us * (1 - MARGIN), asked
    assert not tables.faults


def test_a_configuration_that_would_divide_by_zero_is_refused():
    values = {"columns": 256, "tile": 16, "threads": 16, "stages": 3, "groups": 2, "min_blocks": 2}
    with pytest.raises(ValueError, match=r"config\.threads must be a multiple of 32 and at least"):
        decode({"type": "_mapping_columns.Config", **values})
    with pytest.raises(ValueError, match=r"config\.min_blocks must be at least 1, got 0"):
        decode({"type": "_mapping_columns.Config", **values, "threads": 128, "min_blocks": 0})


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), TypeError("no number")])
def test_whatever_an_entry_raises_it_is_not_used(error, monkeypatch):
    def adapted(*_):
        raise error

    values = {"type": "merge.ForwardConfig", "threads": 128, "vectors": 1, "depth": 2}
    tables = tables_of(merge={64: table.Entry(values, False, 9.0, 10.0)})
    monkeypatch.setattr(lookup, "_adapted", adapted)
    decision = ask(tables, "merge", 64)
    assert decision.why == "default"
    assert decision.config == registry.default(decision.problem, TARGET)
