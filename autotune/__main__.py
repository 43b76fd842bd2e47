"""`python -m mhc_tile.autotune`, the same as `mhc-tile autotune`."""

import sys
from collections.abc import Sequence

from . import cli
from ._extras import MissingExtraError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 for an error that was printed, 2 for wrong usage, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        return cli.main(words, "python -m mhc_tile.autotune")
    except (ValueError, OSError, MissingExtraError) as error:
        sys.stderr.write(f"autotune: {str(error).removeprefix('autotune: ')}\n")
        return 1
    except KeyboardInterrupt:
        same = "the same command without --force" if "--force" in words else "the same command"
        sys.stderr.write(f"\nautotune: interrupted; {same} goes on from here\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
