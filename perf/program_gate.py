"""What every program with its default configuration takes of a GPU, read without one.

A record, perf/static/<arch>.json, holds for each kernel its numbers, the digest of the program that
they were read from and that of the CUDA source. ptxas' answer follows from the source, the options
and the version of nvcc, the source from the program and the version of TileLang. So a program whose
digest is recorded is neither lowered nor compiled, and one whose source is recorded is not
compiled. COMPILED is lowered and compiled always, and must give what is recorded: this finds
digests that miss something, and numbers that were edited.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mhc_tile import MHCConfig
from mhc_tile.autotune import worker
from mhc_tile.kernels.common import files, lowering, static
from mhc_tile.kernels.common.architectures import multiprocessors_of
from mhc_tile.kernels.common.programs import DryRun, dry_run
from mhc_tile.kernels.common.quantities import Samples
from mhc_tile.ops import _dispatch
from mhc_tile.ops._definition import DEFINITIONS, Op

RECORDS = Path(__file__).parent / "static"
WRITE = "mhc-tile perf gate --static --write"
# The architecture whose programs are compiled even if recorded: the one that kernels are tuned on.
COMPILED = "sm_90a"
STREAMS, CHANNELS, DTYPE = 4, 2560, "bfloat16"
# A kernel's name in the record begins with its group's, which stands for a number of tokens.
GROUPS = {"": 8192, "few tokens: ": 64}
# Ops whose launchers have every program. Names in the record follow the order of the launches.
OPS = (
    "expand", "collapse", "sinkhorn", "sinkhorn_backward", "pre_apply", "pre_apply_backward",
    "merge", "merge_backward", "_merge_backward_maps", "mapping", "mapping_backward", "pre",
    "boundary", "pre_backward",
)  # fmt: skip
# Constants are compiled in: others make other programs.
CONSTANTS = {
    **dataclasses.asdict(MHCConfig.paper(num_streams=STREAMS, norm_eps=1e-6)),
    "eps": 0.0,
    "mode": "sum",
}
DIGESTS = ("program", "source")
KEYS = {*DIGESTS, *(known.name for known in dataclasses.fields(static.Resources))} - {"kernel"}
PROCESSES = 2  # each lowers in one thread and waits for nvcc
SECONDS = 600.0  # for one program; the slowest take 20 on one core

Kernels = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Record:
    """What is known of an architecture's kernels, by the numbers of one version of nvcc.

    A kernel has the digests "program" and "source", and the fields of `static.Resources`.
    """

    nvcc: str = ""
    kernels: Kernels = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """From a file; ValueError where there is none, or it holds something else."""
        try:
            record = cls(**json.loads(path.read_text()))
            if any(kernel.keys() != KEYS for kernel in record.kernels.values()):
                raise ValueError(f"a kernel without {', '.join(sorted(KEYS))}")
            return record
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"record: {path} must hold nvcc and kernels, got {error}; {WRITE}"
            ) from error

    def write(self, path: Path) -> None:
        """Replace the file."""
        files.write(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def find(self, digest: str, value: str) -> Kernels:
        """The kernels whose digest, "program" or "source", has a value, by their CUDA names."""
        return {
            name.rpartition(": ")[2].partition(" ")[0]: kernel
            for name, kernel in self.kernels.items()
            if kernel[digest] == value
        }

    @property
    def numbers(self) -> dict[str, dict[str, int]]:
        """The kernels without their digests."""
        return {
            name: {key: value for key, value in kernel.items() if key not in DIGESTS}
            for name, kernel in self.kernels.items()
        }


@dataclass(frozen=True)
class Program:
    """A default program of an architecture, and the group in which it comes first."""

    group: str
    arch: str
    factory: Callable[..., Any]
    constants: tuple[Any, ...]
    pass_configs: dict[str, Any]


class Taken(NamedTuple):
    """What one program takes: its kernels as in a record, by CUDA name."""

    group: str
    program: str  # the digest
    kernels: Kernels


@contextlib.contextmanager
def launching(arch: str) -> Iterator[DryRun]:
    """Note what ops launch on an architecture, with the default configurations, in `dry_run`."""
    pinned = _dispatch.BATCH_INVARIANT
    _dispatch.set_batch_invariant(False)
    try:
        with dry_run(arch, multiprocessors_of(arch)) as asked:
            yield asked
    finally:
        _dispatch.set_batch_invariant(pinned)


def call(op: Op, tokens: int, optional: Sequence[str] = ()) -> Callable[[], Any]:
    """A call of an op's CUDA code on tensors without values, some of its optional ones given."""
    make = Samples(tokens, STREAMS, CHANNELS, getattr(torch, DTYPE), "meta")
    positional, keywords = op.call_of(make.get, CONSTANTS, optional)
    return functools.partial(op.by_kernel, *positional, **keywords)


def programs(arch: str) -> list[Program]:
    """What an architecture runs at many tokens and at few, each program once, in order."""
    found: dict[Any, Program] = {}
    for group, tokens in GROUPS.items():
        with launching(arch) as asked:
            for op in map(DEFINITIONS.__getitem__, OPS):
                for given in range(len(op.optional) + 1):
                    call(op, tokens, op.optional[:given])()
        for factory, constants, configs in asked.programs:
            program = Program(group, arch, factory, constants, configs)
            found.setdefault((factory, constants), program)
    return list(found.values())


def take(program: Program, record: Record, *, fresh: bool = False) -> Taken:
    """What a program takes: from its architecture's record if it is there, else from the compiler.

    `fresh` compiles what is recorded, too, which is always done on COMPILED. RuntimeError where
    there is no nvcc, or it rejects the source.
    """
    arch, configs = program.arch, program.pass_configs
    if fresh or arch == COMPILED or record.nvcc != static.nvcc_version():
        record = Record()
    function = program.factory(*program.constants)
    digest = static.program_digest(function, arch, configs)
    if known := record.find("program", digest):
        return Taken(program.group, digest, known)
    lowered = lowering.lower(function, arch, configs)
    source = static.source_digest(lowered, arch, configs)
    if not (known := record.find("source", source)):
        resources = map(dataclasses.asdict, static.compiled(lowered, arch, configs))
        known = {values.pop("kernel"): values for values in resources}
    digests = {"program": digest, "source": source}
    kernels = {name: {**digests, **values, **digests} for name, values in known.items()}
    return Taken(program.group, digest, kernels)


def named(taken: Iterable[Taken]) -> Record:
    """A record of what programs take, in their order, each digest once.

    Kernels of few tokens are called "few tokens: <kernel>", several of one name are numbered.
    """
    kernels: Kernels = {}
    once: dict[str, Taken] = {}
    for one in taken:
        once.setdefault(one.program, one)
    for one in once.values():
        for kernel, values in one.kernels.items():
            name, count = f"{one.group}{kernel}", 1
            while name in kernels:
                count += 1
                name = f"{one.group}{kernel} {count}"
            kernels[name] = values
    return Record(static.nvcc_version(), kernels)


def measure(architectures: Sequence[str], *, fresh: bool = False) -> dict[str, Record]:
    """What every program takes now, by architecture; ValueError where one does not compile."""
    tasks = [(arch, i) for arch in architectures for i in range(len(programs(arch)))]
    jobs = min(PROCESSES, os.cpu_count() or 1)
    arguments = (fresh, RECORDS)
    found: dict[Any, Taken] = {}
    for task, answer in worker.pooled(
        f"{__name__}:handler", tasks, jobs=jobs, seconds=SECONDS, arguments=arguments
    ):
        if not isinstance(answer, Taken):
            raise ValueError(f"perf gate: programs must compile for {task[0]}, got {answer}")
        found[task] = answer
    return {arch: named(found[task] for task in tasks if task[0] == arch) for arch in architectures}


def handler(fresh: bool, records: Path) -> Callable[[tuple[str, int]], Iterator[Any]]:
    """What a process runs: from an architecture and a program's index a `Taken`, or a text."""

    @functools.cache
    def known(arch: str) -> tuple[list[Program], Record]:
        try:
            return programs(arch), Record.read(records / f"{arch}.json")
        except ValueError:
            return programs(arch), Record()

    def handle(task: tuple[str, int]) -> Iterator[Any]:
        found, record = known(task[0])
        try:
            yield take(found[task[1]], record, fresh=fresh)
        except Exception as error:
            yield f"{type(error).__name__}: {error}"

    return handle


def faults(arch: str, now: Record) -> list[str]:
    """Why kernels must not ship: "<kernel>: spills 8 bytes to local memory"."""
    return [
        f"{name}: {fault}"
        for name, values in now.numbers.items()
        for fault in static.Resources(name, **values).faults(arch)
    ]


def differences(record: Record, now: Record) -> list[str]:
    """What is wrong against the record: growth, and numbers that are not those of its programs."""
    found = [f"{grown}; {WRITE}" for grown in static.regressions(record.numbers, now.numbers)]
    if record.nvcc != now.nvcc:
        return found
    for name, values in now.kernels.items():
        kept = record.kernels.get(name, {})
        if kept.get("program") == values["program"] and kept != values:
            wrong = ", ".join(key for key in values if kept.get(key) != values[key])
            found.append(
                f"{name}: the record must be what the program compiles to, got another {wrong}; "
                f"{WRITE} --fresh"
            )
    return found


def unrecorded(record: Record, now: Record) -> list[str]:
    """Kernels that the record does not hold as they are, or that are no more, by name.

    Nothing is wrong with them, but they are compiled each time, until they are recorded.
    """
    fresh = record.nvcc != now.nvcc
    names = {n for n, values in now.kernels.items() if fresh or record.kernels.get(n) != values}
    return sorted(names | (record.kernels.keys() - now.kernels.keys()))


def reminder(arch: str, names: Iterable[str]) -> str:
    """What to say of `unrecorded` kernels."""
    return f"{arch}: compiled each time until recorded with `{WRITE}`: {', '.join(names)}"
