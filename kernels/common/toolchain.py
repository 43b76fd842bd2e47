"""What compiling a kernel takes: the target of a GPU, TileLang, nvcc, g++ and the kernel cache.

Nothing here imports TileLang, so `mhc-tile doctor` can say what is missing.
"""

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

# The compute capabilities that kernels are written for, oldest first.
MINIMUM_CAPABILITY = (8, 0)
STREAMS = (1, 2, 4, 8)  # the n that kernels are written and checked for
# Launches keep 32 bits of a size and drop the others without an error. Blocks round tokens up, and
# prefetched tokens lie some iterations further.
MOST_TOKENS = 2**31 - 2**16
REQUIRED_TILELANG = "0.1.15"


def target(capability: tuple[int, int]) -> dict[str, str]:
    """The TileLang target of a compute capability; RuntimeError if the GPU is too old.

    From 9.0 on it names the architecture's own feature set (`sm_90a`), which register reallocation
    needs. A named target, unlike a detected one, lets kernels be compiled ahead on another machine
    and found in the cache.

    Example:
        >>> target((9, 0))
        {'kind': 'cuda', 'arch': 'sm_90a'}
        >>> target((8, 6))
        {'kind': 'cuda', 'arch': 'sm_86'}
    """
    major, minor = capability
    if (major, minor) < MINIMUM_CAPABILITY:
        raise RuntimeError(
            f"kernels: the GPU must have compute capability 8.0 or later, got {major}.{minor}; "
            "the ops fall back to the PyTorch reference there"
        )
    return {"kind": "cuda", "arch": f"sm_{major}{minor}{'a' if major >= 9 else ''}"}


def tilelang_version() -> str | None:
    """The installed TileLang's version, without importing it; None if it is not installed."""
    try:
        return metadata.version("tilelang")
    except metadata.PackageNotFoundError:
        return None


def nvcc() -> Path | None:
    """The CUDA compiler that TileLang would use: $CUDA_HOME, then PATH, then the nvcc wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        return Path(found)
    try:
        files = metadata.files("nvidia-cuda-nvcc") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == "nvcc"), None)


def nvcc_version(compiler: Path) -> str | None:
    """The version that `nvcc --version` names, such as "13.0.88"; None if it does not run."""
    try:
        result = subprocess.run(
            [str(compiler), "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release [\d.]+, V([\d.]+)", result.stdout)
    return match and match[1]


def host_compiler() -> Path | None:
    """The C++ compiler of the host stubs: $CXX, then g++ or c++ on PATH."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return Path(found)
    return None


def kernel_cache() -> Path:
    """Where TileLang keeps compiled kernels: $TILELANG_CACHE_DIR, else ~/.tilelang/cache."""
    return Path(os.environ.get("TILELANG_CACHE_DIR", Path.home() / ".tilelang" / "cache"))
