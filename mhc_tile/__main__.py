"""The command line: `mhc-tile` or `python -m mhc_tile`."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from ._version import __version__

_ABOUT = "Manifold-Constrained Hyper-Connections: demo, training, tuning, measuring."
_COMMANDS = {
    "demo": "train residual, HC and mHC on real text and compare",
    "train": "train one named model on your own text",
    "autotune": "fit the kernels to this GPU, once",
    "perf": "measure, compare, gate and report",
    "doctor": "versions, GPU, compiler, caches, and remedies",
}


def _run(argv: Sequence[str]) -> int:
    from mhc_tile.autotune._options import choose

    name = choose("mhc-tile", _ABOUT, _COMMANDS, argv, f"mhc-tile {__version__}")
    if name == "doctor":
        from . import doctor

        parser = argparse.ArgumentParser(prog="mhc-tile doctor", description=_COMMANDS[name])
        return doctor.run(parser.parse_args(argv[1:]))
    if name == "perf":
        from mhc_tile.perf import cli as perf

        return perf.main(argv[1:])
    if name == "autotune":
        from mhc_tile.autotune import cli as autotune

        return autotune.main(argv[1:])
    from .training import cli as training

    return (training.run_demo if name == "demo" else training.run_train)(argv[1:])


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
