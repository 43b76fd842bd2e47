"""Post-apply fused with the residual merge, and its gradient.

    forward:   x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]
    backward:  grad_x[i, c] = sum_o h_res[o, i] * grad_x_next[o, c]
               grad_layer_output[c] = sum_o h_post[o] * grad_x_next[o, c]
               grad_h_post[o] = sum_c grad_x_next[o, c] * layer_output[c]
               grad_h_res[o, i] = sum_c grad_x_next[o, c] * x[i, c]

Per token the forward reads (n + 1) C elements and writes n C; the backward reads (2n + 1) C and
writes (n + 1) C, or C without grad_x. Every element crosses the chip once and is used from
registers. docs/kernels/merge.md has the pipelines.
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

# The backward of few tokens has fewer than 128 threads a token where a lane then takes at most so
# many steps along the row.
FEW_STEPS = 3


class ForwardConfig(RowConfig):
    """Launch knobs of the forward."""

    op = "merge"


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Launch knobs of the backward, whose blocks own one token."""

    threads: int = knob(32, reduction_order=True)
    vector: int = knob(8, reduction_order=True)  # neighbouring channels of a thread in one step
    min_blocks: int = 1  # a multiprocessor that the registers must allow

    def __post_init__(self):
        threads = (32, 64, 128, 256, 512)
        fits = 1 <= self.min_blocks * self.threads <= 2048
        check(
            "merge",
            self,
            threads=(self.threads in threads, "32, 64, 128, 256 or 512"),
            vector=(self.vector in (1, 2, 4, 8), "1, 2, 4 or 8"),
            min_blocks=(fits, "at least 1 and at most 2048 / threads"),
        )


@functools.lru_cache(maxsize=1024)
def default_config(
    problem: Problem, target: Target, *, batch_invariant: bool = False
) -> ForwardConfig | BackwardConfig:
    """A configuration that is safe on every supported GPU.

    Backward of many tokens: one warp a token, with registers for 16 of them a multiprocessor, 8 for
    n = 8. Few tokens have up to four warps each, which add the dot products in another order;
    `batch_invariant` gives them the configuration of many.
    """
    n, C, dtype = problem.n, problem.channels, problem.dtype
    if problem.kernel == "merge":
        return ForwardConfig(*default_row(problem))
    vector = _backward_vector(n, C, dtype)
    warps = 16 if n <= 4 else 8
    if problem.tokens >= 1024 or batch_invariant:
        narrow = _steps_waste(C, vector) and n <= 4
        return BackwardConfig(32, 4, 20) if narrow else BackwardConfig(32, vector, warps)
    threads = 128
    while threads > 32 and threads // 2 * vector * FEW_STEPS >= C:
        threads //= 2
    return BackwardConfig(threads, vector, warps * 32 // threads)


def candidates(problem: Problem, target: Target) -> Iterator[ForwardConfig | BackwardConfig]:
    """Configurations worth measuring.

    Not among them for n = 4: a backward without a bound on its registers, faster up to 256 tokens
    and slower at 512. No number of tokens between the two is tuned.
    """
    n, C, dtype = problem.n, problem.channels, problem.dtype
    if problem.kernel == "merge":
        yield from (ForwardConfig(*row) for row in candidate_rows(problem))
        return
    vector = _backward_vector(n, C, dtype)
    if _steps_waste(C, vector):
        yield from (BackwardConfig(32, 4, warps) for warps in (16, 20) if n <= 4)
    for threads in (32, 64, 128, 256):
        if threads == 32 or threads * vector <= 2 * C:
            for warps in (16, 20) if n == 4 else (threads // 32, 16, 20):
                if warps * 32 % threads == 0:
                    yield BackwardConfig(threads, vector, warps * 32 // threads)


def _backward_vector(n: int, C: int, dtype: str) -> int:
    """Channels a lane; four at most with eight streams, whose 72 sums and 64 weights fill it."""
    return min(vector_width(C, dtype), 8 if n <= 4 else 4)


def _steps_waste(C: int, vector: int) -> bool:
    """Whether a tenth or more of a warp's lanes has no channels in a step, with 8 a lane."""
    return vector == 8 and ceil_div(C, 256) * 256 > 1.1 * C


@program(UNGUARDED)
def forward_program(n: int, C: int, dtype: str, threads: int, vectors: int) -> Any:
    """One token, or a part of one, a block; see the module's docstring."""
    width = vector_width(C, dtype)
    block_channels = threads * vectors * width
    blocks = ceil_div(C, block_channels)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def merge_forward(
        x: T.Tensor((tokens, n, C), dtype),
        layer_output: T.Tensor((tokens, C), dtype),
        h_post: T.Tensor((tokens, n), F32),
        h_res: T.Tensor((tokens, n * n), F32),
        x_next: T.Tensor((tokens, n, C), dtype),
    ):
        with T.Kernel(tokens * blocks, threads=threads) as block:
            tx = T.get_thread_binding()
            token = T.cast(block // blocks, "int64")
            x_vector = T.alloc_local((n, width), dtype)
            output_vector = T.alloc_local((width,), dtype)
            residual = T.alloc_local((n * n,), F32)
            post = T.alloc_local((n,), F32)
            merged = T.alloc_local((width,), F32)
            for v in T.vectorized(n * n):
                residual[v] = h_res[token, v]
            for v in T.vectorized(n):
                post[v] = h_post[token, v]
            # x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]
            for piece in T.unroll(vectors):
                channel = block % blocks * block_channels + (piece * threads + tx) * width
                if channel < C:
                    for i in T.unroll(n):
                        for v in T.vectorized(width):
                            x_vector[i, v] = x[token, i, channel + v]
                    for v in T.vectorized(width):
                        output_vector[v] = layer_output[token, channel + v]
                    for o in T.unroll(n):
                        for v in T.unroll(width):
                            merged[v] = post[o] * T.cast(output_vector[v], F32)
                        for i in T.unroll(n):
                            for v in T.unroll(width):
                                merged[v] += residual[o * n + i] * T.cast(x_vector[i, v], F32)
                        for v in T.vectorized(width):
                            x_next[token, o, channel + v] = T.cast(merged[v], dtype)

    return merge_forward


@program()
def backward_program(
    n: int, C: int, dtype: str, with_grad_x: bool, threads: int, vector: int, min_blocks: int
) -> Any:
    """One token a block; see the module's docstring."""
    tokens = T.dynamic("tokens")
    tile = threads * vector

    @T.prim_func
    def merge_backward(
        grad_x_next: T.Tensor((tokens, n, C), dtype),
        x: T.Tensor((tokens, n, C), dtype),
        layer_output: T.Tensor((tokens, C), dtype),
        h_post: T.Tensor((tokens, n), F32),
        h_res: T.Tensor((tokens, n, n), F32),
        grad_x: T.Tensor((tokens, n, C), dtype),
        grad_layer_output: T.Tensor((tokens, C), dtype),
        grad_h_post: T.Tensor((tokens, n), F32),
        grad_h_res: T.Tensor((tokens, n, n), F32),
    ):
        with T.Kernel(tokens, threads=threads) as block:
            T.annotate_min_blocks_per_sm(min_blocks)
            # from the last token on: what the launch ahead wrote last is in L2
            token = tokens - 1 - block
            grad = T.alloc_fragment((n, tile), dtype)
            stream = T.alloc_fragment((n, tile), dtype)
            output = T.alloc_fragment((tile,), dtype)
            grad_stream = T.alloc_fragment((n, tile), F32)
            grad_output = T.alloc_fragment((tile,), F32)
            post = T.alloc_fragment((n,), F32)
            res = T.alloc_fragment((n, n), F32)
            post_dots = T.alloc_reducer((n,), F32, op="sum")
            res_dots = T.alloc_reducer((n, n), F32, op="sum")
            T.copy(h_post[token, 0:n], post)
            if with_grad_x:
                T.copy(h_res[token, 0:n, 0:n], res)
            T.reducer_init(post_dots)
            T.reducer_init(res_dots)
            for step in T.serial(T.ceildiv(C, tile)):
                first = step * tile
                T.copy(grad_x_next[token, 0:n, first : first + tile], grad)
                T.copy(x[token, 0:n, first : first + tile], stream)
                T.copy(layer_output[token, first : first + tile], output)
                if with_grad_x:
                    T.clear(grad_stream)
                T.clear(grad_output)
                for o in T.serial(n):
                    # grad_x[i, c] = sum_o h_res[o, i] * grad_x_next[o, c]
                    if with_grad_x:
                        for i in T.serial(n):
                            for c in T.Parallel(tile):
                                grad_stream[i, c] += res[o, i] * T.cast(grad[o, c], F32)
                    # grad_layer_output[c] = sum_o h_post[o] * grad_x_next[o, c]
                    for c in T.Parallel(tile):
                        grad_output[c] += post[o] * T.cast(grad[o, c], F32)
                # grad_h_res[o, i] = sum_c grad_x_next[o, c] * x[i, c]
                for o, i, c in T.Parallel(n, n, tile):
                    T.reducer_update(
                        res_dots[o, i], T.cast(grad[o, c], F32) * T.cast(stream[i, c], F32)
                    )
                # grad_h_post[o] = sum_c grad_x_next[o, c] * layer_output[c]
                for o, c in T.Parallel(n, tile):
                    T.reducer_update(post_dots[o], T.cast(grad[o, c], F32) * T.cast(output[c], F32))
                if with_grad_x:
                    T.copy(grad_stream, grad_x[token, 0:n, first : first + tile])
                T.copy(grad_output, grad_layer_output[token, first : first + tile])
            T.finalize_reducer(res_dots, res)
            T.finalize_reducer(post_dots, post)
            T.copy(res, grad_h_res[token, 0:n, 0:n])
            T.copy(post, grad_h_post[token, 0:n])

    return merge_backward


def forward(
    x: Tensor,
    layer_output: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    *,
    config: ForwardConfig,
) -> Tensor:
    """The streams after the sublayer (eq. 7).

    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]`

    Args:
        x: [T, n, C], bf16, fp16 or fp32, contiguous. The streams.
        layer_output: [T, C], dtype of x. What the layer returned.
        h_post: [T, n], fp32. Write-in weights.
        h_res: [T, n, n], fp32. Residual mixing, [out, in].
        config: launch knobs.

    Returns:
        x_next: [T, n, C] in x's dtype, rounded once.
    """
    tokens, n, C = x.shape
    x_next = torch.empty_like(x)
    if tokens:
        kernel = forward_program(architecture(x.device), n, C, dtype_name(x), *knobs_of(config))
        kernel(x, layer_output, h_post, h_res.view(tokens, n * n), x_next)
    return x_next


def backward(
    grad_x_next: Tensor,
    x: Tensor,
    layer_output: Tensor,
    h_post: Tensor,
    h_res: Tensor | None,
    *,
    config: BackwardConfig,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradient of `forward`; the equations are the module's.

    Args:
        grad_x_next: [T, n, C], dtype of x, contiguous.
        x: [T, n, C], bf16, fp16 or fp32. What `forward` read, as are the next three.
        layer_output: [T, C], dtype of x.
        h_post: [T, n], fp32.
        h_res: [T, n, n], fp32, [out, in]. None: grad_x is left to `pre_backward`.
        config: launch knobs.

    Returns:
        grad_x [T, n, C] (None without h_res), grad_layer_output [T, C] in x's dtype; grad_h_post
        [T, n], grad_h_res [T, n, n], fp32.
    """
    tokens, n, C = x.shape
    grad_x = None if h_res is None else torch.empty_like(x)
    grad_h_res = h_post.new_empty(tokens, n, n)
    grads = (torch.empty_like(layer_output), torch.empty_like(h_post), grad_h_res)
    if tokens:
        constants = (n, C, dtype_name(x), grad_x is not None, *knobs_of(config))
        kernel = backward_program(architecture(x.device), *constants)
        # what a program does not read or write still has its shape
        unread, unwritten = (h_res, grad_x) if grad_x is not None else (grad_h_res, x)
        kernel(grad_x_next, x, layer_output, h_post, unread, unwritten, *grads)
    return grad_x, *grads


def traffic(problem: Problem) -> int:
    """Bytes that must move: forward, backward, or backward without grad_x."""
    n, row = problem.n, problem.channels * ITEM_BYTES[problem.dtype]
    maps = 4 * (n * n + n)
    if problem.kernel == "merge":
        return problem.tokens * ((2 * n + 1) * row + maps)
    if problem.kernel == "merge_backward_maps":
        return problem.tokens * ((2 * n + 2) * row + maps + 4 * n)
    return problem.tokens * ((3 * n + 2) * row + 2 * maps)
