"""The ops' C++ library: autograd and launch plans without Python. See csrc/.

The first call on a GPU loads it. Where it is not built yet for this torch, TVM FFI and sources, a
thread builds it into the user's cache folder. Until then, without a compiler, and with
MHC_TILE_CPP=0, the ops run in Python.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhc_tile.kernels.common import toolchain as _toolchain

from .. import _environment

if TYPE_CHECKING:
    from ._definition import Op

SOURCES = Path(__file__).parent / "csrc"
COTANGENT, INPUT, OUTPUT = range(3)

library: ctypes.CDLL | None = None
_lock = threading.RLock()
_builder: threading.Thread | None = None
_off = not _environment.CPP  # whether the ops stay in Python


def folder() -> Path:
    """Where libraries are kept."""
    import platformdirs

    return platformdirs.user_cache_path("mhc_tile", appauthor=False) / "native"


def path() -> Path:
    """The library's file, by what it is built of and for."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    versions = (torch.__version__, torch.version.git_version, metadata.version("apache-tvm-ffi"))
    digest.update(" ".join(map(str, versions)).encode())
    return folder() / f"ops_{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile the library, if it is not there yet.

    Raises:
        RuntimeError: There is no C++ compiler, or it fails; the message says what to do.
        OSError: The file cannot be written.
    """
    target = path()
    if target.is_file():
        return target
    compiler = _toolchain.host_compiler()
    if compiler is None:
        raise RuntimeError("a C++ compiler (g++ 11 or later, or $CXX) must be installed, got none")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        draft = Path(scratch) / target.name
        run = subprocess.run(
            [str(compiler), *_flags(), "-o", str(draft), *_libraries()],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr)
            raise RuntimeError(f"{compiler} must compile {SOURCES}, got: {said.strip()[:300]}")
        os.replace(draft, target)
    return target


def _flags() -> list[str]:
    import tvm_ffi.libinfo

    root = Path(torch.__file__).parent / "include"
    includes = [root, root / "torch" / "csrc" / "api" / "include"]
    includes += [Path(name) for name in tvm_ffi.libinfo.include_paths()]
    flags = ["-O2", "-std=c++20", "-fPIC", "-shared", "-w"]
    flags += [word for each in includes for word in ("-isystem", str(each))]
    return [*flags, *map(str, sorted(SOURCES.glob("*.cpp")))]


def _libraries() -> list[str]:
    import tvm_ffi.libinfo

    ffi = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
    folders = (Path(torch.__file__).parent / "lib", ffi)
    found = [word for each in folders for word in (f"-L{each}", f"-Wl,-rpath,{each}")]
    return [*found, "-ltorch_cpu", "-lc10", "-ltvm_ffi"]


def begin() -> None:
    """Load the library if it is built, else build it in the background.

    The thread that calls an op loads it: torch's table of kernels must not change under an op.
    """
    global _builder, _off
    if _off or library is not None or (_builder is not None and _builder.is_alive()):
        return
    with _lock:
        try:
            if path().is_file():
                load()
            elif _builder is None:
                _builder = threading.Thread(target=_build, name="mhc_tile builds", daemon=True)
                _builder.start()
            else:
                _off = True  # it has failed and said so
        except Exception as error:
            _off = True
            _warn(error)


def prepare() -> None:
    """Build and load the library now; a warning where that fails."""
    if _builder is not None:
        _builder.join()
    elif not _off:
        _build()
    begin()


def _build() -> None:
    global _off
    try:
        build()
    except Exception as error:
        _off = True
        _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f"mhc_tile: the ops run in Python, which costs host time: {error}. `mhc-tile doctor` says "
        "what is missing; with MHC_TILE_CPP=0 they always do",
        RuntimeWarning,
        stacklevel=2,
    )


def load(*, on_cpu: bool = False) -> None:
    """Build the library if need be, and let it serve the ops; with `on_cpu` their autograd alone.

    Raises:
        RuntimeError: As of `build`.
        OSError: The file cannot be written or loaded.
    """
    global library
    found = build()
    with _lock:
        if library is not None:
            return
        import tvm_ffi  # noqa: F401 - the library is linked to its own

        from ._definition import DEFINITIONS

        loaded = ctypes.CDLL(str(found))
        loaded.mhc_tile_wanted.restype = ctypes.c_bool
        loaded.mhc_tile_count.restype = ctypes.c_int64
        served = [op for op in DEFINITIONS.values() if op.kernel is not None]
        for number, op in enumerate(served):
            name = op.name.encode()
            loaded.mhc_tile_serve(name, ctypes.c_int64(number), ctypes.c_bool(on_cpu))
            loaded.mhc_tile_differentiate(name, words(formula(op)), ctypes.c_bool(on_cpu))
        library = loaded


def words(values: Sequence[int]) -> Any:
    """An array of int64 for the library."""
    return (ctypes.c_int64 * len(values))(*values)


def formula(op: "Op") -> list[int]:
    """How the backward of an op is called, as csrc/autograd.cpp reads it; [0] without a formula."""
    if not op.gradient:
        return [0]
    backward = op.backward
    cotangents = {f"grad_{name}": index for index, name in enumerate(op.results)}
    found = [len(op.tensors), len(op.results), len(op.kept), len(backward.tensors)]
    for name in backward.tensors:
        if name in cotangents:
            found += [COTANGENT, cotangents[name]]
        elif name in op.returned:
            found += [OUTPUT, op.returned.index(name)]
        else:
            found += [INPUT, op.tensors.index(name)]
    return [*found, len(backward.arguments), *_arguments(op)]


def _arguments(op: "Op") -> Iterable[int]:
    inputs = [*op.tensors, *op.arguments]
    for name in op.backward.arguments:
        if name in inputs:
            yield inputs.index(name)
        else:  # num_streams
            assert op._counted is not None
            tensor, dim = op._counted
            yield -1 - tensor * 8 + dim
