"""Read-out of the layer's input from the streams, and its gradient.

    forward:   layer_input[c] = sum_i h_pre[i] * x[i, c]
    backward:  grad_x[i, c] = h_pre[i] * grad_layer_input[c]
               grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]

Per token the forward reads n*C elements and writes C (5*C at n = 4), the backward reads (n + 1)*C
and writes n*C (9*C); the weights add 4n bytes in each direction that they go. Everything moves
once, 16 bytes a lane, and stays in registers: a block owns one token (or, in the forward, a part of
one), so a token's bits follow from the token and the configuration. The n dot products of the
backward stay in per-lane sums over the whole row and are combined once a token, in one warp a block
by shuffles alone. `pre` fuses this with the mapping; here h_pre comes from elsewhere.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from .common.knobs import knob, knobs_of
from .common.problem import Problem, Target
from .common.programs import (
    F32,
    ITEM_BYTES,
    PASS_CONFIGS,
    architecture,
    ceil_div,
    dtype_name,
    program,
)
from .common.rows import block_threads, is_block, vector_width

# The forward guards its tails itself; a guard added to an index would split 16-byte accesses.
UNGUARDED = {**PASS_CONFIGS, "tl.disable_safe_memory_legalize": True}


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Launch knobs of the forward.

    Attributes:
        threads: of a block.
        vectors: of channels, at most 16 bytes each, that a thread handles.
    """

    threads: int
    vectors: int = 1

    def __post_init__(self):
        if not is_block(self.threads):
            raise ValueError(
                f"pre_apply: config.threads must be a multiple of 32 up to 1024, got {self.threads}"
            )
        if self.vectors < 1:
            raise ValueError(f"pre_apply: config.vectors must be at least 1, got {self.vectors}")


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Launch knobs of the backward.

    Attributes:
        threads: of a block, which owns one token.
        vector: neighbouring channels that a thread handles in one step.
    """

    threads: int = knob(32, reduction_order=True)
    vector: int = knob(8, reduction_order=True)

    def __post_init__(self):
        if self.threads not in (32, 64, 128, 256, 512):
            raise ValueError(
                f"pre_apply: config.threads must be 32, 64, 128, 256 or 512, got {self.threads}"
            )
        if self.vector not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"pre_apply: config.vector must be 1, 2, 4, 8 or 16, got {self.vector}"
            )


@functools.lru_cache(maxsize=1024)
def default_config(
    problem: Problem, target: Target, *, batch_invariant: bool = False
) -> ForwardConfig | BackwardConfig:
    """A configuration that is safe on every supported GPU.

    Forward: one block a token where it fits (H200, 2026-11-22: 98 to 103% of copy bandwidth).
    Backward: one warp a token; few tokens: up to eight warps share a row's latency, so that the
    dot products add in another order; with batch_invariant they have the configuration of many
    tokens. These alone ran at copy bandwidth in every configuration (8192 x 2560, H200,
    2026-11-22).
    """
    n, channels, dtype = problem.n, problem.channels, problem.dtype
    if problem.kernel == "pre_apply":
        pieces = channels // vector_width(channels, dtype)
        vectors = 2 if pieces > 256 and n <= 4 else 1
        blocks = ceil_div(pieces, 512 * vectors)
        return ForwardConfig(block_threads(channels, dtype, vectors, blocks), vectors)
    vector = vector_width(channels, dtype)
    threads = 32 if problem.tokens >= 1024 or batch_invariant else 256
    while threads > 32 and threads // 2 * vector >= channels:
        threads //= 2
    return BackwardConfig(threads, vector)


def candidates(problem: Problem, target: Target) -> Iterator[ForwardConfig | BackwardConfig]:
    """Configurations worth measuring."""
    n, channels, dtype = problem.n, problem.channels, problem.dtype
    width = vector_width(channels, dtype)
    if problem.kernel == "pre_apply":
        for vectors in (1, 2) if n <= 4 else (1,):
            for blocks in (1, 2, 4, 8, 16):
                threads = block_threads(channels, dtype, vectors, blocks)
                if is_block(threads) and threads * vectors * (blocks - 1) < channels // width:
                    yield ForwardConfig(threads, vectors)
        return
    for threads in (32, 64, 128, 256):
        for vector in (width, 2 * width):
            if threads == 32 or threads * vector <= 2 * channels:
                yield BackwardConfig(threads, vector)


@program(UNGUARDED)
def forward_program(n: int, channels: int, dtype: str, threads: int, vectors: int) -> Any:
    """One token, or a part of one, a block; see the module's docstring."""
    width = vector_width(channels, dtype)
    block_channels = threads * vectors * width
    blocks = ceil_div(channels, block_channels)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def pre_apply_forward(
        x: T.Tensor((tokens, n, channels), dtype),
        h_pre: T.Tensor((tokens, n), F32),
        layer_input: T.Tensor((tokens, channels), dtype),
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
                if channel < channels:
                    for i in T.unroll(n):
                        for v in T.vectorized(width):
                            x_vector[piece, i, v] = x[token, i, channel + v]
            for piece in T.unroll(vectors):
                channel = block % blocks * block_channels + (piece * threads + tx) * width
                if channel < channels:
                    # layer_input[c] = sum_i h_pre[i] * x[i, c]
                    for v in T.unroll(width):
                        applied[v] = 0.0
                    for i in T.unroll(n):
                        for v in T.unroll(width):
                            applied[v] += weights[i] * T.cast(x_vector[piece, i, v], F32)
                    for v in T.vectorized(width):
                        layer_input[token, channel + v] = T.cast(applied[v], dtype)

    return pre_apply_forward


@program()
def backward_program(n: int, channels: int, dtype: str, threads: int, vector: int) -> Any:
    """One token a block; see the module's docstring."""
    tokens = T.dynamic("tokens")
    tile = threads * vector

    @T.prim_func
    def pre_apply_backward(
        grad_layer_input: T.Tensor((tokens, channels), dtype),
        x: T.Tensor((tokens, n, channels), dtype),
        h_pre: T.Tensor((tokens, n), F32),
        grad_x: T.Tensor((tokens, n, channels), dtype),
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
            for step in T.serial(T.ceildiv(channels, tile)):
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
    tokens, n, channels = x.shape
    layer_input = x.new_empty(tokens, channels)
    if tokens:
        dtype = dtype_name(x)
        constants = (n, channels, dtype, *knobs_of(config))
        forward_program(architecture(x.device), *constants)(x, h_pre, layer_input)
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
    tokens, n, channels = x.shape
    grad_x = torch.empty_like(x)
    grad_h_pre = torch.empty_like(h_pre)
    if tokens:
        dtype = dtype_name(x)
        constants = (n, channels, dtype, *knobs_of(config))
        kernel = backward_program(architecture(x.device), *constants)
        kernel(grad_layer_input, x, h_pre, grad_x, grad_h_pre)
    return grad_x, grad_h_pre


def traffic(problem: Problem) -> int:
    """Bytes that must move, forward or backward."""
    n, row = problem.n, problem.channels * ITEM_BYTES[problem.dtype]
    if problem.kernel == "pre_apply":
        return problem.tokens * ((n + 1) * row + 4 * n)
    return problem.tokens * ((2 * n + 1) * row + 8 * n)
