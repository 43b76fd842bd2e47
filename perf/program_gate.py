"""The static gate: what every default program takes, against a record, compiling what is new in it.

A record, perf/static/<arch>.json, holds for each kernel its numbers, the digest of the program that
they were read from and that of the CUDA source. ptxas' answer follows from the source, the options
and the version of nvcc, the source from the program and the version of TileLang. So a program whose
digest is recorded is neither lowered nor compiled, one whose source is recorded is not compiled,
and recorded numbers are judged like any others. COMPILED is lowered and compiled always, and must
give what is recorded: digests that miss something, and numbers that were edited, are found out.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mhc_tile.kernels.common import lowering as _lowering
from mhc_tile.kernels.common import static as _static
from mhc_tile.perf import shipped as _shipped

# The architecture whose programs are compiled even if recorded: the one that kernels are tuned on.
COMPILED = "sm_90a"
# A kernel's name in the record begins with its group's, which stands for a number of tokens.
GROUPS = {"": 8192, "few tokens: ": 64}
WRITE = "python -m mhc_tile.perf.resources --write"
DIGESTS = ("program", "source")
KEYS = {*DIGESTS, *(known.name for known in fields(_static.Resources))} - {"kernel"}


@dataclass(frozen=True)
class Record:
    """What is known of an architecture's kernels.

    nvcc: the version that the numbers come from. kernels: by name, the digests "program" and
    "source" and the fields of `_static.Resources`.
    """

    nvcc: str = ""
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """From a file.

        Raises:
            ValueError: There is none, or it holds something else.
        """
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
        """Make the file anew, at once or not at all."""
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({"nvcc": self.nvcc, "kernels": self.kernels}, indent=1) + "\n")
        draft.replace(path)

    def find(self, digest: str, value: str) -> dict[str, dict[str, Any]]:
        """The kernels whose digest, "program" or "source", has a value, by their CUDA names."""
        return {
            name.rpartition(": ")[2].partition(" ")[0]: kernel
            for name, kernel in self.kernels.items()
            if kernel[digest] == value
        }


@dataclass(frozen=True)
class Program:
    """A default program of an architecture, and the group in which it comes first."""

    group: str
    arch: str
    factory: Callable[..., Any]
    constants: tuple[Any, ...]
    pass_configs: dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """What one program takes.

    group, program: where it stands and its digest. kernels: as in a record, by CUDA name.
    """

    group: str
    program: str
    kernels: dict[str, dict[str, Any]]


def programs(arch: str, n: int = 4, channels: int = 2560) -> list[Program]:
    """What an architecture runs at many tokens and at few, each program once.

    Args:
        arch: one of `CHECKED`.
        n: streams.
        channels: C.

    Returns:
        In the order of the launches, so that a record's names are stable.
    """
    found: dict[Any, Program] = {}
    for group, tokens in GROUPS.items():
        for factory, constants, configs in _shipped.programs(arch, tokens, n, channels).programs:
            program = Program(group, arch, factory, constants, configs)
            found.setdefault((factory, constants), program)
    return list(found.values())


def take(program: Program, record: Record, *, compiled: bool | None = None) -> Taken:
    """What a program takes: from the record if it is there, else from the compiler.

    Args:
        program: one of `programs`.
        record: of the program's architecture.
        compiled: whether to compile what is recorded, too; None: on COMPILED only.

    Raises:
        RuntimeError: There is no nvcc, or it rejects the source.
    """
    arch, configs = program.arch, program.pass_configs
    if compiled is None:
        compiled = arch == COMPILED
    if compiled or record.nvcc != _static.nvcc_version():
        record = Record()
    function = program.factory(*program.constants)
    digest = _static.program_digest(function, arch, configs)
    if known := record.find("program", digest):
        return Taken(program.group, digest, known)
    lowered = _lowering.lower(function, arch, configs)
    source = _static.source_digest(lowered, arch, configs)
    if not (known := record.find("source", source)):
        known = _static.as_record(_static.compiled(lowered, arch, configs))
    digests = {"program": digest, "source": source}
    kernels = {name: {**digests, **kernel, **digests} for name, kernel in known.items()}
    return Taken(program.group, digest, kernels)


def named(taken: Iterable[Taken]) -> Record:
    """A record of what programs take, in their order.

    Kernels of few tokens are called "few tokens: <kernel>", several of one name are numbered.
    """
    kernels: dict[str, dict[str, Any]] = {}
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
    return Record(_static.nvcc_version(), kernels)


def numbers(record: Record) -> dict[str, dict[str, int]]:
    """The kernels of a record without their digests."""
    return {
        name: {key: value for key, value in kernel.items() if key not in DIGESTS}
        for name, kernel in record.kernels.items()
    }


def faults(arch: str, now: Record) -> list[str]:
    """Why kernels must not ship: "<kernel>: spills 8 bytes to local memory"."""
    return [
        f"{name}: {fault}"
        for name, values in numbers(now).items()
        for fault in _static.Resources(name, **values).faults(arch)
    ]


def differences(record: Record, now: Record) -> list[str]:
    """What is wrong against the record: growth, and numbers that are not those of its programs."""
    found = [f"{grown}; {WRITE}" for grown in _static.regressions(numbers(record), numbers(now))]
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


def unrecorded(record: Record, now: Record, groups: Iterable[str] = GROUPS) -> list[str]:
    """Kernels that the record does not hold as they are, or that are no more: names, sorted.

    Nothing is wrong with them, but they are compiled each time, until they are recorded.
    """
    kept = {name: values for name, values in record.kernels.items() if _group(name) in set(groups)}
    fresh = record.nvcc != now.nvcc
    names = {name for name, values in now.kernels.items() if fresh or kept.get(name) != values}
    return sorted(names | (kept.keys() - now.kernels.keys()))


def reminder(arch: str, names: Iterable[str]) -> str:
    """What to say of `unrecorded` kernels."""
    return f"{arch}: compiled each time until recorded with `{WRITE}`: {', '.join(names)}"


def _group(name: str) -> str:
    head, colon, _ = name.rpartition(": ")
    return f"{head}{colon}"
