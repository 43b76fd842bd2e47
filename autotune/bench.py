"""Calls on a GPU: captured in CUDA graphs, timed by events, checked against other results.

`capture`, `repeated`, `elapsed_us`, `rotated_sets` and `is_healthy` serve `perf` as well.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .problems import Problem
from .registry import KERNELS
from .timing import Timer, impression

ROTATED_BYTES = 300e6  # several times the L2 of any GPU
MOST_SETS = 32
TURN_US = 1000.0  # of one turn: then the host's part of a launch is below 1% of it
MOST_REPLAYS = 50
BUFFERS = 4  # of 1 GiB; each is copied to the next
WARM_S = 0.2  # before a copy counts; after 3 ms it was a tenth slower now and then
RUNS = 3  # of a check: races show as bits that differ


def rotated_sets(nbytes: int) -> int:
    """How many input sets of a size are together larger than the L2 cache, at most `MOST_SETS`.

    Example:
        >>> [rotated_sets(size * 2**20) for size in (1, 10, 160, 2000)]
        [32, 29, 2, 1]
    """
    return min(MOST_SETS, int(ROTATED_BYTES / max(nbytes, 1)) + 1)


def capture(
    function: Callable[..., Any],
    sets: Sequence[Sequence[Any]],
    stream: torch.cuda.Stream,
    *,
    pool: Any = None,
    keep: bool = False,
    keep_graph: bool = False,
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call on every input set, after one or two calls to warm up.

    With `keep` each result has memory of its own; else a call may write where an earlier one has
    just written. With `keep_graph` the caller instantiates the graph. RuntimeError if the function
    cannot be captured.
    """
    graph, kept = torch.cuda.CUDAGraph(keep_graph=keep_graph), []
    with torch.cuda.stream(stream):
        for values in sets[:2]:
            function(*values)
        stream.synchronize()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for values in sets:
                if keep:
                    kept.append(function(*values))
                else:
                    function(*values)
    return graph


def elapsed_us(function: Callable[[], Any], stream: torch.cuda.Stream, times: int = 1) -> float:
    """Microseconds that a function takes on a stream, the mean of several times in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        begin.record()
        for _ in range(times):
            function()
        end.record()
    stream.synchronize()
    return begin.elapsed_time(end) * 1000 / times


def repeated(function: Callable[[], Any], stream: torch.cuda.Stream, calls: int = 1) -> Timer:
    """A timer whose turn repeats a function until it has lasted about `TURN_US`."""
    once = impression(lambda: elapsed_us(function, stream))
    repeats = max(1, min(MOST_REPLAYS, round(TURN_US / once)))
    return lambda: elapsed_us(function, stream, repeats) / calls


def is_healthy() -> bool:
    """Whether the GPU still answers; after some errors this process's context never does."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError:
        return False


class CudaBench:
    """The inputs of one problem on the current GPU, and calls on them."""

    def __init__(self, problem: Problem) -> None:
        self._kernel = KERNELS[problem.kernel]
        self._others = self._kernel.others(problem)
        first = self._kernel.samples(problem, "cuda")
        count = rotated_sets(sum(value.nbytes for value in first if isinstance(value, Tensor)))
        more = (self._kernel.samples(problem, "cuda", seed) for seed in range(1, count))
        self._sets = [first, *more]
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def results(self, config: Any) -> Iterator[tuple[Tensor, ...]]:
        """The results of a few calls on the first inputs; what is not written is NaN."""
        for _ in range(RUNS):
            with poisoned():
                results = self._kernel.call(self._sets[0], self._others, config)
            torch.cuda.synchronize()
            yield results

    def timer(self, config: Any) -> Timer:
        """A timer of a graph that calls the kernel once on every set of inputs."""

        def call(*values: Tensor) -> Any:
            return self._kernel.call(values, self._others, config)

        graph = capture(call, self._sets, self._stream, pool=self._pool, keep=True)
        return repeated(graph.replay, self._stream, len(self._sets))

    healthy = staticmethod(is_healthy)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element nobody wrote is seen."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        settings.fill_uninitialized_memory = fill


def difference(
    actual: Sequence[Tensor], expected: Sequence[Tensor], *, same_bits: int
) -> str | None:
    """Why a candidate's results are wrong; None if they are right.

    The first `same_bits` results must have the default's bits. The others are summed in another
    order and may differ by a few roundings.
    """
    for index, (value, truth) in enumerate(zip(actual, expected, strict=True)):
        if index < same_bits:
            if not torch.equal(value, truth):
                return f"result {index} must have the default's bits, got others"
            continue
        limit = max(torch.finfo(value.dtype).eps / 8, 256 * torch.finfo(torch.float32).eps)
        error = _relative_rms(value, truth)
        if not error <= limit:  # NaN, too
            return f"result {index} must be within {limit:.1e} of the default's, got {error:.1e}"
    return None


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, by parts: float64 of the whole might not fit."""
    error = norm = 0.0
    parts = zip(actual.flatten().split(1 << 26), expected.flatten().split(1 << 26), strict=True)
    for one, other in parts:
        wide = other.double()
        error += (one.double() - wide).square().sum().item()
        norm += wide.square().sum().item()
    return (error / norm) ** 0.5 if norm else error


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy kernel: the fastest of several."""
    buffers = [torch.randn(256 * 2**20, device="cuda") for _ in range(BUFFERS)]
    targets = [*buffers[1:], buffers[0]]
    fastest = min(map(_copy_us, buffers, targets))
    return 2 * buffers[0].nbytes / (fastest * 1e-6)


def _copy_us(source: Tensor, target: Tensor) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = capture(lambda: torch.mul(source, 1.0, out=target), [()], stream)
    begun = time.monotonic()
    while time.monotonic() - begun < WARM_S:
        elapsed_us(graph.replay, stream)
    return impression(lambda: elapsed_us(graph.replay, stream))
