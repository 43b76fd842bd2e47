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
    try:
        return cli.run(parser.parse_args(argv))
    except (ValueError, OSError, MissingExtraError) as error:
        sys.stderr.write(f"autotune: {str(error).removeprefix('autotune: ')}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nautotune: interrupted; the same command goes on from here\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
