"""The switches in the environment. A bad one is an error before anything else is imported."""

import sys
from pathlib import Path

from mhc_tile.autotune._switches import switch

try:
    REFERENCE_ONLY = switch("MHC_TILE_REFERENCE")
    BATCH_INVARIANT = switch("MHC_TILE_BATCH_INVARIANT")
    CPP = switch("MHC_TILE_CPP", unset=True)
except ValueError as error:
    # the package is imported before `__main__` can catch anything
    if Path(sys.argv[0]).stem not in ("mhc-tile", "-m"):
        raise
    sys.stderr.write(f"mhc-tile: {error}\n")
    raise SystemExit(2) from None
