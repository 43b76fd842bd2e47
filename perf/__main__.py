"""`python -m mhc_tile.perf`, the same as `mhc-tile perf`."""

import sys
from collections.abc import Sequence

from mhc_tile.autotune import _options

from . import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit codes are those of `mhc-tile perf`."""
    return _options.run("perf", lambda words: cli.main(words, "python -m mhc_tile.perf"), argv)


if __name__ == "__main__":
    sys.exit(main())
