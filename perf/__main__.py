"""`python -m mhc_tile.perf`, the same as `mhc-tile perf`."""

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
    try:
        return cli.main(sys.argv[1:] if argv is None else argv, "python -m mhc_tile.perf")
    except (ValueError, OSError, MissingExtraError) as error:
        said = str(error).removeprefix("perf: ")
        sys.stderr.write(f"{said}\n" if said.startswith("perf ") else f"perf: {said}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nperf: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
