"""What every kernel takes of a GPU, read without one, against the record in perf/static/.

    python -m mhc_tile.perf.resources [--arch sm_90a] [--fresh] [--write]

Reads registers, spills, stack and shared memory of every program with its default configuration
(n = 4, C = 2560, bf16, many tokens and few) from the compiler, or from the record if the program
is the recorded one; those of sm_90a from the compiler always. A spill, a kernel that could not be
launched, or growth against the record is an error. --write records what there is now, --fresh
compiles every program, recorded or not.
"""

import argparse
import functools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mhc_tile.kernels.common import static as _static
from mhc_tile.kernels.common.architectures import CHECKED
from mhc_tile.perf import program_gate as _gate

from .environment import ROOT, is_checkout

RECORDS = Path(__file__).parent / "static"
PROCESSES = 2  # each lowers in one thread and waits for nvcc


def measure(architectures: Sequence[str], *, fresh: bool = False) -> dict[str, _gate.Record]:
    """What every program takes now, by architecture.

    Args:
        architectures: some of `CHECKED`.
        fresh: whether to compile programs that are recorded, too.

    Raises:
        RuntimeError: A program does not compile.
    """
    programs = {arch: len(_gate.programs(arch)) for arch in architectures}
    tasks = [(arch, index, fresh) for arch, count in programs.items() for index in range(count)]
    # Started anew: a fork would copy locks of torch's and TVM's threads, but not the threads.
    context = multiprocessing.get_context("spawn")
    workers = min(PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        taken = list(pool.map(_take, tasks))
    return {
        arch: _gate.named(one for one, task in zip(taken, tasks, strict=True) if task[0] == arch)
        for arch in architectures
    }


def judge(arch: str, now: _gate.Record, *, write: bool = False) -> list[str]:
    """What is wrong with an architecture's kernels; what only waits to be recorded is printed.

    Args:
        arch: one of `CHECKED`.
        now: of `measure`.
        write: whether to record it, instead of comparing it with the record.
    """
    found = _gate.faults(arch, now)
    if write:
        now.write(_path(arch))
    else:
        found += _compare(arch, now)
    return [f"{arch}: {fault}" for fault in found]


def check_writable() -> None:
    """Refuse to record anything in an installed package, where no commit would hold it.

    Raises:
        ValueError: The package is no checkout.
    """
    if not is_checkout():
        raise ValueError(
            f"perf gate: --write must run in a checkout, got the installed package {ROOT}; "
            "clone the repository, and install it from there with `pip install -e .`"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a kernel, then what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=CHECKED, help="this one only")
    parser.add_argument("--fresh", action="store_true", help="compile what is recorded, too")
    parser.add_argument("--write", action="store_true", help="record what there is now")
    args = parser.parse_args(argv)
    if why := _static.available():
        parser.error(why)
    if args.write:
        try:
            check_writable()
        except ValueError as error:
            parser.error(str(error))
    wrong = []
    architectures = [args.arch] if args.arch else CHECKED
    for arch, now in measure(architectures, fresh=args.fresh).items():
        for kernel, values in now.kernels.items():
            shared = values["dynamic_smem"] + values["static_smem"]
            sys.stdout.write(
                f"{arch:8} {kernel:44} {values['registers']:4} registers {shared:7} bytes shared "
                f"{values['threads']:4} threads\n"
            )
        wrong += judge(arch, now, write=args.write)
    for fault in wrong:
        sys.stderr.write(f"{fault}\n")
    return 1 if wrong else 0


def _path(arch: str) -> Path:
    return RECORDS / f"{arch}.json"


def _compare(arch: str, now: _gate.Record) -> list[str]:
    """What is wrong against the record; what only waits to be recorded is printed."""
    try:
        record = _gate.Record.read(_path(arch))
    except ValueError as error:
        return [str(error)]
    if names := _gate.unrecorded(record, now):
        sys.stdout.write(f"{_gate.reminder(arch, names)}\n")
    return _gate.differences(record, now)


@functools.cache
def _known(arch: str) -> tuple[list[_gate.Program], _gate.Record]:
    """An architecture's programs and record, once a process; what is unreadable holds nothing."""
    programs = _gate.programs(arch)
    try:
        return programs, _gate.Record.read(_path(arch))
    except ValueError:
        return programs, _gate.Record()


def _take(task: tuple[str, int, bool]) -> _gate.Taken:
    arch, index, fresh = task
    programs, record = _known(arch)
    return _gate.take(programs[index], record, compiled=fresh or None)


if __name__ == "__main__":
    sys.exit(main())
