"""`python -m mhc_tile.autotune`, the same as `mhc-tile autotune`."""

import sys
from collections.abc import Sequence

from . import _options, cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit codes are those of `mhc-tile autotune`."""
    hint = "; the same command without --force goes on from here"
    return _options.run(
        "autotune", lambda words: cli.main(words, "python -m mhc_tile.autotune"), argv, hint
    )


if __name__ == "__main__":
    sys.exit(main())
