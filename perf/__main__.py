"""`python -m mhc_tile.perf`, the same as `mhc-tile perf`."""

import argparse
import sys
from collections.abc import Sequence

from mhc_tile.autotune._extras import MissingExtraError

from . import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 for an error that was printed, 2 for wrong usage, 3 for a regression,
        130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mhc_tile.perf", description="Measure, compare, judge and report."
    )
    cli.add_arguments(parser)
    try:
        return cli.run(parser.parse_args(argv))
    except (ValueError, OSError, MissingExtraError) as error:
        sys.stderr.write(f"perf: {str(error).removeprefix('perf: ')}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nperf: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
