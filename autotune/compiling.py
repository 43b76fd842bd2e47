"""The first phase: every program of every candidate, compiled by several processes.

TileLang's disk cache keeps the kernels, under a key that names the architecture: the phase needs no
GPU, and the cache can be copied. A record in `mhc_tile/` of the cache says what each kernel takes.
Candidates are pruned by it, and a program with a record is not compiled again. Processes are used,
not the threads of `tilelang.par_compile`: tracing and lowering, half of the time, hold the
interpreter's lock, and a compiler that crashes then ends one program.
"""

import ast
import functools
import hashlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import msgspec

from ..kernels.common import toolchain as _toolchain
from ..kernels.common.files import write
from ..kernels.common.static import Resources
from . import cubin, worker

SECONDS = 300.0  # for one program; the slowest take 10 on one core
_LIBRARY = "executable.so"  # of a kernel in TileLang's cache, with its cubin
_FORMAT = "2"  # of what records say; older ones are not read
_HANDLER = f"{__name__}:handler"
_PACKAGE = f"{__package__.rpartition('.')[0]}.kernels."
_KERNELS = Path(_toolchain.__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """One program for one architecture: `module.name(arch, *constants)` compiles it."""

    module: str
    name: str
    constants: tuple[Any, ...]
    arch: str  # such as "sm_90a"

    @property
    def path(self) -> Path:
        """The file of its record."""
        digest = program_fingerprint(self.module)
        parts = (_FORMAT, self.module, self.name, repr(self.constants), self.arch, digest)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
        return _toolchain.kernel_cache() / "mhc_tile" / f"{digest}.json"

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.module.rpartition('.')[2]}.{self.name}{self.constants} for {self.arch}"


class _Record(msgspec.Struct):
    """What is kept of a compiled program."""

    program: str  # for a person
    kernel: str  # its folder in TileLang's cache
    takes: tuple[Resources, ...]


@functools.cache
def fingerprint() -> str:
    """A digest of TileLang's version and the kernels' sources: when it changes, so may the code."""
    return _digest(sorted(_KERNELS.rglob("*.py")))


@functools.cache
def program_fingerprint(module: str) -> str:
    """The same of what one module of kernels is made of: itself and all that it imports there."""
    found: set[str] = set()
    left = {module} if _source(module).is_file() else set()
    while left:
        found.add(one := left.pop())
        left |= _imported(one) - found
    return _digest(map(_source, sorted(found)))


def _source(module: str) -> Path:
    """The file of a module of kernels; one that is not there for any other module."""
    return _KERNELS.joinpath(*module.removeprefix(_PACKAGE).split(".")).with_suffix(".py")


def _imported(module: str) -> set[str]:
    """The modules of kernels that one of them imports, by dotted name."""
    names = set()
    for node in ast.walk(ast.parse(_source(module).read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in names if _source(name).is_file()}


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256((_toolchain.tilelang_version() or "").encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def known(job: Job) -> tuple[Resources, ...] | None:
    """What a compiled program's kernels take; None if it has yet to be compiled here."""
    try:
        record = msgspec.json.decode(job.path.read_bytes(), type=_Record)
    except (OSError, ValueError):
        return None
    built = _toolchain.kernel_cache() / record.kernel / _LIBRARY
    return record.takes if built.is_file() else None


def compile_all(
    jobs: Iterable[Job], *, processes: int, log: Path | None = None, build: bool = True
) -> Iterator[tuple[Job, tuple[Resources, ...] | str]]:
    """Compile programs that are not in the cache, unless `build` is off.

    Yields (job, what its kernels take) in the order of completion, or (job, why it does not
    compile).
    """
    left = []
    for job in jobs:
        if (taken := known(job)) is None:
            left.append(job)
        else:
            yield job, taken
    if not build:
        yield from ((job, "it is not compiled yet") for job in left)
        return
    for job, answer in worker.pooled(_HANDLER, left, jobs=processes, seconds=SECONDS, log=log):
        yield job, str(answer) if isinstance(answer, Exception) else answer


def handler() -> Any:
    """What a worker process runs: a job to one message, its resources or why there are none."""

    def handle(job: Job) -> Iterator[tuple[Resources, ...] | str]:
        try:
            yield build(job)
        except Exception as error:
            yield f"{type(error).__name__}: {error}"

    return handle


def build(job: Job) -> tuple[Resources, ...]:
    """Compile a program, or find it in TileLang's cache, and keep a record of what it takes."""
    from ..kernels.common import lowering as _lowering

    program = getattr(importlib.import_module(job.module), job.name)
    kernel = program(job.arch, *job.constants)
    if kernel.artifact is not None:
        functions = tuple(_lowering.device_functions(kernel.artifact.device_mod).values())
    else:  # from the cache, which keeps no module: lower it once more
        prim_func = program.factory(*job.constants)
        functions = _lowering.lower(prim_func, job.arch, program.pass_configs).functions
    folder = Path(kernel._tilelang_cache_path)
    usage = cubin.usage((folder / _LIBRARY).read_bytes())
    spills = 0, 0  # a cubin does not tell; what spills has a stack
    taken = []
    for function in functions:
        used = usage[function.name]
        shared = used.static_smem, function.dynamic_shared
        taken.append(
            Resources(function.name, used.registers, *spills, used.stack, *shared, function.threads)
        )
    place = folder.relative_to(_toolchain.kernel_cache())
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write(job.path, msgspec.json.encode(_Record(str(job), str(place), tuple(taken))))
    return tuple(taken)


def faults(taken: Iterable[Resources], arch: str) -> list[str]:
    """Why a program must not be measured: what spills, and what cannot launch."""
    found = []
    for kernel in taken:
        wrong = kernel.faults(arch)
        if kernel.stack:
            wrong.append(f"keeps {kernel.stack} bytes of a thread in local memory")
        found += [f"{kernel.kernel} {fault}" for fault in wrong]
    return found
