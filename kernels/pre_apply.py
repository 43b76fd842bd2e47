"""Read-out of the layer's input from the streams, and its gradient.

    forward:   layer_input[c] = sum_i h_pre[i] * x[i, c]
    backward:  grad_x[i, c] = h_pre[i] * grad_layer_input[c]
               grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]

Per token the forward reads n C elements and writes C; the backward reads (n + 1) C and writes n C.
Every element crosses the chip once and is used from registers. docs/kernels/pre_apply.md has the
pipelines.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from .common.knobs import check, knob, knobs_of
from .common.problem import Problem, Target
from .common.programs import (
    F32,
    ITEM_BYTES,
    UNGUARDED,
    architecture,
    ceil_div,
    dtype_name,
    program,
)
from .common.rows import RowConfig, candidate_rows, default_row, vector_width


class ForwardConfig(RowConfig):
    """Launch knobs of the forward."""

    op = "pre_apply"


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Launch knobs of the backward, whose blocks own one token."""

    threads: int = knob(32, reduction_order=True)
    vector: int = knob(8, reduction_order=True)  # neighbouring channels of a thread in one step

    def __post_init__(self):
        threads = (32, 64, 128, 256, 512)
        check(
            "pre_apply",
            self,
            threads=(self.threads in threads, "32, 64, 128, 256 or 512"),
            vector=(self.vector in (1, 2, 4, 8, 16), "1, 2, 4, 8 or 16"),
        )


@functools.lru_cache(maxsize=1024)
def default_config(
    problem: Problem, target: Target, *, batch_invariant: bool = False
) -> ForwardConfig | BackwardConfig:
    """A configuration that is safe on every supported GPU.

    Backward of many tokens: one warp a token. Few tokens have up to eight warps each, which add the
    dot products in another order; batch_invariant gives them the configuration of many.
    """
    C, dtype = problem.channels, problem.dtype
    if problem.kernel == "pre_apply":
        return ForwardConfig(*default_row(problem))
    vector = vector_width(C, dtype)
    threads = 32 if problem.tokens >= 1024 or batch_invariant else 256
    while threads > 32 and threads // 2 * vector >= C:
        threads //= 2
    return BackwardConfig(threads, vector)


def candidates(problem: Problem, target: Target) -> Iterator[ForwardConfig | BackwardConfig]:
    """Configurations worth measuring."""
    C, dtype = problem.channels, problem.dtype
    width = vector_width(C, dtype)
    if problem.kernel == "pre_apply":
        yield from (ForwardConfig(*row) for row in candidate_rows(problem))
        return
    for threads in (32, 64, 128, 256):
        for vector in (width, 2 * width):
            if threads == 32 or threads * vector <= 2 * C:
                yield BackwardConfig(threads, vector)


@program(UNGUARDED)
def forward_program(n: int, C: int, dtype: str, threads: int, vectors: int) -> Any:
    """One token, or a part of one, a block; see the module's docstring."""
    width = vector_width(C, dtype)
    block_channels = threads * vectors * width
    blocks = ceil_div(C, block_channels)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def pre_apply_forward(
        x: T.Tensor((tokens, n, C), dtype),
        h_pre: T.Tensor((tokens, n), F32),
        layer_input: T.Tensor((tokens, C), dtype),
    ):
        with T.Kernel(tokens * blocks, threads=threads) as block:
            tx = T.get_thread_binding()
            token = T.cast(block // blocks, "int64")
            x_vector = T.alloc_local((vectors, n, width), dtype)
            weights = T.alloc_local((n,), F32)
            applied = T.alloc_local((width,), F32)
            for v in T.vectorized(n):
                weights[v] = h_pre[token, v]
            # every load is on its way before the first use
            for piece in T.unroll(vectors):
                channel = block % blocks * block_channels + (piece * threads + tx) * width
                if channel < C:
                    for i in T.unroll(n):
                        for v in T.vectorized(width):
                            x_vector[piece, i, v] = x[token, i, channel + v]
            # layer_input[c] = sum_i h_pre[i] * x[i, c]
            for piece in T.unroll(vectors):
                channel = block % blocks * block_channels + (piece * threads + tx) * width
                if channel < C:
                    for v in T.unroll(width):
                        applied[v] = 0.0
                    for i in T.unroll(n):
                        for v in T.unroll(width):
                            applied[v] += weights[i] * T.cast(x_vector[piece, i, v], F32)
                    for v in T.vectorized(width):
                        layer_input[token, channel + v] = T.cast(applied[v], dtype)

    return pre_apply_forward


@program()
def backward_program(n: int, C: int, dtype: str, threads: int, vector: int) -> Any:
    """One token a block; see the module's docstring."""
    tokens = T.dynamic("tokens")
    tile = threads * vector

    @T.prim_func
    def pre_apply_backward(
        grad_layer_input: T.Tensor((tokens, C), dtype),
        x: T.Tensor((tokens, n, C), dtype),
        h_pre: T.Tensor((tokens, n), F32),
        grad_x: T.Tensor((tokens, n, C), dtype),
        grad_h_pre: T.Tensor((tokens, n), F32),
    ):
        with T.Kernel(tokens, threads=threads) as token:
            grad = T.alloc_fragment((tile,), dtype)
            stream = T.alloc_fragment((n, tile), dtype)
            grad_stream = T.alloc_fragment((n, tile), dtype)
            weights = T.alloc_fragment((n,), F32)
            dots = T.alloc_reducer((n,), F32, op="sum")
            T.reducer_init(dots)
            T.copy(h_pre[token, 0:n], weights)
            for step in T.serial(T.ceildiv(C, tile)):
                first = step * tile
                T.copy(grad_layer_input[token, first : first + tile], grad)
                T.copy(x[token, 0:n, first : first + tile], stream)
                # grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]
                for i, c in T.Parallel(n, tile):
                    T.reducer_update(dots[i], T.cast(grad[c], F32) * T.cast(stream[i, c], F32))
                # grad_x[i, c] = h_pre[i] * grad_layer_input[c]
                for i, c in T.Parallel(n, tile):
                    grad_stream[i, c] = weights[i] * T.cast(grad[c], F32)
                T.copy(grad_stream, grad_x[token, 0:n, first : first + tile])
            T.finalize_reducer(dots, weights)
            T.copy(weights, grad_h_pre[token, 0:n])

    return pre_apply_backward


def forward(x: Tensor, h_pre: Tensor, *, config: ForwardConfig) -> Tensor:
    """What the layer reads: `layer_input[c] = sum_i h_pre[i] * x[i, c]`.

    Args:
        x: [T, n, C], bf16, fp16 or fp32, contiguous. The streams.
        h_pre: [T, n], fp32. Read-out weights.
        config: launch knobs.

    Returns:
        layer_input: [T, C] in x's dtype, rounded once.
    """
    tokens, n, C = x.shape
    layer_input = x.new_empty(tokens, C)
    if tokens:
        kernel = forward_program(architecture(x.device), n, C, dtype_name(x), *knobs_of(config))
        kernel(x, h_pre, layer_input)
    return layer_input


def backward(
    grad_layer_input: Tensor, x: Tensor, h_pre: Tensor, *, config: BackwardConfig
) -> tuple[Tensor, Tensor]:
    """Gradient of `forward`; the equations are the module's.

    Args:
        grad_layer_input: [T, C], dtype of x, contiguous.
        x: [T, n, C], bf16, fp16 or fp32. What `forward` read, as is h_pre.
        h_pre: [T, n], fp32.
        config: launch knobs.

    Returns:
        grad_x [T, n, C] in x's dtype; grad_h_pre [T, n], fp32.
    """
    tokens, n, C = x.shape
    grad_x = torch.empty_like(x)
    grad_h_pre = torch.empty_like(h_pre)
    if tokens:
        kernel = backward_program(architecture(x.device), n, C, dtype_name(x), *knobs_of(config))
        kernel(grad_layer_input, x, h_pre, grad_x, grad_h_pre)
    return grad_x, grad_h_pre


def traffic(problem: Problem) -> int:
    """Bytes that must move, forward or backward."""
    n, row = problem.n, problem.channels * ITEM_BYTES[problem.dtype]
    if problem.kernel == "pre_apply":
        return problem.tokens * ((n + 1) * row + 4 * n)
    return problem.tokens * ((2 * n + 1) * row + 8 * n)
