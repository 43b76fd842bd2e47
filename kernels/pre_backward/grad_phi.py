"""grad_phi accumulator warps of the persistent backward of `pre`.

A warp owns one stream, in tiles of 16 channels; all sums stay in registers. The products are
`mma.m16n8k16` with A = x, K = the 16 tokens of a tile, and B = grad_raw as a pair high + low of
bf16. A lane is 4 * g + q; K = 8u + 2q + b is token 8u + 4b + q.
"""

import tilelang.language as T

from ..common.pairs import WORD, lower, upper
from ..common.programs import F32, logits_per_token, macro
from ..common.split import rest
from ..mapping.grad_x_pass import MIXED
from .plan import (
    BF16,
    CHUNK,
    GRAD_PHI_WARPS,
    ITERATION,
    MIXING,
    PUBLISHED,
    READ,
    ROW_TILES,
    ROW_WORDS,
    STREAMS,
    TILE,
    WARP,
    Cta,
    Plan,
    Shared,
    load_matrices,
    opaque,
    swizzled,
)


@macro
def grad_phi_warps(
    plan: Plan, cta: Cta, merge_grad, h_res, grad_phi_partials, shared: Shared, flush_every,
    reallocate, tx,
):  # fmt: skip
    """Iteration j adds the products of tile j - distance and copies merge_grad of the next one."""
    distance, threads = plan.distance, plan.first_threads[2]
    sums_first, weights = plan.first_threads[0], shared.weights
    T.named_barrier_arrive(ITERATION, threads)
    T.sync_threads(PUBLISHED, threads)
    T.named_barrier_arrive(ITERATION, threads)
    if reallocate:
        T.set_max_nreg(plan.registers[1], int(plan.registers[1] > plan.initial_registers))
    grad_phi = T.alloc_local((plan.width // 16 * ROW_TILES * 4,), F32)
    mixing = T.alloc_local((2,), WORD)
    T.clear(grad_phi)
    # grad_phi[k, i*C + c] += sum_t grad_raw[t, k] * x[t, i, c] of tile j - distance
    for j in T.serial(1, cta.iterations + distance):
        thread = T.alloc_var("int32", opaque(weights, tx - sums_first))
        first = T.cast((j - distance) * plan.groups + cta.group, "int64") * TILE
        if plan.merge_grad == MIXED:
            mixing_words(plan, mixing, h_res, first, thread)
        if plan.merge_grad != "":
            T.ptx_wait_group(0)  # the merge_grad that the last iteration asked for
        T.sync_threads(PUBLISHED, threads)
        if (j >= distance) and (j - distance < cta.tiles):
            stage = (j - distance) % plan.num_stages
            add_tile(plan, grad_phi, shared, mixing, stage, thread)
        if j < cta.iterations + distance - 1:
            T.named_barrier_arrive(ITERATION, threads)
        # the stage's last results were read before the second barrier
        if plan.merge_grad != "":
            T.sync_warp()
            thread = opaque(weights, tx - sums_first)  # not kept until here
            first = T.cast((j + 1 - distance) * plan.groups + cta.group, "int64") * TILE
            stage = (j + 1 + distance) % 2
            fetch_merge_grad(plan, cta, merge_grad, shared.staged, stage, first, thread)
            T.ptx_commit_group()
        # sums of the tensor cores lose digits as they grow: a new one begins
        if (j == cta.iterations + distance - 1) or (
            (j >= distance) and ((j - distance) % flush_every == flush_every - 1)
        ):
            flush(plan, cta, grad_phi_partials, grad_phi, j - distance >= flush_every, thread)


@macro
def fetch_merge_grad(plan: Plan, cta: Cta, merge_grad, staged, stage, first, tx):
    """Copy the warp's stream of a tile of merge_grad; zeros beyond the tokens and C.

    A lane has tokens t and t + 8, so that places of its chunks differ by constants.
    """
    C, width = plan.C, plan.width
    lane, stream = tx % WARP, tx // WARP
    # lanes of a quarter of the warp: tokens t and t + 2, so that they meet in no bank
    token, chunk = lane // 4 % 2 * 2 + lane // 8 % 2 + lane // 16 * 4, lane % 4
    flat = T.view(staged, (2 * TILE * STREAMS * width,), BF16)
    origin = T.alloc_var("int64", 0)
    at = T.alloc_var("int32", 0)
    inner = T.alloc_var("int32", 0)
    present = T.alloc_var("int32", 0)
    chunks = T.alloc_var("int32", 0)
    inner = (token * STREAMS + stream) * C + cta.rank * width + chunk * CHUNK
    origin = first * (STREAMS * C) + T.cast(inner, "int64")
    present = T.cast(T.min(plan.tokens - first, TILE), "int32") - token
    present = T.if_then_else(first < 0, 0, present)
    chunks = plan.chunks(cta.rank) - chunk
    at = ((stage * TILE + token) * STREAMS + stream) * width + swizzled(chunk, token, stream)
    for half in T.unroll(2):
        for k in T.unroll(width // 32):
            T.ptx_cp_async(
                T.access_ptr(
                    flat[(at ^ (k % 2 * 32)) + half * (8 * STREAMS * width) + k // 2 * 64],
                    "w", CHUNK,
                ),
                T.access_ptr(merge_grad[origin + (half * (8 * STREAMS * C) + k * 32)], "r", CHUNK),
                CHUNK,
                predicate=(half * 8 < present) and (plan.whole or (k * 4 < chunks)),
            )  # fmt: skip


@macro
def mixing_words(plan: Plan, mixing, h_res, first, tx):
    """Two weights of h_res of a tile, which need not be one yet: high parts, low ones."""
    pair = T.alloc_local((2,), F32)
    both_words = T.alloc_local((1,), WORD)
    both = T.view(both_words, (2,), BF16)
    for o in T.unroll(2):
        pair[o] = T.atomic_load(
            h_res[
                T.max(T.min(first + tx // 8, plan.tokens - 1), 0),
                (tx // STREAMS % 2 * 2 + o) * STREAMS + tx % STREAMS,
            ],
            memory_order="relaxed",
        )
    for v in T.vectorized(2):
        both[v] = T.cast(pair[v], BF16)
    mixing[0] = both_words[0]
    pair[0] = rest(pair[0], lower(mixing[0]))
    pair[1] = rest(pair[1], upper(mixing[0]))
    for v in T.vectorized(2):
        both[v] = T.cast(pair[v], BF16)
    mixing[1] = both_words[0]


@macro
def publish_mixing(high_low, mixing, tx):
    """Write the words of h_res as the products of the grad_x warps want them."""
    words = T.view(high_low, (TILE * ROW_WORDS,), WORD)
    i = tx % STREAMS
    entry = tx // 8 * ROW_WORDS + i // 2 * 12 + i % 2 * 4 + tx // STREAMS % 2
    words[entry] = mixing[0]
    words[entry + 2] = mixing[1]
    if tx < TILE * 2:
        for v in T.vectorized(4):
            words[(tx // 2 * (ROW_WORDS // 4) + tx % 2 * 3 + 2) * 4 + v] = T.uint32(0)


@macro
def add_tile(plan: Plan, grad_phi, shared: Shared, mixing, stage, tx):
    """Add the products of a tile; with h_res write its words for the grad_x warps first."""
    lane, stream = tx % WARP, tx // WARP
    row = lane % 8  # of what the lane names to ldmatrix
    flat = T.view(shared.tiles, (plan.num_stages * TILE * plan.token_size,), BF16)
    pairs = T.alloc_local((ROW_TILES * 8,), BF16)
    source = T.alloc_local((8,), BF16)
    at = T.alloc_var("int32", 0)  # in bits 3 to 5 a chunk: that of token and stream
    for k in T.vectorized(ROW_TILES * 8):
        pairs[k] = shared.high_low[lane, k]
    if plan.merge_grad == MIXED:
        T.sync_threads(READ, GRAD_PHI_WARPS * WARP)
        publish_mixing(shared.high_low, mixing, tx)
        T.named_barrier_arrive(MIXING, plan.grad_x_threads + GRAD_PHI_WARPS * WARP)
    at = (stage * TILE + lane // 16 * 8 + row % 2 * 4 + row // 2) * (STREAMS + 1) + stream
    at = at * plan.width + (lane // 8 % 2 ^ row ^ stream % 2) * CHUNK
    # grad_phi[k, e] += sum_t grad_raw[t, k] * x[t, e], high parts, then low ones
    for block in T.unroll(plan.width // 64):
        for k in T.unroll(4):
            load_matrices(source, 0, flat, (at ^ (k * 2 * CHUNK)) + block * 64, True)
            for low in T.unroll(2):
                for r in T.unroll(ROW_TILES):
                    T.ptx_mma(
                        F32, "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
                        source.data, 0, pairs.data, (low * ROW_TILES + r) * 4,
                        grad_phi.data, ((block * 4 + k) * ROW_TILES + r) * 4, T.bool(False),
                    )  # fmt: skip


@macro
def flush(plan: Plan, cta: Cta, grad_phi_partials, grad_phi, again, tx):
    """The group's split-K partials of the warp's stream, added to what is there `again`."""
    C, logits = plan.C, logits_per_token(STREAMS)
    lane, stream = tx % WARP, tx // WARP
    inner = (lane % 4 * 2 * STREAMS + stream) * C + cta.rank * plan.width + lane // 4
    origin = T.cast(cta.group, "int64") * (logits * STREAMS * C) + T.cast(inner, "int64")
    present = plan.chunks(cta.rank)  # to the whole warp or not
    for tile in T.unroll(plan.width // 16):
        for h in T.unroll(2):
            T.sync_warp()  # else loads of all tiles come first, and spill
            if plan.whole or (tile * 2 + h < present):
                for r in T.unroll(ROW_TILES):
                    for k in T.unroll(2):
                        at = origin + ((r * 8 + k) * STREAMS * C + tile * 16 + h * 8)
                        entry = (tile * ROW_TILES + r) * 4 + h * 2 + k
                        if again:
                            grad_phi[entry] += grad_phi_partials[at]
                        grad_phi_partials[at] = grad_phi[entry]
    for v in T.unroll(plan.width // 16 * ROW_TILES * 4):
        grad_phi[v] = 0.0
