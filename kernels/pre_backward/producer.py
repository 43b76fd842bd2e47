"""Producer warps of the persistent backward of `pre`.

They load tiles of x and grad_layer_input, form the rank's dot products, send them to all ranks, and
complete the per-token backward state, which the other warps read in shared memory.
"""

import tilelang.language as T

from ..common.mailbox import peek, send, stage_of, staleness, value_of
from ..common.programs import F32, ceil_div, logits_per_token, macro
from ..common.split import exponent_of, rest, scale_of, unscale_of
from ..mapping.token_state import state_size, sums_width
from .plan import (
    BF16,
    CHUNK,
    F16,
    ITERATION,
    LANDED,
    PRODUCERS,
    PUBLISHED,
    ROW_TILES,
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

LOGITS = logits_per_token(STREAMS)
assert state_size(STREAMS) >= LOGITS + STREAMS + 1


@macro
def producer_warps(
    plan: Plan, cta: Cta, x, grad_layer_input, saved, alpha, mailbox, block_sums, shared: Shared,
    reallocate, tx,
):  # fmt: skip
    """Iteration j loads tile j + 1, sends dot products of tile j and completes j + 1 - distance.

    `saved` are the unfinished state, projection and inv_rms.
    """
    distance, threads = plan.distance, plan.first_threads[2]
    if reallocate:
        T.set_max_nreg(plan.registers[2], 0)
    thread = T.alloc_var("int32", tx - plan.first_threads[1])
    messages = T.alloc_local((ceil_div(plan.ranks, 2),), "int32")
    state = T.alloc_local((6,), F32)
    ready = T.alloc_local((5,), F32)
    sums = T.alloc_local((2,), F32)
    gate = T.alloc_var(F32, alpha[0])
    tile = T.alloc_var("int32", 0)
    T.clear(messages)
    T.clear(state)
    T.clear(ready)
    T.clear(sums)
    # read with the rest; the first place is for what undoes the scale of phi
    shared.scaled[thread // 64, thread // 2 % WARP, 6 + thread % 2] = T.cast(0.0, F16)
    fetch(plan, cta, x, grad_layer_input, shared.tiles, 0, plan.first_token(cta, 0), thread)
    T.ptx_commit_group()
    # grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c] of tile j, summed over ranks for tile
    # j + 1 - distance: grad_raw[i] = alpha * grad_logits[i] * inv_rms, and radial
    for j in T.serial(cta.iterations + distance):
        thread = opaque(shared.weights, tx - plan.first_threads[1])
        T.sync_threads(ITERATION, threads)
        if j >= distance:
            publish(ready, shared, thread)
        T.named_barrier_arrive(PUBLISHED, threads)
        tile = j + 1 - distance
        if j + 1 < cta.tiles:
            first = plan.first_token(cta, j + 1)
            stage = (j + 1) % plan.num_stages
            fetch(plan, cta, x, grad_layer_input, shared.tiles, stage, first, thread)
        T.ptx_commit_group()
        if (tile >= 0) and (tile < cta.tiles):  # here once the dot products are sent
            first = plan.first_token(cta, tile)
            request(plan, state, saved, first, thread)
            peek_dots(plan, cta, messages, mailbox, tile, thread)
        # what the previous iteration asked for is here: tile j
        T.ptx_wait_group(1)
        T.sync_threads(LANDED, PRODUCERS * WARP)
        if j < cta.tiles:
            send_dots(plan, cta, shared.tiles, j % plan.num_stages, mailbox, j, thread)
        if (tile >= 0) and (tile < cta.tiles):
            first = plan.first_token(cta, tile)
            receive(
                plan, cta, messages, state, ready, mailbox, gate, sums, tile, first, thread
            )  # fmt: skip
    if cta.rank == 0:
        write_sums(block_sums, sums, cta.group * PRODUCERS, thread)


@macro
def fetch(plan: Plan, cta: Cta, x, grad_layer_input, tiles, stage, first, tx):
    """Copy a tile of x, and grad_layer_input as its last stream."""
    fetch_rows(plan, cta, x, tiles, stage, first, tx, STREAMS, 0, (TILE, 1, 0))
    places = (TILE // PRODUCERS, PRODUCERS, tx // WARP)
    fetch_rows(plan, cta, grad_layer_input, tiles, stage, first, tx % WARP, 1, STREAMS, places)


@macro
def fetch_rows(plan: Plan, cta: Cta, source, tiles, stage, first, tx, streams, behind, places):
    """Copy source[first : first + 16, :, segment] to tiles[stage, :, behind:], zeros beyond it."""
    count = streams * plan.C // CHUNK  # chunks of a token
    stream, chunk = tx // (plan.width // CHUNK), tx % (plan.width // CHUNK)
    inner = T.alloc_var(
        "int32",
        stream * (plan.C // CHUNK) + cta.rank * (plan.width // CHUNK) + chunk,
    )
    origin = T.alloc_var("int64", 0)  # in chunks
    present = T.alloc_var("int32", 0)
    origin = first * count + T.cast(inner, "int64")
    if stream < streams:
        if (first + TILE <= plan.tokens) and (
            plan.whole or ((cta.rank + 1) * plan.width <= plan.C)
        ):
            copy_rows(source, tiles, stage, origin, count, stream + behind, chunk, places, None)
        else:
            present = T.cast(T.min(plan.tokens - first, TILE), "int32")
            if (not plan.whole) and (chunk >= plan.chunks(cta.rank)):
                present = 0
            copy_rows(source, tiles, stage, origin, count, stream + behind, chunk, places, present)


@macro
def copy_rows(source, tiles, stage, origin, count, stream, chunk, places, present):
    """16 bytes a row; `places` is (how many, distance, first one). Zeros from `present` on."""
    for step in (T.unroll if present is None else T.serial)(places[0]):
        place = step * places[1] + places[2]
        T.ptx_cp_async(
            T.access_ptr(tiles[stage, place, stream, swizzled(chunk, place, stream)], "w", CHUNK),
            T.access_ptr(source[(origin + place * count) * CHUNK], "r", CHUNK),
            CHUNK,
            predicate=None if present is None else place < present,
        )


@macro
def send_dots(plan: Plan, cta: Cta, tiles, stage, mailbox, tile, tx):
    """Send grad_h_pre of a tile over the rank's channels.

    A warp has the products of all its tokens and streams of x (rows g: token g // 2, stream g % 2;
    rows 8 + g: two streams on) with grad_layer_input of its tokens (columns, twice), and sends
    those of equal tokens.
    """
    lane, warp = tx % WARP, tx // WARP
    g, q = lane // 4, lane % 4
    row = lane % 8  # of what the lane names to ldmatrix
    flat = T.view(tiles, (plan.num_stages * TILE * plan.token_size,), BF16)
    x_lane = T.alloc_local((16,), BF16)
    grad = T.alloc_local((8,), BF16)
    dots = T.alloc_local((2 * 4,), F32)
    total = T.alloc_var(F32, 0.0)
    # in bits 3 to 5 a chunk: that of token and stream, see `swizzled`
    at_x = T.alloc_var("int32", 0)
    at_grad = T.alloc_var("int32", 0)
    at_grad = (stage * TILE + warp * 4) * (STREAMS + 1)
    at_x = at_grad + row // 2 * (STREAMS + 1) + lane // 8 % 2 * 2 + row % 2
    at_grad = at_grad + row % 4 * (STREAMS + 1) + STREAMS
    at_x = at_x * plan.width + (lane // 16 ^ row ^ warp % 2) * CHUNK
    at_grad = at_grad * plan.width + (lane // 8 ^ row % 4 * 2 ^ warp % 2) * CHUNK
    # grad_h_pre[t, i] = sum_c grad_layer_input[t, c] * x[t, i, c]
    for v in T.unroll(2 * 4):
        dots[v] = 0.0
    for block in T.unroll(plan.width // 64):  # a chunk's place differs within 64 channels
        if block > 0:
            T.sync_warp()  # else loads come earlier than there are registers
        for half in T.unroll(2):
            load_matrices(grad, 0, flat, (at_grad ^ (half * 4 * CHUNK)) + block * 64, False)
            for k in T.unroll(2):
                load_matrices(
                    x_lane, k * 8, flat, (at_x ^ ((half * 2 + k) * 2 * CHUNK)) + block * 64, False
                )
            for k in T.unroll(2):
                T.ptx_mma(
                    F32, "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
                    x_lane.data, k * 8, grad.data, k * 4, dots.data, k * 4, T.bool(False),
                )  # fmt: skip
    for v in T.unroll(4):
        dots[v] = dots[v] + dots[4 + v]
    total = T.if_then_else(
        q < 2,
        T.if_then_else(g // 2 % 2 == 0, dots[0], dots[1]),
        T.if_then_else(g // 2 % 2 == 0, dots[2], dots[3]),
    )
    if q % 2 == g // 4:
        send(
            mailbox[
                cta.group, stage_of(tile, plan.mailbox_stages), cta.rank,
                (warp * 4 + g // 2) * STREAMS + q // 2 * 2 + g % 2,
            ],
            total, tile, plan.mailbox_stages,
        )  # fmt: skip


# From here on lane 8 * t + k of warp d has rows k, k + 8 and k + 16 of token 4 * d + t.


@macro
def peek_dots(plan: Plan, cta: Cta, messages, mailbox, tile, tx):
    """Read half of the ranks' messages of a token and stream, whether they are there or not."""
    half = ceil_div(plan.ranks, 2)
    for m in T.unroll(half):
        messages[m] = peek(
            mailbox[
                cta.group, stage_of(tile, plan.mailbox_stages),
                T.min(tx % 2 * half + m, plan.ranks - 1), tx // 2,
            ]
        )  # fmt: skip


@macro
def request(plan: Plan, state, saved, first, tx):
    """Read what `receive` needs of a tile besides the messages."""
    unfinished_state, projection, inv_rms = saved
    row = tx % 8
    token = T.min(first + tx // 8, plan.tokens - 1)
    for r in T.unroll(ROW_TILES):
        state[r] = unfinished_state[token, r * 8 + row]
    state[3] = unfinished_state[token, LOGITS + T.min(row, STREAMS)]  # h_pre, then radial
    state[4] = projection[token, row]
    state[5] = inv_rms[token]


@macro
def receive(
    plan: Plan, cta: Cta, messages, state, ready, mailbox, gate, sums, tile, first, tx
):  # fmt: skip
    """Complete the state of a token: ready = grad_raw of the lane's rows, weight, largest row."""
    half = ceil_div(plan.ranks, 2)
    stale = T.alloc_var("int32", 1)
    total = T.alloc_var(F32, 0.0)
    grad = T.alloc_var(F32, 0.0)
    product = T.alloc_var(F32, 0.0)
    row, lane = tx % 8, tx % WARP
    stale = 1
    while stale != 0:
        stale = 0
        for m in T.unroll(half):
            stale = stale | staleness(messages[m], tile, plan.mailbox_stages)
        stale = stale & 1
        if stale != 0:
            peek_dots(plan, cta, messages, mailbox, tile, tx)
    # grad_h_pre[row // 2], in the order of the ranks, both halves alike
    total = value_of(messages[0])
    for m in T.unroll(1, half):
        if tx % 2 * half + m < plan.ranks:
            total = total + value_of(messages[m])
    total = total + T.shfl_xor(total, 1)
    total = T.shfl_sync(total, lane // 8 * 8 + row % STREAMS * 2)
    # grad_logits[i] = grad_h_pre[i] * s * (1 - s) ; the unfinished state holds s * (1 - s)
    grad = T.if_then_else(row < STREAMS, total * state[0], 0.0)
    product = grad * state[4]
    # grad_raw[i] = alpha * grad_logits[i] * inv_rms
    ready[0] = T.if_then_else(row < STREAMS, grad * gate * state[5], state[0])
    ready[1] = state[1]
    ready[2] = state[2]
    if first + tx // 8 < plan.tokens:
        sums[0] += grad
        sums[1] += product
    else:
        for r in T.unroll(ROW_TILES):
            ready[r] = 0.0
    # radial -= inv_rms^2 / (n*C) * sum_i alpha * grad_logits[i] * projection[i]
    product = product + T.shfl_xor(product, 1)
    product = product + T.shfl_xor(product, 2)
    product = product + T.shfl_xor(product, 4)
    product *= gate * (-1.0 / (STREAMS * plan.C)) * state[5] * state[5]
    ready[3] = state[3] + T.if_then_else(row == STREAMS, product, 0.0)
    # the largest |grad_raw[k]| of the token
    total = T.max(T.max(T.abs(ready[0]), T.abs(ready[1])), T.abs(ready[2]))
    total = T.max(total, T.shfl_xor(total, 1))
    total = T.max(total, T.shfl_xor(total, 2))
    ready[4] = T.max(total, T.shfl_xor(total, 4))


@macro
def publish(ready, shared: Shared, tx):
    """Write the state of a tile to shared memory, in the order that the tensor cores want."""
    high_low, scaled = shared.high_low, shared.scaled
    exponent = T.alloc_var("int32", 0)
    scale = T.alloc_var(F32, 0.0)
    row, warp = tx % 8, tx // WARP
    quarter = tx % WARP // 8  # token % 4; the token is 4 * warp + quarter
    # a power of two that brings the largest to 2^14 or a little more
    exponent = exponent_of(ready[4])
    scale = scale_of(exponent)
    if row <= STREAMS + 1:
        unscale = unscale_of(exponent)
        unscale *= T.view(scaled, (2 * WARP * 4,), F32)[3]
        column = T.if_then_else(row < STREAMS, row, row + 2)
        shared.weights[tx // 8, column] = T.if_then_else(row <= STREAMS, ready[3], unscale)
    for r in T.unroll(ROW_TILES):
        high_low[row * 4 + quarter, r * 4 + warp] = T.cast(ready[r], BF16)
        high_low[row * 4 + quarter, (ROW_TILES + r) * 4 + warp] = T.cast(
            rest(ready[r], T.cast(ready[r], BF16)), BF16
        )
        scaled[
            warp // 2, (quarter * 2 + warp % 2) * 4 + row // 2, r * 2 + row % 2
        ] = T.cast(ready[r] * scale, F16)  # fmt: skip


@macro
def write_sums(block_sums, sums, first_row, tx):
    """grad_bias of h_pre's logits and their part of grad_alpha, of every token once."""
    lane = tx % WARP
    for v in T.unroll(2):
        sums[v] = sums[v] + T.shfl_xor(sums[v], 8)
        sums[v] = sums[v] + T.shfl_xor(sums[v], 16)
    sums[1] = sums[1] + T.shfl_xor(sums[1], 1)
    sums[1] = sums[1] + T.shfl_xor(sums[1], 2)
    sums[1] = T.shfl_sync(sums[1], 0)
    for q in T.unroll(sums_width(STREAMS) // WARP):
        column = q * WARP + lane
        block_sums[first_row + tx // WARP, column] = T.if_then_else(
            column == LOGITS, sums[1], T.if_then_else(column < STREAMS, sums[0], 0.0)
        )
