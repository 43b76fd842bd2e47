"""What nobody can mean on a command line: empty texts of unset variables, impossible values."""

import argparse
import importlib
import os
import sys
from pathlib import Path

import pytest

from mhc_tile.__main__ import build_parser, main
from mhc_tile.autotune import _arguments

COMMANDS = {
    ("perf", "run"): [],
    ("perf", "overhead"): [],
    ("perf", "compare"): ["a", "b"],
    ("perf", "gate"): [],
    ("perf", "report"): ["a"],
}


def parser_of(*words: str) -> argparse.ArgumentParser:
    parser = build_parser()
    for word in words:
        (sub,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = sub.choices[word]
    return parser


def options(*words: str) -> list[argparse.Action]:
    return [a for a in parser_of(*words)._actions if a.nargs != 0]


VALUES = [
    (words, action.option_strings[0])
    for words in COMMANDS
    for action in options(*words)
    if action.option_strings
]


@pytest.mark.parametrize(("words", "option"), VALUES)
def test_no_option_takes_an_empty_text(words, option, capsys):
    for empty in ("", " "):
        with pytest.raises(SystemExit) as end:
            main([*words, *COMMANDS[words], option, empty])
        assert end.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert option in last
        assert repr(empty) in last


@pytest.mark.parametrize("words", [words for words, rest in COMMANDS.items() if "a" in rest])
def test_no_argument_is_an_empty_text(words, capsys):
    count = len(COMMANDS[words])
    for at in range(count):
        given = ["x"] * count
        given[at] = ""
        with pytest.raises(SystemExit) as end:
            main([*words, *given])
        assert end.value.code == 2
        assert "must not be empty, got ''" in capsys.readouterr().err


def test_every_file_and_folder_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = 0
    for words, rest in COMMANDS.items():
        for action in options(*words):
            if action.type not in (_arguments.path, _arguments.output):
                assert action.type is not Path
                continue
            assert str(action.type("~/x")) == str(tmp_path / "x")
            found += 1
            if action.option_strings:
                option = action.option_strings[0]
                args = build_parser().parse_args([*words, *rest, f"{option}=~/x"])
                assert str(getattr(args, action.dest)) == str(tmp_path / "x")
    assert found == 17


def test_a_home_of_nobody_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        main(["perf", "report", "~no-such-user-here/x"])
    assert end.value.code == 2
    assert "must name a home folder, got '~no-such-user-here/x'" in capsys.readouterr().err


def test_a_dash_is_the_terminal():
    assert _arguments.output("-") == "-"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "nan", ""])
def test_counts_are_whole_numbers(text):
    assert _arguments.count("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 on, got '{text}'"):
        _arguments.count(text)


def test_a_folder_that_the_environment_names_is_made_or_named(tmp_path):
    _arguments.check_folder("a command", tmp_path / "new" / "one", "the cache", "WHERE")
    assert os.listdir(tmp_path / "new" / "one") == []
    (tmp_path / "file").touch()
    said = "a command: the cache must be where files can be written, got .*file/x .*WHERE names"
    with pytest.raises(OSError, match=said):
        _arguments.check_folder("a command", tmp_path / "file" / "x", "the cache", "WHERE")


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
