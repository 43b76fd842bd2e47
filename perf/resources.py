"""Deprecated: `python -m mhc_tile.perf.resources` is `mhc-tile perf gate --static`."""

import sys
import warnings
from collections.abc import Sequence

from .__main__ import main as perf


def main(argv: Sequence[str] | None = None) -> int:
    """Run the static gate with its options --arch, --fresh and --write."""
    warnings.warn(
        "mhc_tile.perf.resources is deprecated: use `mhc-tile perf gate --static`",
        DeprecationWarning,
        stacklevel=2,
    )
    return perf(["gate", "--static", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
