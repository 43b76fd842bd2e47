"""The dot products of `pre`'s backward in a launch of their own, for few tokens and for any GPU.

    grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]

A CTA takes one token at a time, (n + 1) * C elements, and completes the per-token backward state,
which the grad_x / grad_phi pass reads. Where launches overlap, that pass may begin early: every
word is NOT_READY before it may, and written when it is known.
"""

from dataclasses import dataclass
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ..common.architectures import overlaps
from ..common.programs import (
    F32,
    PASS_CONFIGS,
    architecture,
    ceil_div,
    dtype_name,
    logits_per_token,
    macro,
    program,
)
from ..common.rows import WARP, vector_width
from ..mapping.grad_x_pass import is_aligned
from ..mapping.token_state import NOT_READY, state_size, sums_width

# The program guards its own indices (TileLang's guards would split 16-byte accesses) and orders its
# own accesses of shared memory: a thread reads what it has copied itself.
DOTS_PASS_CONFIGS = {
    **PASS_CONFIGS,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_safe_memory_legalize": True,
}
RING_BYTES = 51200  # of a multiprocessor: what two CTAs of the grad_x pass leave, less a reserve


@dataclass(frozen=True)
class Plan:
    """Constants of the program, the first argument of its macros."""

    C: int
    n: int
    dtype: str
    threads: int  # of a CTA; they follow from C and dtype, so that a token's sums keep one order
    num_stages: int  # pieces of a token in the ring
    resident: int  # CTAs a multiprocessor
    overlap: bool  # with the launches before and after

    @property
    def vector(self) -> int:
        """Elements of an access."""
        return vector_width(self.C, self.dtype)

    @property
    def pieces(self) -> int:
        """Pieces of a token: a vector of every thread."""
        return ceil_div(self.C // self.vector, self.threads)

    @property
    def aligned(self) -> bool:
        """Whether vectors are 16 bytes, and go through the ring."""
        return is_aligned(self.C, self.dtype)


def plan_of(C: int, n: int, dtype: str, overlap: bool) -> Plan:
    """The plan of a shape."""
    threads, resident, ring_bytes = 160, 1, RING_BYTES if overlap else RING_BYTES // 2
    if C // vector_width(C, dtype) <= 192:
        threads, resident, ring_bytes = 64, 2, RING_BYTES // 2 - 1024
    stages = ring_bytes // (threads * 16 * (n + 1)) if is_aligned(C, dtype) else 1
    resident = resident if overlap else 3 * resident
    return Plan(C, n, dtype, threads, stages, resident, overlap)


@macro
def fetch(plan: Plan, grad_layer_input, x, ring, token, piece, stage, thread, tokens):
    """Copy a thread's vectors of one piece of a token."""
    channel = (piece * plan.threads + thread) * plan.vector
    if plan.aligned:
        if (channel < plan.C) and (token < tokens):
            T.ptx_cp_async(
                T.access_ptr(ring[stage, plan.n, thread * plan.vector], "w", plan.vector),
                T.access_ptr(grad_layer_input[token, channel], "r", plan.vector),
                plan.vector,
            )
            for i in T.unroll(plan.n):
                T.ptx_cp_async(
                    T.access_ptr(ring[stage, i, thread * plan.vector], "w", plan.vector),
                    T.access_ptr(x[token, i, channel], "r", plan.vector),
                    plan.vector,
                )
        T.ptx_commit_group()


@macro
def multiply(plan: Plan, dots, grad_layer_input, x, ring, token, piece, stage, thread):
    """grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c], a thread's share of a piece."""
    grad = T.alloc_local((plan.vector,), plan.dtype)
    stream = T.alloc_local((plan.vector,), plan.dtype)
    channel = (piece * plan.threads + thread) * plan.vector
    if channel < plan.C:
        for v in T.vectorized(plan.vector):
            if plan.aligned:
                grad[v] = ring[stage, plan.n, thread * plan.vector + v]
            else:
                grad[v] = grad_layer_input[token, channel + v]
        for i in T.unroll(plan.n):
            for v in T.vectorized(plan.vector):
                if plan.aligned:
                    stream[v] = ring[stage, i, thread * plan.vector + v]
                else:
                    stream[v] = x[token, i, channel + v]
            for v in T.unroll(plan.vector):
                dots[i] += T.cast(grad[v], F32) * T.cast(stream[v], F32)


@macro
def mark_not_ready(plan: Plan, state, value: T.Ref, token: T.Ref, block, blocks, thread, tokens):
    """Write NOT_READY to the states of the CTA's tokens, then let the next launch begin."""
    width = state_size(plan.n)
    value = T.reinterpret(T.int32(NOT_READY), F32)
    for step in T.serial(T.ceildiv(tokens - block, blocks)):
        token = T.cast(step, "int64") * blocks + block
        for q in T.unroll(ceil_div(width, plan.threads)):
            k = q * plan.threads + thread
            if k < width:
                T.atomic_store(state[token, k], value, memory_order="relaxed")
    T.call_extern("handle", "__threadfence")
    T.sync_threads()
    T.pdl_trigger()


@macro
def complete(
    plan: Plan, words, shares, step, lane, saved, gate: T.Ref, grad_pre: T.Ref, gate_sum: T.Ref
):  # fmt: skip
    """From the warps' sums of a token to its state, a word a lane; one warp.

    `saved` are inv_rms and the lane's row of projection.
    """
    n, radial = plan.n, logits_per_token(plan.n) + plan.n
    # grad_logits[i] = grad_h_pre[i] * s * (1 - s) ; the word holds s * (1 - s)
    grad_pre = 0.0
    if lane < n:
        for w in T.unroll(plan.threads // WARP):
            grad_pre += shares[step % 2, w, lane]
        grad_pre *= words[0]
        # grad_raw[i] = alpha * grad_logits[i] * inv_rms
        words[0] = grad_pre * gate * saved[0]
    gate_sum = T.warp_reduce_sum(grad_pre * saved[1])
    # radial -= inv_rms^2 / (n*C) * sum_i alpha * grad_logits[i] * projection[i]
    if lane == radial % WARP:
        words[radial // WARP] += gate_sum * gate * (-1.0 / (n * plan.C)) * saved[0] * saved[0]


@program(DOTS_PASS_CONFIGS)
def dots_program(plan: Plan) -> Any:
    """One token a CTA at a time: its n sums, then the rest of its state."""
    tokens, blocks = T.dynamic("tokens"), T.dynamic("blocks")
    C, n, dtype, threads = plan.C, plan.n, plan.dtype, plan.threads
    pieces, stages = plan.pieces, plan.num_stages
    logits, width, sums_row = logits_per_token(n), state_size(n), sums_width(n)
    warps = threads // WARP

    @T.prim_func
    def mhc_pre_backward_dots(
        grad_layer_input: T.Tensor((tokens, C), dtype),
        x: T.Tensor((tokens, n, C), dtype),
        projection: T.Tensor((tokens, logits), F32),
        inv_rms: T.Tensor((tokens,), F32),
        alpha: T.Tensor((3,), F32),
        unfinished_state: T.Tensor((tokens, width), F32),
        state: T.Tensor((tokens, width), F32),
        block_sums: T.Tensor((blocks, sums_row), F32),
    ):
        with T.Kernel(blocks, threads=threads) as block:
            # 72 registers for 160 threads: what the grad_x pass leaves, but those of fp32 and n = 8
            T.annotate_min_blocks_per_sm(2 if dtype == F32 or n == 8 else 5)
            thread = T.get_thread_binding()
            warp, lane = thread // WARP, thread % WARP
            ring = T.alloc_shared((stages, n + 1, threads * plan.vector), dtype)
            dots = T.alloc_local((n,), F32)
            words = T.alloc_local((ceil_div(width, WARP),), F32)
            shares = T.alloc_shared((2, warps, n), F32)
            token = T.alloc_var("int64")
            following = T.alloc_var("int64")
            value = T.alloc_var(F32)
            grad_pre = T.alloc_var(F32)
            gate_sum = T.alloc_var(F32)
            row = T.alloc_var(F32)
            scale = T.alloc_var(F32)
            gate = T.alloc_var(F32, alpha[0])
            grad_bias = T.alloc_var(F32, 0.0)
            grad_alpha = T.alloc_var(F32, 0.0)
            stage = T.alloc_var("int32", 0)

            token = T.cast(block, "int64")
            for ahead in T.unroll(stages):
                token = T.cast(block, "int64") + ahead // pieces * blocks
                fetch(plan, grad_layer_input, x, ring, token, ahead % pieces, ahead, thread, tokens)
            if plan.overlap:
                mark_not_ready(plan, state, value, token, block, blocks, thread, tokens)
            # grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c], then what follows from it
            for step in T.serial(T.ceildiv(tokens - block, blocks)):
                token = T.cast(step, "int64") * blocks + block
                for i in T.unroll(n):
                    dots[i] = 0.0
                for piece in T.unroll(pieces):
                    if plan.aligned:
                        T.ptx_wait_group(stages - 1)
                    multiply(plan, dots, grad_layer_input, x, ring, token, piece, stage, thread)
                    after = piece + stages
                    following = token + after // pieces * blocks
                    fetch(
                        plan, grad_layer_input, x, ring, following, after % pieces, stage, thread,
                        tokens,
                    )  # fmt: skip
                    stage = T.if_then_else(stage == stages - 1, 0, stage + 1)
                for i in T.unroll(n):
                    dots[i] = T.warp_reduce_sum(dots[i])
                if lane == 0:
                    for i in T.unroll(n):
                        shares[step % 2, warp, i] = dots[i]
                if step == 0:
                    if plan.overlap:
                        T.pdl_sync()
                    if warp == 0:
                        scale = inv_rms[token]
                        row = projection[token, T.min(lane, logits - 1)]
                        for q in T.unroll(ceil_div(width, WARP)):
                            words[q] = unfinished_state[token, T.min(q * WARP + lane, width - 1)]
                T.sync_threads()
                if warp == 0:
                    saved = (scale, row)
                    complete(plan, words, shares, step, lane, saved, gate, grad_pre, gate_sum)
                    for q in T.unroll(ceil_div(width, WARP)):
                        if q * WARP + lane < width:
                            T.atomic_store(
                                state[token, q * WARP + lane], words[q], memory_order="relaxed"
                            )
                    grad_bias += grad_pre
                    grad_alpha += gate_sum
                    following = T.min(token + blocks, tokens - 1)
                    scale = inv_rms[following]
                    row = projection[following, T.min(lane, logits - 1)]
                    for q in T.unroll(ceil_div(width, WARP)):
                        words[q] = unfinished_state[following, T.min(q * WARP + lane, width - 1)]
            if warp == 0:
                for q in T.unroll(sums_row // WARP):
                    value = T.if_then_else(q * WARP + lane == logits, grad_alpha, 0.0)
                    if q * WARP + lane < n:
                        value = grad_bias
                    block_sums[block, q * WARP + lane] = value

    return mhc_pre_backward_dots


def resident_blocks(x: Tensor) -> int:
    """CTAs of the program that a multiprocessor runs at once beside the grad_x pass."""
    _, n, C = x.shape
    return plan_of(C, n, dtype_name(x), overlaps(architecture(x.device))).resident


def complete_state(
    grad_layer_input: Tensor,
    x: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    alpha: Tensor,
    unfinished_state: Tensor,
    block_sums: Tensor,
) -> Tensor:
    """Launch `dots_program` on T >= 1 tokens: the per-token backward state [T, state_size(n)].

    `unfinished_state` is that of `token_states` without grad_h_pre; `block_sums` is written.
    """
    _, n, C = x.shape
    arch = architecture(x.device)
    kernel = dots_program(arch, plan_of(C, n, dtype_name(x), overlaps(arch)))
    state = torch.empty_like(unfinished_state)
    kernel(grad_layer_input, x, projection, inv_rms, alpha, unfinished_state, state, block_sums)
    return state
