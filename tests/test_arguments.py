"""What nobody can mean on a command line: empty texts of unset variables, impossible values."""

import argparse
import importlib
import os
import sys

import pytest

from mhc_tile.__main__ import main
from mhc_tile.autotune import _arguments


@pytest.mark.parametrize("words", [[], ["nothing"], ["perf"], ["perf", "nothing"], ["doctor", "x"]])
def test_a_command_that_there_is_not_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage: mhc-tile" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "nan", ""])
def test_counts_are_whole_numbers(text):
    assert _arguments.count("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 on, got '{text}'"):
        _arguments.count(text)


def test_a_folder_that_the_environment_names_is_made_or_named(tmp_path):
    _arguments.check_folder("a command: the cache", tmp_path / "new" / "one", variable="WHERE")
    assert os.listdir(tmp_path / "new" / "one") == []
    (tmp_path / "file").touch()
    said = "a command: the cache must be where files can be written, got .*file/x .*WHERE names"
    with pytest.raises(OSError, match=said):
        _arguments.check_folder("a command: the cache", tmp_path / "file" / "x", variable="WHERE")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_shows_nothing_and_fails_nothing(closed, monkeypatch, tmp_path):
    with monkeypatch.context() as context:
        context.setattr(sys, closed, None)
        assert main(["doctor"]) in (0, 1)
        assert main(["perf", "report", str(tmp_path / "none")]) == 1


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("monitor_cost", ["--device", "mps"], "--device: invalid choice: 'mps'"),
        ("monitor_cost", ["--tokens", "0", "1"], "--tokens: must be a whole number from 1 on"),
        ("host_time", ["--calls", "0"], "--calls: must be a whole number from 1 on, got '0'"),
        ("host_time", [], "must see a CUDA device, got none"),
    ],
)
def test_modules_that_measure_name_what_does_not_fit(module, arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"mhc_tile.perf.{module}").main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


# Whatever is wrong with a file or a number is one line and exit code 2.
WRONG = {
    "none": None,
    "folder": None,
    "empty": b"",
    "text": b"{",
    "list": b"[]",
    "binary": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "digits": b"1" * 5000,
    "schema": b'{"schema": 1}',
    "kind": b'{"schema": 1, "kind": []}',
    "rows": b'{"schema": 1, "kind": "run", "environment": {}, "rows": [{"case": 1}]}',
    "tables": b'{"schema": 1, "kind": "run", "environment": {"tables": 7}, "rows": []}',
    "left_out": b'{"schema": 1, "kind": "run", "environment": {"left_out": 7}, "rows": []}',
}


@pytest.mark.parametrize("command", [("compare", "{0}", "{0}"), ("report", "{0}")])
@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_result_is_one_line(command, name, tmp_path, capsys):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif WRONG[name] is not None:
        path.write_bytes(WRONG[name])
    assert main(["perf", *(word.format(path) for word in command)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said
