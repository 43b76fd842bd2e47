"""Entry to and exit from the streams, each the other's gradient.

    expand:    x[i, c] = scale * hidden[c]
    collapse:  hidden[c] = scale * sum_i x[i, c]

Scale is 1, or 1/n for the mean and its gradient. Per token `expand` reads C elements and writes
n C; `collapse` reads n C and writes C.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import tilelang.language as T
from torch import Tensor

from .common.knobs import check
from .common.problem import Problem, Target
from .common.programs import F32, ITEM_BYTES, UNGUARDED, architecture, dtype_name, program
from .common.rows import is_block, vector_width


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch knobs; a thread handles one vector of channels of one token."""

    threads: int = 256

    def __post_init__(self):
        check("streams", self, threads=(is_block(self.threads), "a multiple of 32 up to 1024"))


def default_config(problem: Problem, target: Target, *, batch_invariant: bool = False) -> Config:
    """256 threads, whatever the sizes: a block is a stretch of memory, not a token."""
    return Config()


def candidates(problem: Problem, target: Target) -> Iterator[Config]:
    """Configurations worth measuring."""
    for threads in (128, 256, 512):
        yield Config(threads)


@program(UNGUARDED)
def expand_program(n: int, C: int, dtype: str, scale: float, threads: int) -> Any:
    """Copies one vector of `hidden` a thread into every stream; see the module's docstring."""
    width = vector_width(C, dtype)
    pieces = C // width
    tokens = T.dynamic("tokens")

    @T.prim_func
    def expand_forward(hidden: T.Tensor((tokens, C), dtype), x: T.Tensor((tokens, n, C), dtype)):
        with T.Kernel(
            T.ceildiv(T.cast(tokens, "int64") * pieces, threads), threads=threads
        ) as block:
            piece = T.cast(block, "int64") * threads + T.get_thread_binding()
            token = piece // pieces
            channel = piece % pieces * width
            vector = T.alloc_local((width,), dtype)
            if token < tokens:
                for v in T.vectorized(width):
                    vector[v] = hidden[token, channel + v]
                if scale != 1.0:
                    for v in T.unroll(width):
                        vector[v] = T.cast(T.cast(vector[v], F32) * scale, dtype)
                # x[i, c] = scale * hidden[c]
                for i in T.unroll(n):
                    for v in T.vectorized(width):
                        x[token, i, channel + v] = vector[v]

    return expand_forward


@program(UNGUARDED)
def collapse_program(n: int, C: int, dtype: str, scale: float, threads: int) -> Any:
    """Sums one vector of channels a thread over the streams; see the module's docstring."""
    width = vector_width(C, dtype)
    pieces = C // width
    tokens = T.dynamic("tokens")

    @T.prim_func
    def collapse_forward(x: T.Tensor((tokens, n, C), dtype), hidden: T.Tensor((tokens, C), dtype)):
        with T.Kernel(
            T.ceildiv(T.cast(tokens, "int64") * pieces, threads), threads=threads
        ) as block:
            piece = T.cast(block, "int64") * threads + T.get_thread_binding()
            token = piece // pieces
            channel = piece % pieces * width
            vectors = T.alloc_local((n, width), dtype)
            collapsed = T.alloc_local((width,), F32)
            if token < tokens:
                for i in T.unroll(n):
                    for v in T.vectorized(width):
                        vectors[i, v] = x[token, i, channel + v]
                # hidden[c] = scale * sum_i x[i, c]
                for v in T.unroll(width):
                    collapsed[v] = T.cast(vectors[0, v], F32)
                for i in T.unroll(1, n):
                    for v in T.unroll(width):
                        collapsed[v] += T.cast(vectors[i, v], F32)
                for v in T.unroll(width):
                    collapsed[v] = collapsed[v] * scale
                for v in T.vectorized(width):
                    hidden[token, channel + v] = T.cast(collapsed[v], dtype)

    return collapse_forward


def expand(hidden: Tensor, num_streams: int, *, config: Config) -> Tensor:
    """Copy the hidden state into every stream: `x[i, c] = hidden[c]`.

    Its gradient is `collapse` with mean=False.

    Args:
        hidden: [T, C], bf16, fp16 or fp32, contiguous.
        num_streams: n.
        config: launch knobs.

    Returns:
        x: [T, n, C] in hidden's dtype.
    """
    return _expand(hidden, num_streams, 1.0, config)


def collapse_backward(
    grad_hidden: Tensor, num_streams: int, *, mean: bool, config: Config
) -> Tensor:
    """Gradient of `collapse`: `grad_x[i, c] = grad_hidden[c]`, over n for the mean.

    Args:
        grad_hidden: [T, C], bf16, fp16 or fp32, contiguous.
        num_streams: n.
        mean: whether the streams were averaged, not summed.
        config: launch knobs.

    Returns:
        grad_x: [T, n, C] in grad_hidden's dtype.
    """
    return _expand(grad_hidden, num_streams, 1 / num_streams if mean else 1.0, config)


def _expand(hidden: Tensor, n: int, scale: float, config: Config) -> Tensor:
    tokens, C = hidden.shape
    x = hidden.new_empty(tokens, n, C)
    if tokens:
        arch, dtype = architecture(hidden.device), dtype_name(hidden)
        expand_program(arch, n, C, dtype, scale, config.threads)(hidden, x)
    return x


def collapse(x: Tensor, *, mean: bool, config: Config) -> Tensor:
    """Sum or mean of the streams: `hidden[c] = sum_i x[i, c]`, over n for the mean.

    Args:
        x: [T, n, C], bf16, fp16 or fp32, contiguous.
        mean: whether to average instead of summing.
        config: launch knobs.

    Returns:
        hidden: [T, C] in x's dtype, rounded once.
    """
    tokens, n, C = x.shape
    hidden = x.new_empty(tokens, C)
    if tokens:
        arch, scale = architecture(x.device), 1 / n if mean else 1.0
        collapse_program(arch, n, C, dtype_name(x), scale, config.threads)(x, hidden)
    return hidden


def traffic(problem: Problem) -> int:
    """Bytes that must move, of `expand` and of `collapse`; each is the other's backward."""
    row = problem.channels * ITEM_BYTES[problem.dtype]
    return problem.tokens * (problem.n + 1) * row
