"""Switches in the environment: what means yes, what means no, and what is refused by name."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_tile.autotune import table
from mhc_tile.autotune._switches import NO, YES, switch
from test_layout import modules

NAME = "MHC_TILE_REFERENCE"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("word", [*YES, "TRUE", "Yes", " on "])
def test_words_for_yes(monkeypatch, word):
    monkeypatch.setenv(NAME, word)
    assert switch(NAME) is True


@pytest.mark.parametrize("word", [*NO, "FALSE", "No", "Off", "  "])
def test_words_for_no(monkeypatch, word):
    monkeypatch.setenv(NAME, word)
    assert switch(NAME) is False
    monkeypatch.delenv(NAME)
    assert switch(NAME) is False


@pytest.mark.parametrize("word", ["2", "maybe", "ture", "-1", "0.0", "none"])
def test_other_words_are_refused(monkeypatch, word):
    monkeypatch.setenv(NAME, word)
    with pytest.raises(ValueError, match=re.escape(f"{NAME} must be one of 1, true, yes, on or")):
        switch(NAME)
    with pytest.raises(ValueError, match=re.escape(f"got {word!r}")):
        switch(NAME)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, found = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=found, cwd=ROOT)


def test_the_package_reads_its_switches_when_it_is_imported():
    code = "from mhc_tile.ops import _dispatch as d; print(d.REFERENCE_ONLY, d.BATCH_INVARIANT)"
    found = python("-c", code, MHC_TILE_REFERENCE="off", MHC_TILE_BATCH_INVARIANT="True")
    assert found.stdout.split() == ["False", "True"], found.stderr


AGAIN = """
import os, sys
try:
    import mhc_tile
except ValueError as error:
    print(error)
print([name for name in sys.modules if name.startswith("mhc_tile")])
del os.environ["MHC_TILE_BATCH_INVARIANT"]
import mhc_tile
print(mhc_tile.ops._dispatch.BATCH_INVARIANT)
"""


def test_a_bad_switch_imports_nothing_and_the_next_import_works():
    said, names, again = python("-c", AGAIN, MHC_TILE_BATCH_INVARIANT="perhaps").stdout.splitlines()
    assert said.startswith("MHC_TILE_BATCH_INVARIANT must be one of 1, true,")
    assert said.endswith("got 'perhaps'")
    finders = {"mhc_tile._checkout", "mhc_tile.autotune", "mhc_tile.autotune._switches"}
    assert set(ast.literal_eval(names)) <= finders
    assert again == "False"


@pytest.mark.parametrize("start", [("-m", "mhc_tile"), ("mhc-tile",)])
def test_a_command_says_a_bad_switch_in_one_line(tmp_path, start):
    script = tmp_path / "mhc-tile"
    script.write_text("from mhc_tile.__main__ import main\n")
    words = start if len(start) == 2 else (str(script),)
    found = python(*words, "--version", MHC_TILE_REFERENCE="ture", PYTHONPATH=str(ROOT))
    assert (found.returncode, found.stdout) == (2, "")
    assert re.fullmatch(r"mhc-tile: MHC_TILE_REFERENCE must be .*, got 'ture'\n", found.stderr)


def test_there_is_no_other_way_to_read_a_switch():
    """A variable of ours is a switch, or names a place."""
    places = {"MHC_TILE_TABLES", "MHC_TILE_STATIC_CACHE"}
    for path in modules().values():
        for read in re.findall(r'(?:get\(|\[|getenv\()"(MHC_TILE_\w+)', path.read_text()):
            assert read in places, path


@pytest.mark.parametrize("word", ["off", "OFF", "0", "false", "No", " off "])
def test_tables_are_switched_off_by_any_word_for_no(monkeypatch, word):
    monkeypatch.setenv(table.VARIABLE, word)
    assert table.is_off()
    assert table.misnamed() == ""


@pytest.mark.parametrize("word", ["", " "])
def test_an_empty_name_of_tables_is_none(monkeypatch, word):
    from tables import DEVICE

    monkeypatch.setenv(table.VARIABLE, word)
    assert not table.is_off()
    assert table.misnamed() == ""
    assert table.sources(DEVICE)[0].parent == table.user_folder()


def test_names_of_tables_that_cannot_be_read_raise_nothing(monkeypatch, tmp_path):
    from tables import DEVICE

    folder = tmp_path / "tables.json"  # a folder all the same
    folder.mkdir()
    monkeypatch.setenv(table.VARIABLE, str(folder))
    assert table.sources(DEVICE)[0] == folder / f"{DEVICE.slug}.json"
    for name in ("~no-such-user-here/x", "x" * 5000, "a/" * 3000):
        monkeypatch.setenv(table.VARIABLE, name)
        assert f"got {name}: nothing that may be read is there" in table.misnamed()
        assert isinstance(table.sources(DEVICE)[0], Path)
