"""Calls on one device: timers, launches, host time and memory, of a GPU or of the CPU.

On a GPU a call runs once on every one of several input sets, larger together than the L2 cache, in
one CUDA graph; where that cannot be captured it is launched call by call, and said so.
"""

import contextlib
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune.bench import copy_bandwidth
from mhc_tile.autotune.timing import Timer

ROTATED_BYTES = 300e6  # several times the L2 of any GPU
FEWEST_SETS = 8  # a large set's place in memory makes up to 2% of its time: several places' mean
MOST_SETS = 32
MEMORY_OF_SETS = 1 / 16  # of the GPU's, beyond which large sets are fewer
TURN_US = 1000.0  # of one turn: the host's part of starting a graph is then below 1% of it
MOST_REPLAYS = 50
WARM = 3  # turns before the first that counts
SLEEP_CYCLES = 40_000_000  # about 20 ms
HOST_CALLS, HOST_REPEATS = 5, 3
MOST_QUEUED = 800  # launches; from about 1000 on the driver blocks the host

Function = Callable[..., Any]
Sets = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Timed:
    """How a function is timed.

    Attributes:
        timer: microseconds of one call.
        captured: whether by a CUDA graph; None on the CPU.
        launches: GPU kernels of one call; None if unknown.
    """

    timer: Timer
    captured: bool | None = None
    launches: int | None = None


class CpuBench:
    """The CPU: wall time, one input set."""

    device = "cpu"

    def bandwidth(self) -> float:
        """Bytes read and written per second by a large copy."""
        source = torch.randn(16 * 2**20)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (_median(lambda: target.copy_(source)) * 1e-6)

    def sets(self, nbytes: int) -> int:
        """How many input sets are rotated."""
        return 1

    def timed(self, function: Function, sets: Sets) -> Timed:
        """A timer of a function on these inputs."""

        def timer() -> float:
            start = time.perf_counter()
            for values in sets:
                function(*values)
            return (time.perf_counter() - start) * 1e6 / len(sets)

        for _ in range(WARM):
            timer()
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
    """The current GPU.

    Args:
        fewest_sets: as `sets_of` takes it.
    """

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
        captured = self._capture(function, sets)
        graph, launches = captured or (None, None)

        def turn(times: int) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(self._stream):
                begin.record()
                for _ in range(times):
                    if graph:
                        graph.replay()
                    else:
                        for values in sets:
                            function(*values)
                end.record()
            self._stream.synchronize()
            return begin.elapsed_time(end) * 1000 / times

        once = statistics.median(turn(1) for _ in range(WARM))
        repeats = max(1, min(MOST_REPLAYS, round(TURN_US / once)))
        count = len(sets)
        return Timed(
            lambda: turn(repeats) / count,
            graph is not None,
            None if launches is None else round(launches / count),
        )

    def _capture(
        self, function: Function, sets: Sets
    ) -> tuple[torch.cuda.CUDAGraph, int | None] | None:
        with torch.cuda.stream(self._stream):
            for values in sets[:2]:
                function(*values)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    for values in sets:
                        function(*values)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                torch.cuda.synchronize()
                self._end_capture()
                return None
            launches = _kernels_of(graph)
            graph.instantiate()
        return graph, launches

    def _end_capture(self) -> None:
        """Let torch know that nothing is captured any more.

        After a capture that failed, its random generator still believes that one is under way, and
        refuses to make a number until another capture has ended well.
        """
        value = torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
            value.add_(1)

    def host_us(
        self, function: Function, values: Sequence[Tensor], launches: int | None = None
    ) -> float | None:
        """Microseconds before a call returns, queued behind a sleeping kernel; None if it waits.

        Args:
            function: what is called.
            values: its inputs.
            launches: of a call, if known: the driver takes only so many before it waits.
        """
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
        """Bytes of the device above those before a call, at most, and kept for backward.

        Args:
            forward: without arguments, to the results.
            backward: from the results; None if there is none.
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
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return bool(torch.ones(1, device="cuda").item() == 1)
        except RuntimeError:
            return False


Bench = CpuBench | CudaBench


def sets_of(nbytes: int, memory: int, fewest: int) -> int:
    """How many input sets are rotated, so that none is found in the L2 cache.

    Args:
        nbytes: of a set.
        memory: the GPU's, in bytes.
        fewest: of large sets, if memory allows; two in any case.

    Example:
        >>> [sets_of(size * 2**20, 140 * 2**30, 8) for size in (1, 10, 160, 2000)]
        [32, 29, 8, 4]
    """
    size = max(nbytes, 1)
    rotated = int(ROTATED_BYTES / size) + 1
    fit = int(memory * MEMORY_OF_SETS / size)
    return max(2, min(MOST_SETS, max(rotated, min(fewest, fit))))


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

    Args:
        device: its name.
        fewest_sets: as `sets_of` takes it, for a GPU.

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


def _median(function: Callable[[], Any]) -> float:
    def once() -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e6

    once()
    return statistics.median(once() for _ in range(5))


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
