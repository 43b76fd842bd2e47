"""The options of a command, from a table of their types and descriptions."""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ._extras import MissingExtraError, require

Options = dict[str, tuple[Any, str]]
"""Name -> type and description, for instance `{"batch_size": (int, "sequences per step")}`."""


def flag(name: str) -> str:
    """The option as it is written, for instance "--batch-size"."""
    return "--" + name.replace("_", "-")


def run(
    name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None, hint: str = ""
) -> int:
    """Run a command of `python -m`, of the process's arguments if `argv` is None.

    Returns the exit code: of the command, 1 for an error that was printed, or 130 after Ctrl-C,
    where `hint` ends the message.
    """
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, MissingExtraError) as error:
        said = str(error)
        sys.stderr.write(f"{said}\n" if said.startswith(name) else f"{name}: {said}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{name}: interrupted{hint}\n")
        return 130


def choose(
    prog: str, about: str, commands: Mapping[str, str], argv: Sequence[str], version: str = ""
) -> str:
    """The one of some commands that the first word names; their descriptions are the help.

    Raises:
        SystemExit: It names none, with code 2; or help or version were printed, with code 0.
    """
    parser = argparse.ArgumentParser(prog=prog, description=about)
    if version:
        parser.add_argument("--version", action="version", version=version)
    chosen = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    for name, text in commands.items():
        chosen.add_parser(name, help=text, add_help=False)
    return str(parser.parse_args(argv[:1]).command)


def parse(
    prog: str,
    about: str,
    options: Options,
    argv: Sequence[str],
    extra: str,
    positional: Collection[str] = (),
) -> dict[str, Any]:
    """The options that are in the command line, by name, and no others.

    Args:
        prog: the command, for its help.
        about: one sentence for its help.
        options: all options; a `Path` may begin with a home folder.
        argv: the words after the command.
        extra: brings the parser, tyro.
        positional: options that are written without their names.

    Raises:
        SystemExit: An option is unknown or has no value of its type, with code 2; or its help was
            printed, with code 0.
        ValueError: A text is empty, a list has no value, or a path names no home folder.
        MissingExtraError: tyro is not installed.
    """
    command = prog.removeprefix("python -m mhc_tile.").removeprefix("mhc-tile ")
    tyro = require("tyro", command, extra)
    types: dict[str, Any] = {}
    for name, (kind, text) in options.items():
        shown = {"metavar": "PATH"} if kind is Path else {}
        if name in positional:
            shown = {"metavar": name.upper()}
        setting = tyro.conf.arg(help=text, help_behavior_hint="", **shown)
        types[name] = Annotated[str if kind is Path else kind, setting]
        if name in positional:
            types[name] = tyro.conf.Positional[types[name]]
    given = TypedDict("given", types, total=False)  # type: ignore[misc]
    found = dict(tyro.cli(given, prog=prog, description=about, args=list(argv)))
    for name, value in found.items():
        what = f"{command}: {name if name in positional else flag(name)}"
        if value == ():
            raise ValueError(f"{what} must have a value, got none")
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not text.strip():  # a variable of a shell that is not set
                raise ValueError(f"{what} must not be empty, got {text!r}")
        if options[name][0] is Path:  # a shell leaves the tilde of `--out=~/x`
            try:
                found[name] = Path(value).expanduser()
            except RuntimeError as error:
                raise ValueError(f"{what} must name a home folder, got {value!r}") from error
    return found
