"""`mhc-tile perf run --warm`: what a run compiles, compiled by several processes before it.

torch.compile and Triton compile on one core, and some packages compile anew for every shape:
minutes each. Each process takes the cases of one shape with one turn. Its times are thrown away;
what it compiled stays in the caches of torch, Triton and TileLang, where the run finds it.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from mhc_tile.autotune import worker

from . import output
from .operations import Case

SECONDS = 3600.0  # for a shape: the slowest takes five minutes of one core that it has for itself
MEMORY = 6 * 2**30  # of the GPU, counted for a process; the largest shapes need more
_HANDLER = f"{__name__}:handler"

Shape = tuple[int, int]
"""T, C."""


def compile_first(
    chosen: Sequence[Case],
    wanted: Callable[[str], bool],
    device: str,
    jobs: int | None = None,
) -> None:
    """Compile what cases need; a contender that fails here fails in the run, which shows it.

    `wanted`, whether a contender is, by its name, must be picklable. If `jobs` is None, cores and
    memory set the number of processes.
    """
    start, progress = time.monotonic(), output.Progress()
    shapes = by_shape(chosen)
    jobs = min(jobs or _processes(device), len(shapes))
    progress.note(f"shapes to compile: {len(shapes)}, processes: {jobs}")
    tasks = worker.pooled(
        _HANDLER, shapes.items(), jobs=jobs, seconds=SECONDS, arguments=(device, wanted)
    )
    with contextlib.closing(tasks):  # whatever ends it, the processes end
        for ((tokens, width), _), said in tasks:
            left = [str(said)] if isinstance(said, Exception) else said
            progress.note(f"{tokens}x{width}: " + ("; ".join(left) or "compiled"))
    progress.note(f"compiled in {time.monotonic() - start:.0f} s; now the run")


def by_shape(chosen: Sequence[Case]) -> dict[Shape, list[Case]]:
    """Cases by T and C, in the order of what takes long: wide ones, then those of many cases."""
    found: dict[Shape, list[Case]] = {}
    for case in chosen:
        found.setdefault((case.tokens, case.hidden_size), []).append(case)
    return dict(sorted(found.items(), key=lambda item: (-item[0][1], -len(item[1]))))


def handler(
    device: str, wanted: Callable[[str], bool]
) -> Callable[[tuple[Shape, list[Case]]], Iterator[list[str]]]:
    """What a process runs: from a shape and its cases to what the run must compile itself."""
    import torch._inductor.config as inductor

    from . import suite
    from .bench import bench_of

    inductor.compile_threads = 1  # the processes have the cores
    bench = bench_of(device, fewest_sets=2)  # its times are thrown away, its memory is shared

    def compiled(task: tuple[Shape, list[Case]]) -> Iterator[list[str]]:
        left: dict[str, None] = {}
        for case in task[1]:
            try:
                rows = suite.measure(case, bench, wanted, turns=1)
            except output.UnusableError as error:
                yield [*left, str(error)]
                raise SystemExit(1) from error  # the next shape needs a GPU that answers
            except Exception as error:
                left[f"{case.key}: {output.one_line(error)}"] = None
                continue
            for name, row in rows.items():
                if row.status == "out of memory":
                    left[f"{name} had no memory beside the others"] = None
                elif row.status == "failed":
                    left[f"{name} failed, which the run will show"] = None
            if device == "cuda":
                torch.cuda.empty_cache()
        yield list(left)

    return compiled


def _processes(device: str) -> int:
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    if device == "cuda":
        torch.cuda.empty_cache()  # what measuring the copy has left
        cores = min(cores, torch.cuda.mem_get_info()[0] // MEMORY)
    return max(1, cores)
