"""CUDA source to a library that runs on the CPU: translate, compile, keep.

The library is g++'s, made of the kernel's source with tests/simt in place of TileLang's templates.
It is kept under a hash of everything that goes into it, in $MHC_TILE_EMULATOR_CACHE or the user's
cache folder; it appears there by an atomic rename, so any number of processes may build at once.
"""

import functools
import hashlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mhc_tile.kernels.common import toolchain as _toolchain
from mhc_tile.kernels.common.lowering import DeviceFunction, Lowered

SIMT = Path(__file__).resolve().parent / "simt"
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fno-exceptions", "-U_FORTIFY_SOURCE")
RUNTIME_FLAGS = (*COMMON_FLAGS, "-O2", "-Wall")
# Generated code reads the bytes of one type as another, hence no strict aliasing.
KERNEL_FLAGS = (*COMMON_FLAGS, "-O1", "-g1", "-gdwarf-4", "-w", "-fno-strict-aliasing")
# The compiler calls hooks.cpp at each load and store, at each misaligned address and bad index.
HOOK_FLAGS = (
    "-fsanitize=thread,alignment,bounds",
    "-fsanitize-recover=alignment,bounds",
    "--param=tsan-instrument-func-entry-exit=0",
)

# What the emulator lacks: how it shows in the source, its name, and how to do without it.
_PORTABLE = 'lower for "sm_80"'
_NO_TMA = f'{_PORTABLE}, or pass {{"tl.disable_tma_lower": True}}'
_NO_WGMMA = f'{_PORTABLE}, or pass {{"tl.disable_wgmma": True}}'
_NO_ROLES = f'{_PORTABLE}, or pass {{"tl.disable_warp_specialized": True}}'
UNSUPPORTED = (
    (r"CUtensorMap|\btma_(load|store)\w*|cp\.async\.bulk", "TMA copies", _NO_TMA),
    (r"\bw?gmma_\w+|\bwarpgroup_(arrive|wait)\b|GmmaDescriptor", "wgmma", _NO_WGMMA),
    (r"\btcgen05\w*|\btcgen5\w*", "tcgen05 (tensor memory)", _PORTABLE),
    (r"\bwarpgroup_reg_(de)?alloc\b", "warp specialisation (setmaxnreg)", _NO_ROLES),
    (r"\bmbarrier\w*|\bBarrier\s|_mbarrier|tl_shuffle_elect", "mbarriers", _NO_ROLES),
    (r"\bcluster_\w+|block_rank_in_cluster|cluster_dims", "clusters", f"{_PORTABLE} without them"),
    (r"\bfp8_\w+|float_e[45]m[23]_t|fp4_\w+", "fp8 and fp4", "use bf16, fp16 or fp32"),
    (r"\bCumSum[12]D|\bCumMax[12]D|InclusiveScan", "scans", "write the scan with shuffles"),
    (r"\basm\s+volatile|__asm__", "inline PTX", "use TileLang's own operations"),
    (r"\bdebug_print\w*", "T.print", "return the value as a tensor"),
)


_KERNEL = re.compile(r'extern "C" __global__ void (__launch_bounds__.*\{)$')
_ALIGNMENT = r"(?:__align__\(\d+\) )?"
_DYNAMIC_SHARED = re.compile(rf"\s*extern __shared__ {_ALIGNMENT}(\w+) (\w+)\[\];")
_STATIC_SHARED = re.compile(rf"\s*__shared__ {_ALIGNMENT}([\w:]+) (\w+)((?:\[\d+\])+);")
_LOCAL_ARRAY = re.compile(r"\s+([\w:]+ \w+\[\d+\];)$")


class EmulationError(AssertionError):
    """A kernel did what a kernel must not do, or what the emulator cannot run."""


def available() -> str | None:
    """None, or why nothing can be built here."""
    if _toolchain.host_compiler() is None:
        return "no C++ compiler; install g++"
    if _toolchain.tilelang_version() is None:
        return "TileLang is not installed; pip install -e '.[dev]'"
    return None


def cache_folder() -> Path:
    """$MHC_TILE_EMULATOR_CACHE, else mhc_tile/emulator in the user's cache folder."""
    if chosen := os.environ.get("MHC_TILE_EMULATOR_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mhc_tile" / "emulator"


def build(lowered: Lowered, instrument: bool) -> Path:
    """The library with an entry per kernel of `lowered`; from the cache if it is there."""
    source = translate(lowered)
    flags = KERNEL_FLAGS + (HOOK_FLAGS if instrument else ())
    runtime = _runtime()

    def compile_kernel(folder: Path) -> Path:
        (folder / "kernel.cpp").write_text(source)
        compile_only = [_compiler(), *flags, f"-I{SIMT}", "-c", folder / "kernel.cpp"]
        _run([*compile_only, "-o", folder / "kernel.o"])
        # Linked without -fsanitize: hooks.cpp stands in for the sanitizers' libraries.
        objects = [folder / "kernel.o", runtime]
        _run([_compiler(), "-shared", *objects, "-ldl", "-o", folder / "kernel.so"])
        return folder / "kernel.so"

    parts = [source, *flags, str(runtime), _compiler_version()]
    return _kept("kernel", ".so", parts, compile_kernel)


def translate(lowered: Lowered) -> str:
    """The kernel's CUDA source as C++: the same lines, with simt.h before and entries after."""
    check_supported(lowered.source)
    arrays = itertools.count()
    lines = [_translate_line(line, arrays) for line in lowered.source.split("\n")]
    entries = [_entry(function, lowered.source) for function in lowered.functions]
    return "\n".join(['#include "simt.h"', '#line 1 "kernel.cu"', *lines, *entries, ""])


def _translate_line(line: str, arrays: Iterator[int]) -> str:
    if line.startswith("#include"):
        return ""
    if match := _KERNEL.match(line):
        # Indices as constants of the function: its threads need no look-up, and no hook.
        return f'extern "C" __global__ void {match[1]} SIMT_THREAD_CONSTANTS {{'
    if line == "}":
        return "}}"
    if match := _DYNAMIC_SHARED.match(line):
        return f"{match[1]}* {match[2]} = ({match[1]}*)simt::dynamic_shared();"
    if match := _STATIC_SHARED.match(line):
        number = next(arrays)
        kind = f"simt_array_{number}"
        return (
            f"using {kind} = {match[1]}{match[3]}; "
            f"auto& {match[2]} = *({kind}*)simt::static_shared({number}, sizeof({kind}));"
        )
    if match := _LOCAL_ARRAY.match(line):
        # On the GPU these are registers; here vector accesses need their alignment.
        return f"alignas(32) {match[1]}"
    return line


def check_supported(source: str) -> None:
    """Raise an EmulationError that names the first construct which cannot be emulated."""
    for pattern, construct, remedy in UNSUPPORTED:
        if match := re.search(pattern, source):
            number = source.count("\n", 0, match.start()) + 1
            line = source.split("\n")[number - 1].strip()
            raise EmulationError(
                f"emulate: the kernel uses {construct}, which the emulator does not have; {remedy}"
                f"\n  line {number}: {line[:160]}"
            )


def parameter_types(function: DeviceFunction, source: str) -> list[str]:
    """The C types of a kernel's parameters, from its declaration."""
    match = re.search(rf"\b{function.name}\(([^)]*)\);", source)
    if match is None:
        raise EmulationError(f"emulate: {function.name} must be declared in the source")
    parameters = [p.strip() for p in match[1].split(",")] if match[1].strip() else []
    return [p.rsplit(" ", 1)[0].replace("__restrict__", "").strip() for p in parameters]


def entry_name(function: DeviceFunction) -> str:
    """The C symbol that unpacks an array of arguments and calls the kernel."""
    return f"simt_entry_{function.name}"


def _entry(function: DeviceFunction, source: str) -> str:
    types = parameter_types(function, source)
    arguments = ", ".join(f"*({kind}*)arguments[{i}]" for i, kind in enumerate(types))
    return (
        f'extern "C" SIMT_RAW void {entry_name(function)}(void** arguments) '
        f"{{ {function.name}({arguments}); }}"
    )


@functools.cache
def _compiler() -> str:
    compiler = _toolchain.host_compiler()
    if compiler is None:
        raise RuntimeError("emulate: needs a C++ compiler; install g++")
    return str(compiler)


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout


@functools.cache
def _runtime() -> Path:
    """The emulator itself as an archive of objects, built once per version of tests/simt."""
    files = sorted(SIMT.glob("*.h")) + sorted(SIMT.glob("*.cpp"))
    parts = [path.read_text() for path in files]

    def compile_runtime(folder: Path) -> Path:
        sources = [path for path in files if path.suffix == ".cpp"]
        for path in sources:
            _run([_compiler(), *RUNTIME_FLAGS, "-c", path, "-o", folder / f"{path.stem}.o"])
        objects = [folder / f"{path.stem}.o" for path in sources]
        _run([_compiler(), "-r", "-nostdlib", *objects, "-o", folder / "simt.o"])
        return folder / "simt.o"

    return _kept("simt", ".o", [*parts, *RUNTIME_FLAGS, _compiler_version()], compile_runtime)


def _run(command: list) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise EmulationError(_explain(result.stderr))


def _explain(output: str) -> str:
    """The first of g++'s errors, with what it says about them."""
    lines = output.splitlines()
    errors = [line for line in lines if "error:" in line or "undefined reference" in line]
    unknown = [m[1] for line in errors if (m := re.search(r"(\w+)\W (?:is not|was not)", line))]
    hint = f"; the emulator may lack {', '.join(dict.fromkeys(unknown[:3]))}" if unknown else ""
    shown = "\n  ".join(line[:300] for line in (errors or lines)[:6])
    return f"emulate: the C++ compiler rejects the kernel{hint}\n  {shown}"


def _kept(kind: str, suffix: str, parts: list[str], make: Callable[[Path], Path]) -> Path:
    """The file of these parts in the cache, made in a folder of its own and moved there if new."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = cache_folder() / f"{kind}_{digest}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.replace(make(Path(folder)), path)
    return path
