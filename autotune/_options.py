"""The options of a command, from a table of their types and descriptions."""

from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

from ._extras import require

Options = dict[str, tuple[Any, str]]
"""Name -> type and description, for instance `{"batch_size": (int, "sequences per step")}`."""


def flag(name: str) -> str:
    """The option as it is written, for instance "--batch-size"."""
    return "--" + name.replace("_", "-")


def parse(
    prog: str, about: str, options: Options, argv: Sequence[str], extra: str
) -> dict[str, Any]:
    """The options that are in the command line, by name, and no others.

    Args:
        prog: the command, for its help.
        about: one sentence for its help.
        options: all that there are.
        argv: the words after the command.
        extra: brings the parser, tyro.

    Raises:
        SystemExit: An option is unknown or has no value of its type, with code 2; or its help was
            printed, with code 0.
        MissingExtraError: tyro is not installed.
    """
    tyro = require("tyro", prog.rpartition(" ")[2], extra)
    types: dict[str, Any] = {
        name: Annotated[kind, tyro.conf.arg(help=text, help_behavior_hint="")]
        for name, (kind, text) in options.items()
    }
    given = TypedDict("given", types, total=False)  # type: ignore[misc]
    return dict(tyro.cli(given, prog=prog, description=about, args=list(argv)))
