"""What a result says of where it was made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_tile import set_batch_invariant
from mhc_tile.autotune import lookup
from mhc_tile.perf import environment, output, records
from mhc_tile.perf.peers import ADAPTERS, version


def test_where_a_result_is_made_is_said():
    found = environment.environment(None, device="cpu")
    assert found["gpu"] is None
    assert found["copy_bytes_per_s"] is None
    assert "CPU" in found["device"]
    assert found["packages"].keys() == {"triton", "tilelang", *ADAPTERS}
    assert found["command"][0] == "mhc-tile"
    assert found["float32_matmul_precision"] == "highest"
    assert found["tables"] == []
    assert json.loads(json.dumps(found)) == found
    assert version("no-such-package") is None


def test_the_table_in_use_is_named_by_what_it_says(monkeypatch, tmp_path):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(environment.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(environment, "describe", lambda index: lookup.Device("X", (9, 0), 1, 1, 1))
    monkeypatch.setattr(environment, "driver_version", lambda: "1")
    monkeypatch.setattr(lookup, "of_device", lambda index: lookup.Tables(None, files=[path]))
    names = set()
    for text in ("{}", "{ }"):
        path.write_text(text)
        (name,) = environment.environment(1.0)["tables"]
        assert name.startswith("gpu.json ")
        names.add(name)
    assert len(names) == 2


def test_switches_are_said(monkeypatch):
    monkeypatch.delenv("MHC_TILE_TABLES", raising=False)
    switches = ("MHC_TILE_REFERENCE", "MHC_TILE_BATCH_INVARIANT", "MHC_TILE_TABLES")
    assert environment.settings() == dict.fromkeys(switches)
    monkeypatch.setenv("MHC_TILE_TABLES", "off")
    monkeypatch.setattr(environment._dispatch, "REFERENCE_ONLY", True)
    set_batch_invariant(True)
    try:
        assert environment.settings() == dict(zip(switches, ("1", "1", "off"), strict=True))
    finally:
        set_batch_invariant(False)


@pytest.mark.parametrize(
    ("program", "said"),
    [("/x/bin/mhc-tile", []), ("/x/mhc_tile/__main__.py", []), ("/x/perf/__main__.py", ["perf"])],
)
def test_the_command_is_one_that_can_be_run_again(monkeypatch, program, said):
    monkeypatch.setattr(sys, "argv", [program, "run", "--quick"])
    assert environment.command() == ["mhc-tile", *said, "run", "--quick"]


def test_a_result_can_have_names_that_are_not_utf8(monkeypatch, tmp_path):
    name = "caf\udce9"  # as Python decodes the byte E9 of a file name
    monkeypatch.setattr(sys, "argv", ["/x/bin/mhc-tile", "--out", name])
    monkeypatch.setenv("MHC_TILE_TABLES", name)
    found = environment.environment(None, device="cpu")
    fault = output.one_line(OSError(f"no file {name}"))
    row = records.Row("c", "o", "merge", "forward", 1, 8, 4, "bfloat16", fault=fault)
    path = tmp_path / "run.json"
    records.write(records.Record("run", found, [row]), path)
    kept = records.read(path)
    assert kept.environment["command"] == ["mhc-tile", "--out", "caf\\udce9"]
    assert kept.environment["settings"]["MHC_TILE_TABLES"] == "caf\\udce9"
    assert kept.rows[0].fault == "OSError: no file caf\\udce9"


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A repository of one file."""

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    git("init", "-q")
    (tmp_path / "file").write_text("one\n")
    git("add", "file")
    git("commit", "-qm", "first")
    monkeypatch.setattr(environment, "ROOT", tmp_path.resolve())
    return tmp_path


def test_a_commit_says_what_differs_from_it(checkout):
    clean = environment.commit()
    assert len(clean) == 12
    changed = set()
    for content in (b"two\n", b"\xff\n"):
        (checkout / "file").write_bytes(content)
        changed.add(environment.commit())
    assert len(changed) == 2
    assert all(one.startswith(f"{clean}+") for one in changed)
    (checkout / "file").write_text("one\n")
    (checkout / "result.json").write_text("not part of it")
    assert environment.commit() == clean


def test_an_installed_package_has_no_commit_of_somebody_elses_repository(checkout, monkeypatch):
    inside = checkout / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(environment, "ROOT", inside.resolve())
    assert environment.commit() is None
    monkeypatch.setattr(environment, "ROOT", Path("/"))
    assert environment.commit() is None
