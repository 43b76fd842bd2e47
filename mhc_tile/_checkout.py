"""Lets an uninstalled checkout find `mhc_tile.kernels`, `mhc_tile.autotune` and `mhc_tile.perf`.

In the repository these three packages are the folders `kernels/`, `autotune/` and `perf/` beside
`mhc_tile/`. An installed wheel has them inside `mhc_tile/`; there this module adds nothing.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_BESIDE = {"mhc_tile.kernels", "mhc_tile.autotune", "mhc_tile.perf"}


class _BesidePackage:
    @staticmethod
    def find_spec(name, path=None, target=None):
        """Look for one of the three packages in the repository's root."""
        if name not in _BESIDE:
            return None
        return PathFinder.find_spec(name, [str(_ROOT)])


_installed = (_ROOT / "mhc_tile" / "kernels").is_dir()
if not _installed and (_ROOT / "kernels").is_dir() and (_ROOT / "pyproject.toml").is_file():
    sys.meta_path.append(_BesidePackage)
