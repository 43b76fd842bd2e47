"""Where and with what a result is made: GPU, versions, tables, switches, commit, command."""

import datetime
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mhc_tile
from mhc_tile.autotune import lookup, table
from mhc_tile.autotune.device import describe, driver_version
from mhc_tile.ops import _dispatch

from .peers import ADAPTERS, version
from .records import escaped

ROOT = Path(__file__).resolve().parent.parent


def environment(copy_bytes_per_s: float | None, device: str = "cuda") -> dict[str, Any]:
    """Where and with what a run is made; the copy's bytes read and written are of this run."""
    index = torch.cuda.current_device() if device == "cuda" else None
    gpu = None if index is None else describe(index)
    files = () if index is None else lookup.of_device(index).files
    return {
        "gpu": gpu.name if gpu else None,
        "device": str(gpu) if gpu else f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "driver": driver_version() if gpu else None,
        "copy_bytes_per_s": copy_bytes_per_s,
        "mhc_tile": mhc_tile.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # of a class of its own
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tables": [f"{file.name} {_digest(file.read_bytes())}" for file in files],
        "settings": settings(),
        "packages": {name: version(name) for name in ("triton", "tilelang", *ADAPTERS)},
        "command": command(),
    }


def settings() -> dict[str, str | None]:
    """What this process has switched, by environment variable; None is the default."""
    return {
        "MHC_TILE_REFERENCE": "1" if _dispatch.REFERENCE_ONLY else None,
        "MHC_TILE_BATCH_INVARIANT": "1" if _dispatch.BATCH_INVARIANT else None,
        table.VARIABLE: escaped(os.environ.get(table.VARIABLE, "")) or None,
    }


def is_checkout() -> bool:
    """Whether this package is in its repository, and not installed from a wheel."""
    return (ROOT / "pyproject.toml").is_file()


def commit() -> str | None:
    """The checkout's commit; None outside of one.

    Where files differ from it, "+" and a digest of the differences follow.
    """
    try:
        if Path(os.fsdecode(_git("rev-parse", "--show-toplevel"))).resolve() != ROOT:
            return None  # an installed package within somebody else's checkout
        found, changed = _git("rev-parse", "--short=12", "HEAD"), _git("diff", "HEAD", "--binary")
    except (OSError, subprocess.SubprocessError):
        return None
    return found.decode() + (f"+{_digest(changed)}" if changed else "")


def command() -> list[str]:
    """The words that started this process, as those of `mhc-tile`."""
    program, *words = sys.argv
    module = Path(program).parts[-2:] == (Path(__file__).parent.name, "__main__.py")
    return ["mhc-tile", *["perf"] * module, *map(escaped, words)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _git(*words: str) -> bytes:
    line = ["git", "-C", str(ROOT), *words]
    return subprocess.run(line, capture_output=True, timeout=20, check=True).stdout.strip()
