"""What a kernel will need on a GPU, read without one: registers, spills, stack, shared memory.

nvcc compiles the program's CUDA source to a cubin for the named architecture and ptxas says what it
took. Dynamic shared memory is no part of a cubin: it comes from the program's launch. Results are
kept in $MHC_TILE_STATIC_CACHE, if that is set, under a hash of the source and the compiler.
"""

import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import toolchain as _toolchain
from .architectures import REGISTERS, SYSTEM_SHARED_BYTES, architecture_of
from .files import write
from .lowering import Lowered, lower

FLAGS = "tl.device_compile_flags"  # the pass configuration that holds a program's nvcc options
_REPORTED = {  # by ptxas, if it is not 0
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "stack": r"(\d+) bytes stack frame",
    "static_smem": r"(\d+) bytes smem",
}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, per thread (registers, spills, stack) or per block (the rest).

    Byte counts, except registers and threads. Under warp specialisation ptxas reports the registers
    that setmaxnreg grants, not what the code needs.
    """

    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_smem: int
    dynamic_smem: int
    threads: int

    def faults(self, arch: str) -> list[str]:
        """Why this must not ship: what spills, and what cannot be launched."""
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills {self.spill_stores} bytes to local memory")
        if self.threads > 1024:
            found.append(f"has {self.threads} threads a block, of at most 1024")
        granted = -(-self.registers // 8) * 8 * (-(-self.threads // 32) * 32)
        if granted > REGISTERS:
            found.append(f"needs {granted} registers a block, of {REGISTERS}")
        limit = architecture_of(arch).shared_bytes
        if (shared := self.dynamic_smem + self.static_smem) > limit:
            found.append(f"needs {shared} bytes of shared memory, of {limit} on {arch}")
        return found

    def occupancy(self, arch: str) -> float:
        """Share of a multiprocessor's threads that run at once, from 0 to 1.

        Example:
            >>> Resources("merge", 96, 0, 0, 0, 0, 0, 160).occupancy("sm_90a")
            0.3125
        """
        limits = architecture_of(arch)
        warps = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256 * warps  # a warp's are granted by 256
        shared = self.dynamic_smem + self.static_smem + SYSTEM_SHARED_BYTES
        resident = min(
            limits.threads // (warps * 32),
            limits.blocks,
            (limits.shared_bytes + SYSTEM_SHARED_BYTES) // shared,
            REGISTERS // max(registers, 1),
        )
        return resident * warps * 32 / limits.threads


def available() -> str | None:
    """None, or why nothing can be compiled here and what to do."""
    if _toolchain.tilelang_version() is None:
        return f"TileLang is not installed; pip install tilelang=={_toolchain.REQUIRED_TILELANG}"
    if _toolchain.nvcc() is None:
        return "nvcc is not installed; pip install 'mhc-tile[nvcc]'"
    return None


def resources(
    prim_func: Any, arch: str, pass_configs: dict[str, Any] | None = None
) -> tuple[Resources, ...]:
    """Compile a `@T.prim_func` and read what its kernels take, in the order of their launches.

    RuntimeError where there is no nvcc, or it rejects the source.
    """
    return compiled(lower(prim_func, arch, pass_configs), arch, pass_configs)


def compiled(
    lowered: Lowered, arch: str, pass_configs: dict[str, Any] | None = None
) -> tuple[Resources, ...]:
    """As `resources`, of what `lower` made of a program for the same `arch` and `pass_configs`."""
    report = _report(lowered, arch, tuple((pass_configs or {}).get(FLAGS, ())))
    return parse(report, lowered, arch)


def program_digest(prim_func: Any, arch: str, pass_configs: dict[str, Any] | None = None) -> str:
    """A hash of all that `lower` sees: the program, its target, its configuration and TileLang.

    Programs of one digest lower to one source, whichever process asks. File names and line numbers
    do not count; how a program is cut into lines may.
    """
    from tilelang import tvm

    graph = json.loads(tvm.ir.save_json(prim_func))
    for node in graph["nodes"]:
        if node["type"] in ("ir.Span", "ir.SourceName"):
            node["data"] = None
    configs = {str(getattr(key, "value", key)): v for key, v in (pass_configs or {}).items()}
    return _digest(arch, json.dumps(configs, sort_keys=True), json.dumps(graph))


def source_digest(lowered: Lowered, arch: str, pass_configs: dict[str, Any] | None = None) -> str:
    """A hash of all that decides a program's resources, but for the version of nvcc."""
    flags = (pass_configs or {}).get(FLAGS, ())
    launches = (f"{f.name} {f.threads} {f.dynamic_shared}" for f in lowered.functions)
    return _digest(arch, *flags, *launches, lowered.source)


def nvcc_version() -> str:
    """The version of the compiler that `resources` takes; RuntimeError where there is none."""
    compiler = _toolchain.nvcc()
    if compiler is None:
        raise RuntimeError(f"resources: {available()}")
    return _toolchain.nvcc_version(compiler) or ""


def parse(report: str, lowered: Lowered, arch: str) -> tuple[Resources, ...]:
    """Read what `ptxas -v` printed about the kernels of `lowered`."""
    _, *pieces = re.split(r"Compiling entry function '(\w+)'", report)
    sections = dict(zip(pieces[::2], pieces[1::2], strict=True))
    found = []
    for function in lowered.functions:
        if (section := sections.get(function.name)) is None:
            raise RuntimeError(f"resources: ptxas says nothing of {function.name} on {arch}")
        matches = {name: re.search(pattern, section) for name, pattern in _REPORTED.items()}
        numbers = {name: int(match[1]) if match else 0 for name, match in matches.items()}
        launch = {"dynamic_smem": function.dynamic_shared, "threads": function.threads}
        found.append(Resources(function.name, **numbers, **launch))
    return tuple(found)


def regressions(record: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """What grew against a record: "merge_kernel: registers 64 -> 72"."""
    return [
        f"{kernel}: {name} {record[kernel][name]} -> {value}"
        for kernel, numbers in now.items()
        for name, value in numbers.items()
        if value > record.get(kernel, {}).get(name, value)
    ]


def _digest(*parts: str) -> str:
    """Of TileLang's version too, which makes the sources and brings the headers they include."""
    version = _toolchain.tilelang_version() or ""
    return hashlib.sha256("\0".join((version, *parts)).encode()).hexdigest()[:24]


def _report(lowered: Lowered, arch: str, flags: tuple[str, ...]) -> str:
    """What `ptxas -v` says about a CUDA source, from the cache if it is there."""
    version = nvcc_version()
    cache = os.environ.get("MHC_TILE_STATIC_CACHE")
    digest = _digest(arch, version, *flags, lowered.source)
    kept = Path(cache) / f"{arch}_{digest}.json" if cache else None
    if kept is not None and kept.is_file():
        return json.loads(kept.read_text())
    report = _compile(lowered.source, arch, flags)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept, json.dumps(report))
    return report


def _compile(source: str, arch: str, flags: tuple[str, ...]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        output = path.with_suffix(".cubin")
        command = [str(_toolchain.nvcc()), "--cubin", "-O3", "-w", f"-arch={arch}"]
        command += [*_include_options(), *flags, "-Xptxas", "-v", "-o", str(output), str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        raise RuntimeError(
            f"resources: nvcc rejects the kernel for {arch}\n  " + "\n  ".join(errors[:5])
        )
    return result.stdout + result.stderr


@functools.cache
def _include_options() -> tuple[str, ...]:
    """TileLang's own nvcc options: C++ standard, its templates and CUTLASS."""
    from tilelang.contrib import nvcc

    return tuple(nvcc.default_compile_options())
