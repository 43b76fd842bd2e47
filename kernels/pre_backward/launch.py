"""pre, backward: from the cotangents of layer_input, h_post and h_res to x, phi, alpha and bias.

    grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]
    grad_h_res_logits = Sinkhorn's gradient, then all of mapping's: see `mapping_backward`
    grad_x[i, c]  = h_pre[i] * grad_layer_input[c] + grad_x_part[i, c]
                    + sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]

grad_x_part is what merge's backward left of grad_x, so grad_x is written once, complete. With h_res
it is merge's own cotangent, grad_x_next, and `sum_o h_res[o, i] * grad_x_part[o, c]` is added:
merge's backward then writes 4 C less. grad_x needs grad_h_pre, a sum over the whole token, so x is
needed twice. One thread a token leaves the token's record, without what grad_h_pre decides.

Many tokens go through `pre_backward_team`, which reads x once: 13 C elements a token at n = 4, the
floor. Few tokens, and what has no teams (other n than 4, fp16, fp32, before sm_90), take two
launches: dot products ((n + 1) C elements a token read), which complete the records, and columns
((2n + 1) C read, n C written), 18 C. The ordered sum of grad_phi's parts is the last launch.

From sm_90 on a launch may begin before the one ahead has ended: the dot products begin beside the
records' launch, fill `records` with `PENDING` before the columns may begin, and write a token's
words when they have its sums; the columns load phi and their first tokens meanwhile and wait for
each word. Nothing waits for a launch behind it, so one after another is right, too. Only the first
launch waits for whatever ran before, so no buffer is still in use.
"""

from collections.abc import Iterator

import tilelang.language as T
import torch
from torch import Tensor

from ..common.architectures import overlaps
from ..common.problem import Problem, Target
from ..common.programs import (
    F32,
    ITEM_BYTES,
    PASS_CONFIGS,
    architecture,
    ceil_div,
    dtype_name,
    logits_per_token,
    multiprocessors,
    program,
)
from ..common.rows import WARP, vector_width
from ..mapping import grad_x_pass as _mapping_columns
from ..mapping.backward import add_parts, gradients_from_records
from ..mapping.grad_x_pass import Config, is_aligned
from ..mapping.token_state import PENDING, record_width, sums_width, token_records
from . import persistent as pre_backward_team

__all__ = ["Config", "backward", "candidates", "default_config", "traffic"]

# The program guards its own indices (TileLang's guards would split 16-byte accesses) and orders its
# own accesses of shared memory: a thread reads what it has copied itself.
DOTS_PASS_CONFIGS = {
    **PASS_CONFIGS,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_safe_memory_legalize": True,
}
MANY_ROUNDS = 16  # groups a team, from which on one pass is faster than two (H200, 2026-11-24)
RING_BYTES = 51200  # of a multiprocessor: what two blocks of the columns leave free, less a reserve


def default_config(
    problem: Problem, target: Target, *, batch_invariant: bool = False
) -> Config | pre_backward_team.Config:
    """One pass by teams for many tokens where the GPU can run it, else two passes over x.

    H200, 2026-11-24, us, team / two passes: 8192x1280 104 / 105, 8192x2560 182 / 201, 8192x4096
    277 / 304, 4096x7168 270 / 299; 2048x2560 65 / 64. They add the dot products in another order.

    Args:
        problem: the shape and the dtype of x.
        target: the GPU.
        batch_invariant: the same form for every number of tokens, that of many.
    """
    if problem.dtype == "bfloat16":
        team = pre_backward_team.default_config(problem.at(1), target)
        if team and (batch_invariant or problem.tokens >= MANY_ROUNDS * team.group * team.teams):
            return team
    return _mapping_columns.default_config(problem, target)


def candidates(problem: Problem, target: Target) -> Iterator[Config | pre_backward_team.Config]:
    """Configurations worth measuring."""
    yield from _mapping_columns.candidates(problem, target)
    if problem.dtype == "bfloat16":
        yield from pre_backward_team.candidates(problem, target)


def dots_shape(channels: int, n: int, dtype: str, overlap: bool) -> tuple[int, int, int]:
    """Threads that share a token, pieces of a token in their ring, blocks a multiprocessor.

    The threads are a function of C and dtype alone, so that a token's sums keep one order. H200,
    2026-11-23, the whole backward: 2 x 64 threads take 104 us at 8192 x 1280 where 160 take 110;
    160 take 298 us at 8192 x 4096 where 128 take 310 and 2 x 64 take 314.
    """
    vectors = channels // vector_width(channels, dtype)
    threads, blocks, ring_bytes = 160, 1, RING_BYTES if overlap else RING_BYTES // 2
    if vectors <= 192:
        threads, blocks, ring_bytes = 64, 2, RING_BYTES // 2 - 1024
    return threads, ring_bytes // (threads * 16 * (n + 1)), blocks if overlap else 3 * blocks


@program(DOTS_PASS_CONFIGS)
def dots_program(channels, n, dtype, threads, ring, overlap):
    """One token a block at a time: its n sums, then the rest of its record."""
    tokens, blocks = T.dynamic("tokens"), T.dynamic("blocks")
    logits, width, sums_row = logits_per_token(n), record_width(n), sums_width(n)
    vector = vector_width(channels, dtype)
    warps, words = threads // WARP, ceil_div(width, WARP)
    pieces = ceil_div(channels // vector, threads)
    aligned = is_aligned(channels, dtype)
    ring = ring if aligned else 1

    @T.macro
    def fetch(grad_layer_input, x, tile, token, piece, slot, thread):
        """Ask for a thread's vectors of one piece of a token."""
        channel = (piece * threads + thread) * vector
        if aligned:
            if (channel < channels) and (token < tokens):
                T.ptx_cp_async(
                    T.access_ptr(tile[slot, n, thread * vector], "w", vector),
                    T.access_ptr(grad_layer_input[token, channel], "r", vector),
                    vector,
                )
                for i in T.unroll(n):
                    T.ptx_cp_async(
                        T.access_ptr(tile[slot, i, thread * vector], "w", vector),
                        T.access_ptr(x[token, i, channel], "r", vector),
                        vector,
                    )
            T.ptx_commit_group()

    @T.macro
    def multiply(dots, grad_layer_input, x, tile, token, piece, slot, thread):
        """grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c], a thread's share of a piece."""
        grad = T.alloc_local((vector,), dtype)
        stream = T.alloc_local((vector,), dtype)
        channel = (piece * threads + thread) * vector
        if channel < channels:
            for v in T.vectorized(vector):
                if aligned:
                    grad[v] = tile[slot, n, thread * vector + v]
                else:
                    grad[v] = grad_layer_input[token, channel + v]
            for i in T.unroll(n):
                for v in T.vectorized(vector):
                    if aligned:
                        stream[v] = tile[slot, i, thread * vector + v]
                    else:
                        stream[v] = x[token, i, channel + v]
                for v in T.unroll(vector):
                    dots[i] += T.cast(grad[v], F32) * T.cast(stream[v], F32)

    @T.prim_func
    def pre_backward_dots(
        grad_layer_input: T.Tensor((tokens, channels), dtype),
        x: T.Tensor((tokens, n, channels), dtype),
        projection: T.Tensor((tokens, logits), F32),
        inv_rms: T.Tensor((tokens,), F32),
        alpha: T.Tensor((3,), F32),
        unfinished: T.Tensor((tokens, width), F32),
        records: T.Tensor((tokens, width), F32),
        block_sums: T.Tensor((blocks, sums_row), F32),
    ):
        with T.Kernel(blocks, threads=threads) as block:
            # 72 registers for 160 threads: what the columns leave, but those of fp32 and n = 8
            T.annotate_min_blocks_per_sm(2 if dtype == F32 or n == 8 else 5)
            thread = T.get_thread_binding()
            warp, lane = thread // WARP, thread % WARP
            tile = T.alloc_shared((ring, n + 1, threads * vector), dtype)
            dots = T.alloc_local((n,), F32)
            word = T.alloc_local((words,), F32)
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
            slot = T.alloc_var("int32", 0)

            token = T.cast(block, "int64")
            for ahead in T.unroll(ring):
                token = T.cast(block, "int64") + ahead // pieces * blocks
                fetch(grad_layer_input, x, tile, token, ahead % pieces, ahead, thread)
            if overlap:
                value = T.reinterpret(T.int32(PENDING), F32)
                for step in T.serial(T.ceildiv(tokens - block, blocks)):
                    token = T.cast(step, "int64") * blocks + block
                    for q in T.unroll(ceil_div(width, threads)):
                        k = q * threads + thread
                        if k < width:
                            T.atomic_store(records[token, k], value, memory_order="relaxed")
                T.call_extern("handle", "__threadfence")
                T.sync_threads()
                T.pdl_trigger()
            for step in T.serial(T.ceildiv(tokens - block, blocks)):
                token = T.cast(step, "int64") * blocks + block
                for i in T.unroll(n):
                    dots[i] = 0.0
                for piece in T.unroll(pieces):
                    if aligned:
                        T.ptx_wait_group(ring - 1)
                    multiply(dots, grad_layer_input, x, tile, token, piece, slot, thread)
                    after = piece + ring
                    following = token + after // pieces * blocks
                    fetch(grad_layer_input, x, tile, following, after % pieces, slot, thread)
                    slot = T.if_then_else(slot == ring - 1, 0, slot + 1)
                for i in T.unroll(n):
                    dots[i] = T.warp_reduce_sum(dots[i])
                if lane == 0:
                    for i in T.unroll(n):
                        shares[step % 2, warp, i] = dots[i]
                if step == 0:
                    if overlap:
                        T.pdl_sync()
                    if warp == 0:
                        scale = inv_rms[token]
                        row = projection[token, T.min(lane, logits - 1)]
                        for q in T.unroll(words):
                            word[q] = unfinished[token, T.min(q * WARP + lane, width - 1)]
                T.sync_threads()
                if warp == 0:
                    # grad_logits[i] = grad_h_pre[i] * s * (1 - s) ; the word holds s * (1 - s)
                    grad_pre = 0.0
                    if lane < n:
                        for w in T.unroll(warps):
                            grad_pre += shares[step % 2, w, lane]
                        grad_pre *= word[0]
                        # grad_raw[i] = alpha * grad_logits[i] * inv_rms
                        word[0] = grad_pre * gate * scale
                    gate_sum = T.warp_reduce_sum(grad_pre * row)
                    # radial -= inv_rms^2 / (n*C) * sum_i alpha * grad_logits[i] * projection[i]
                    if lane == (logits + n) % WARP:
                        word[(logits + n) // WARP] += (
                            gate_sum * gate * (-1.0 / (n * channels)) * scale * scale
                        )
                    for q in T.unroll(words):
                        if q * WARP + lane < width:
                            T.atomic_store(
                                records[token, q * WARP + lane], word[q], memory_order="relaxed"
                            )
                    grad_bias += grad_pre
                    grad_alpha += gate_sum
                    following = T.min(token + blocks, tokens - 1)
                    scale = inv_rms[following]
                    row = projection[following, T.min(lane, logits - 1)]
                    for q in T.unroll(words):
                        word[q] = unfinished[following, T.min(q * WARP + lane, width - 1)]
            if warp == 0:
                for q in T.unroll(sums_row // WARP):
                    value = T.if_then_else(q * WARP + lane == logits, grad_alpha, 0.0)
                    if q * WARP + lane < n:
                        value = grad_bias
                    block_sums[block, q * WARP + lane] = value

    return pre_backward_dots


def finish_records(
    grad_layer_input: Tensor,
    x: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    alpha: Tensor,
    unfinished: Tensor,
    block_sums: Tensor,
) -> Tensor:
    """Launch `dots_program`.

    Args:
        grad_layer_input: [T, C] in x's dtype.
        x: [T, n, C], T at least 1.
        projection: [T, n*n + 2n], fp32.
        inv_rms: [T], fp32.
        alpha: [3], fp32.
        unfinished: [T, record_width(n)], fp32, of `token_records` without grad_h_pre.
        block_sums: [blocks, sums_width(n)], fp32; written.

    Returns:
        records [T, record_width(n)], fp32.
    """
    _, n, channels = x.shape
    arch = architecture(x.device)
    overlap = overlaps(arch)
    threads, ring, _ = dots_shape(channels, n, dtype_name(x), overlap)
    records = torch.empty_like(unfinished)
    kernel = dots_program(arch, channels, n, dtype_name(x), threads, ring, overlap)
    kernel(grad_layer_input, x, projection, inv_rms, alpha, unfinished, records, block_sums)
    return records


def backward(
    grad_layer_input: Tensor,
    grad_h_post: Tensor,
    grad_h_res: Tensor,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    grad_x_part: Tensor | None = None,
    h_res: Tensor | None = None,
    *,
    pre_eps: float,
    post_scale: float,
    iters: int,
    sinkhorn_eps: float,
    config: Config | pre_backward_team.Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `reference.pre`; see the module's docstring for the equations.

    Args:
        grad_layer_input: [T, C] in x's dtype. Cotangent of what the layer read.
        grad_h_post: [T, n], fp32. Cotangent of the write-in weights.
        grad_h_res: [T, n, n], fp32. Cotangent of the residual mixing, [out, in].
        x: [T, n, C], bf16, fp16 or fp32. The residual streams.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        projection: [T, n*n + 2n], fp32. As the forward saved it.
        inv_rms: [T], fp32. As the forward saved it.
        grad_x_part: [T, n, C] in x's dtype, added to grad_x if given.
        h_res: [T, n, n], fp32, [out, in], with which grad_x_part is mixed first; only with it.
        pre_eps: added to the sigmoids of h_pre.
        post_scale: factor of the sigmoids of h_post.
        iters: of Sinkhorn, at least 1.
        sinkhorn_eps: see `reference.sinkhorn`.
        config: launch knobs of the columns or of the teams.

    Returns:
        grad_x in x's dtype; grad_phi, grad_alpha, grad_bias, fp32.

    Raises:
        RuntimeError: The sums of so many iterations do not fit this GPU's shared memory.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x), *(torch.zeros_like(value) for value in (phi, alpha, bias))
    tokens, n, channels = x.shape
    arch, available = architecture(x.device), multiprocessors(x.device)
    if isinstance(config, pre_backward_team.Config):
        more_sums, exchange = config.sums, config.exchange(x.device)
    else:
        *_, resident = dots_shape(channels, n, dtype_name(x), overlaps(arch))
        more_sums, exchange = min(tokens, available * resident), None
    unfinished, block_sums = token_records(
        None, grad_h_post, grad_h_res, projection, inv_rms, alpha, bias,
        channels=channels, pre_eps=pre_eps, post_scale=post_scale,
        iters=iters, sinkhorn_eps=sinkhorn_eps, more_sums=more_sums, exchange=exchange,
    )  # fmt: skip
    own_sums = block_sums[-more_sums:]
    if isinstance(config, pre_backward_team.Config):
        grad_x, parts = pre_backward_team.launch(
            config, grad_layer_input, x, phi, projection, inv_rms, alpha, unfinished,
            grad_x_part, h_res, exchange, own_sums,
        )  # fmt: skip
        return grad_x, *add_parts(parts, block_sums, phi)
    records = finish_records(grad_layer_input, x, projection, inv_rms, alpha, unfinished, own_sums)
    return gradients_from_records(
        records, block_sums, x, phi, grad_layer_input, grad_x_part, h_res, config=config
    )


def traffic(problem: Problem) -> int:
    """Bytes that must move if x is read once, with merge's share of its gradient."""
    n, channels = problem.n, problem.channels
    logits = logits_per_token(n)
    per_token = (3 * n + 1) * channels * ITEM_BYTES[problem.dtype] + (2 * logits - n + 1) * 4
    return problem.tokens * per_token + 2 * logits * n * channels * 4
