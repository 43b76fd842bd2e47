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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import _toolchain
from ._lowering import Lowered, lower, shared_memory_limit

# The architectures that every kernel must compile for.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")


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
        if granted > 65536:
            found.append(f"needs {granted} registers a block, of 65536")
        limit = shared_memory_limit(arch)
        if (shared := self.dynamic_smem + self.static_smem) > limit:
            found.append(f"needs {shared} bytes of shared memory, of {limit} on {arch}")
        return found


def available() -> str | None:
    """None, or why nothing can be compiled here and how to mend it."""
    if _toolchain.tilelang_version() is None:
        return f"TileLang is not installed; pip install tilelang=={_toolchain.REQUIRED_TILELANG}"
    if _toolchain.nvcc() is None:
        return "nvcc is not installed; pip install 'mhc-tile[nvcc]'"
    return None


def resources(
    prim_func: Any, arch: str, pass_configs: dict[str, Any] | None = None
) -> tuple[Resources, ...]:
    """Compile a program for an architecture and read what each of its kernels takes.

    Args:
        prim_func: what a `@T.prim_func` factory returns.
        arch: such as "sm_80" or "sm_90a"; no such GPU is needed.
        pass_configs: as for `tilelang.compile`.

    Returns:
        One entry per kernel, in the order of their launches; most programs have one.

    Raises:
        RuntimeError: There is no nvcc, or it rejects the source.
    """
    lowered = lower(prim_func, arch, pass_configs)
    flags = (pass_configs or {}).get("tl.device_compile_flags", [])
    report = _report(lowered.source, arch, tuple(flags))
    return parse(report, lowered, arch)


def parse(report: str, lowered: Lowered, arch: str) -> tuple[Resources, ...]:
    """Read what `ptxas -v` printed about the kernels of `lowered`."""
    sections = {}
    for section in re.split(r"(?=Compiling entry function)", report):
        if match := re.match(r"Compiling entry function '(\w+)'", section):
            sections[match[1]] = section

    def number(section: str, pattern: str) -> int:
        match = re.search(pattern, section)
        return int(match[1]) if match else 0

    found = []
    for function in lowered.functions:
        if function.name not in sections:
            raise RuntimeError(f"resources: ptxas says nothing of {function.name} on {arch}")
        section = sections[function.name]
        found.append(
            Resources(
                kernel=function.name,
                registers=number(section, r"Used (\d+) registers"),
                spill_stores=number(section, r"(\d+) bytes spill stores"),
                spill_loads=number(section, r"(\d+) bytes spill loads"),
                stack=number(section, r"(\d+) bytes stack frame"),
                static_smem=number(section, r"(\d+) bytes smem"),
                dynamic_smem=function.dynamic_shared,
                threads=function.threads,
            )
        )
    return tuple(found)


def as_record(entries: tuple[Resources, ...]) -> dict[str, dict[str, int]]:
    """Plain numbers by kernel, for the record in perf/static/."""
    return {e.kernel: {k: v for k, v in asdict(e).items() if k != "kernel"} for e in entries}


def regressions(record: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """What grew against a record: "merge_kernel: registers 64 -> 72"."""
    return [
        f"{kernel}: {name} {record[kernel][name]} -> {value}"
        for kernel, numbers in now.items()
        for name, value in numbers.items()
        if value > record.get(kernel, {}).get(name, value)
    ]


def _report(source: str, arch: str, flags: tuple[str, ...]) -> str:
    """What `ptxas -v` says about a CUDA source, from the cache if it is there."""
    compiler = _toolchain.nvcc()
    if compiler is None:
        raise RuntimeError(f"resources: {available()}")
    version = _toolchain.nvcc_version(compiler)
    cache = os.environ.get("MHC_TILE_STATIC_CACHE")
    key = "\0".join((arch, version or "", *flags, source))
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    kept = Path(cache) / f"{arch}_{digest}.json" if cache else None
    if kept is not None and kept.is_file():
        return json.loads(kept.read_text())
    report = _compile(source, arch, flags, compiler)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            json.dump(report, file)
        os.replace(file.name, kept)
    return report


def _compile(source: str, arch: str, flags: tuple[str, ...], compiler: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        output = path.with_suffix(".cubin")
        command = [str(compiler), "--cubin", "-O3", "-w", f"-arch={arch}", *_include_options()]
        command += [*flags, "-Xptxas", "-v", "-o", str(output), str(path)]
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
