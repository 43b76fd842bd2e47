"""Calls on one device: timers, launches, host time and memory, of a GPU or of the CPU.

On a GPU a call runs once on every one of several input sets, larger together than the L2 cache, in
one CUDA graph; where that cannot be captured it is launched call by call, and said so.
"""

import contextlib
import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune.bench import capture, copy_bandwidth, is_healthy, repeated, rotated_sets
from mhc_tile.autotune.timing import Timer, impression

FEWEST_SETS = 8  # a large set's place in memory makes up to 2% of its time: several places' mean
MEMORY_OF_SETS = 1 / 16  # of the GPU's, beyond which large sets are fewer
SLEEP_CYCLES = 40_000_000  # about 20 ms
HOST_CALLS, HOST_REPEATS = 5, 3
MOST_QUEUED = 800  # launches; from about 1000 on the driver blocks the host

Function = Callable[..., Any]
Sets = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Timed:
    """How a function is timed."""

    timer: Timer
    captured: bool | None = None  # whether by a CUDA graph; None on the CPU
    launches: int | None = None  # GPU kernels of one call, if known


class CpuBench:
    """The CPU: wall time, one input set."""

    device = "cpu"

    def bandwidth(self) -> float:
        """Bytes read and written per second by a large copy."""
        source = torch.randn(16 * 2**20)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (impression(lambda: _wall_us(target.copy_, [[source]])) * 1e-6)

    def sets(self, nbytes: int) -> int:
        """How many input sets are rotated."""
        return 1

    def timed(self, function: Function, sets: Sets) -> Timed:
        """A timer of a function on these inputs."""
        timer = functools.partial(_wall_us, function, sets)
        impression(timer)  # warms up
        return Timed(timer)

    def host_us(
        self, function: Function, values: Sequence[Tensor], launches: int | None = None
    ) -> float | None:
        """Nothing: on the CPU a call returns when it is done."""
        return None

    def memory(self, forward: Function, backward: Function | None) -> tuple[int | None, int | None]:
        """Nothing: torch does not count the CPU's memory."""
        return None, None

    def recover(self) -> bool:
        """Whether measuring can go on after an error."""
        return True


class CudaBench:
    """The current GPU; `fewest_sets` is that of `sets_of`."""

    device = "cuda"

    def __init__(self, fewest_sets: int) -> None:
        self._stream = torch.cuda.Stream()
        self._fewest_sets = fewest_sets
        self._memory = torch.cuda.get_device_properties().total_memory

    def bandwidth(self) -> float:
        """Bytes read and written per second by a large copy."""
        return copy_bandwidth()

    def sets(self, nbytes: int) -> int:
        """How many input sets of a size are rotated."""
        return sets_of(nbytes, self._memory, self._fewest_sets)

    def timed(self, function: Function, sets: Sets) -> Timed:
        """A timer of a function on these inputs, warm."""
        try:
            graph: Any = capture(function, sets, self._stream, keep_graph=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            graph = None  # the error's frames hold memory: timed after they are gone
        if graph is None:
            torch.cuda.synchronize()
            self._end_capture()

            def call() -> None:
                for values in sets:
                    function(*values)

            return Timed(repeated(call, self._stream, len(sets)), captured=False)
        launches = _kernels_of(graph)
        graph.instantiate()
        return Timed(
            repeated(graph.replay, self._stream, len(sets)),
            captured=True,
            launches=None if launches is None else round(launches / len(sets)),
        )

    def _end_capture(self) -> None:
        """Capture something else, so that torch's random generator works again.

        After a capture that failed, the generator refuses to make a number until another capture
        has ended well.
        """
        value = torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
            value.add_(1)

    def host_us(
        self, function: Function, values: Sequence[Tensor], launches: int | None = None
    ) -> float | None:
        """Microseconds before a call returns, queued behind a sleeping kernel; None if it waits."""
        calls = max(1, min(HOST_CALLS, MOST_QUEUED // max(1, launches or 1)))
        times = []
        for _ in range(HOST_REPEATS):
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
            awake = torch.cuda.Event()
            awake.record()
            start = time.perf_counter()
            for _ in range(calls):
                function(*values)
            times.append((time.perf_counter() - start) / calls * 1e6)
            slept = not awake.query()
            torch.cuda.synchronize()
            if not slept:
                return None
        return statistics.median(times)

    def memory(self, forward: Function, backward: Function | None) -> tuple[int | None, int | None]:
        """The most bytes of the device above those before a call, and those kept for backward.

        `backward`, if there is one, takes what `forward` returns.
        """
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = forward()
        own = sum(value.nbytes for value in results)
        saved = max(0, torch.cuda.memory_allocated() - before - own)
        if backward:
            backward(results)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, saved if backward else None

    def recover(self) -> bool:
        """Whether the GPU still answers; frees what an error has left."""
        try:
            torch.cuda.synchronize()  # the cache of a GPU that does not answer cannot be emptied
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return is_healthy()


Bench = CpuBench | CudaBench


def sets_of(nbytes: int, memory: int, fewest: int) -> int:
    """How many input sets are rotated, so that none is found in the L2 cache; at least two.

    Example:
        >>> [sets_of(size * 2**20, 140 * 2**30, 8) for size in (1, 10, 160, 2000)]
        [32, 29, 8, 4]
    """
    fit = int(memory * MEMORY_OF_SETS / max(nbytes, 1))
    return max(2, rotated_sets(nbytes), min(fewest, fit))


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Let PyTorch multiply fp32 matrices in tf32, for a while.

    A compiled function looks at the setting when it is called, its backward when that is compiled
    and when it runs.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bench_of(device: str, fewest_sets: int = FEWEST_SETS) -> Bench:
    """The bench of "cuda" or "cpu"; on a GPU it also gives Triton's cache a fixed place.

    Without one, Inductor moves that cache to its own once it builds a kernel in this very process,
    and what a package compiled before is compiled again, by this process or the next.

    Raises:
        ValueError: torch sees no GPU, or the name is another.
    """
    if device == "cpu":
        return CpuBench()
    if device != "cuda":
        raise ValueError(f"perf: --device must be cuda or cpu, got {device}")
    if not torch.cuda.is_available():
        raise ValueError("perf: --device cuda must have a GPU, got none; --device cpu needs none")
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    os.environ.setdefault("TRITON_CACHE_DIR", str(home / ".triton" / "cache"))  # Triton's own
    return CudaBench(fewest_sets)


def _wall_us(function: Function, sets: Sets) -> float:
    """Microseconds of a call, the mean over input sets."""
    start = time.perf_counter()
    for values in sets:
        function(*values)
    return (time.perf_counter() - start) * 1e6 / len(sets)


def _kernels_of(graph: torch.cuda.CUDAGraph) -> int | None:
    """Nodes of a captured graph that launch kernels; None where the driver does not tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    if driver.cuGraphGetNodes(handle, None, ctypes.byref(count)):
        return None
    nodes = (ctypes.c_void_p * count.value)()
    if driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)):
        return None
    kind, found = ctypes.c_int(), 0
    for node in nodes:
        if driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)):
            return None
        found += kind.value == 0  # CU_GRAPH_NODE_TYPE_KERNEL
    return found
