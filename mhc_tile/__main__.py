"""The command line: `mhc-tile` or `python -m mhc_tile`."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from ._version import __version__

# Commands that parse their own options.
_OWN = {
    "demo": "train residual, HC and mHC on real text and compare",
    "train": "train one named model on your own text",
    "autotune": "fit the kernels to this GPU, once",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the other subcommands; each sets `run`, a function of the parsed arguments."""
    from mhc_tile.perf import cli as perf

    from . import doctor

    parser = argparse.ArgumentParser(
        prog="mhc-tile",
        description="Manifold-Constrained Hyper-Connections: demo, training, tuning, measuring.",
    )
    parser.add_argument("--version", action="version", version=f"mhc-tile {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in _OWN.items():
        commands.add_parser(name, help=text, add_help=False)

    measuring = commands.add_parser("perf", help="measure, compare, gate and report")
    perf.add_arguments(measuring)
    measuring.set_defaults(run=perf.run)
    diagnosis = commands.add_parser("doctor", help="versions, GPU, compiler, caches, and remedies")
    diagnosis.set_defaults(run=doctor.run)
    return parser


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] == "autotune":
        from .autotune import cli as autotune

        return autotune.main(argv[1:])
    if argv and argv[0] in _OWN:
        from .training import cli

        return (cli.run_demo if argv[0] == "demo" else cli.run_train)(argv[1:])
    args = build_parser().parse_args(argv)
    return args.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, of the process's arguments if `argv` is None.

    Returns the exit code: 0, 1 for an error that was printed, 2 for wrong usage, 3 for a regression
    that `perf` found, 128 and its number after a signal: 130 after Ctrl-C.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the process began, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    try:
        from mhc_tile.autotune._extras import MissingExtraError

        from .training.progress import settle, write_line

        try:
            return _run([str(word) for word in (sys.argv[1:] if argv is None else argv)])
        except (ValueError, OSError, MissingExtraError) as error:
            write_line(sys.stderr, f"mhc-tile: {error}")
            return 1
        finally:
            settle(sys.stderr)
    except KeyboardInterrupt:  # also while it imports
        with suppress(OSError):
            sys.stderr.write("\nmhc-tile: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
