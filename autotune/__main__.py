"""`python -m mhc_tile.autotune`, the same as `mhc-tile autotune`."""

import argparse
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
    parser = argparse.ArgumentParser(
        prog="python -m mhc_tile.autotune", description="Fit the kernels to this GPU."
    )
    cli.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return cli.run(args)
    except (ValueError, OSError, MissingExtraError) as error:
        sys.stderr.write(f"autotune: {str(error).removeprefix('autotune: ')}\n")
        return 1
    except KeyboardInterrupt:
        same = "the same command without --force" if args.force else "the same command"
        sys.stderr.write(f"\nautotune: interrupted; {same} goes on from here\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
