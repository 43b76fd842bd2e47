"""Switches in the environment: what means yes, what means no, and what is refused by name."""

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


def imported(**environment: str) -> subprocess.CompletedProcess[str]:
    code = "from mhc_tile.ops import _dispatch as d; print(d.REFERENCE_ONLY, d.BATCH_INVARIANT)"
    command = [sys.executable, "-c", code]
    found = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=found)


def test_the_package_reads_its_switches_when_it_is_imported():
    found = imported(MHC_TILE_REFERENCE="off", MHC_TILE_BATCH_INVARIANT="True")
    assert found.stdout.split() == ["False", "True"], found.stderr
    found = imported(MHC_TILE_BATCH_INVARIANT="perhaps")
    assert found.returncode
    said = found.stderr.splitlines()[-1]
    assert said.startswith("ValueError: MHC_TILE_BATCH_INVARIANT must be one of 1, true,")
    assert said.endswith("got 'perhaps'")


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
    from test_table import DEVICE

    monkeypatch.setenv(table.VARIABLE, word)
    assert not table.is_off()
    assert table.misnamed() == ""
    assert table.sources(DEVICE)[0].parent == table.user_folder()


def test_names_of_tables_that_cannot_be_read_raise_nothing(monkeypatch, tmp_path):
    from test_table import DEVICE

    folder = tmp_path / "tables.json"  # a folder all the same
    folder.mkdir()
    monkeypatch.setenv(table.VARIABLE, str(folder))
    assert table.sources(DEVICE)[0] == folder / f"{DEVICE.slug}.json"
    for name in ("~no-such-user-here/x", "x" * 5000, "a/" * 3000):
        monkeypatch.setenv(table.VARIABLE, name)
        assert f"got {name}: nothing that may be read is there" in table.misnamed()
        assert isinstance(table.sources(DEVICE)[0], Path)
