"""What the warps of the persistent `pre` do, role by role. docs/kernels/pre.md draws the pipeline.

`j` is an iteration of the persistent loop and the number of the tile that is projected in it;
`tile` is the number of another tile; `place` is a token of a tile.
"""

import tilelang.language as T

from ..common.mailbox import EMPTY, peek, send, stage_of, staleness, value_of
from ..common.pairs import WORD, lower, upper
from ..common.phi import load_phi, scale_phi
from ..common.programs import F32, ceil_div, macro
from ..common.projection import WARP, add, fetch, inverse_rms, project_tile
from ..common.sinkhorn_on_chip import sigmoid, sinkhorn_registers
from .plan import ITERATION, LANDED, PROJECTED, Cta, Plan, Reduced, message_columns


@macro
def empty_mailboxes(plan: Plan, cta: Cta, gather_mailbox, apply_mailbox, tx):
    """No message yet. All threads; `T.sync_grid` follows."""
    threads, columns = plan.first_threads[2], message_columns(plan.n)
    h_pre_size = plan.mailbox_stages * plan.tile * plan.n
    sums_size = plan.mailbox_stages * plan.tile * columns
    for p in T.unroll(ceil_div(h_pre_size, threads)):
        entry = p * threads + tx
        if (cta.rank == 0) and (entry < h_pre_size):
            apply_mailbox[
                cta.group, entry // (plan.tile * plan.n), entry // plan.n % plan.tile,
                entry % plan.n,
            ] = EMPTY  # fmt: skip
    for p in T.unroll(ceil_div(sums_size, threads * 4)):
        entry = (p * threads + tx) * 4
        if entry < sums_size:
            for v in T.vectorized(4):
                gather_mailbox[
                    cta.group, entry // (plan.tile * columns), cta.rank,
                    entry // columns % plan.tile, entry % columns + v,
                ] = EMPTY  # fmt: skip


@macro
def project_warps(plan: Plan, cta: Cta, phi, x_tile, sums, gather_mailbox, tx):
    """Projection warps: phi stays in registers; every iteration projects a tile."""
    segment, dtype = plan.segment, plan.dtype
    if plan.registers is not None:
        T.set_max_nreg(plan.registers[0], 1)
    fragments = T.alloc_local(*segment.fragments(dtype))
    unscales = T.alloc_local((segment.phi_tiles,), F32)
    if tx < segment.threads:
        load_phi(segment, dtype, fragments, phi, cta.rank, tx)
        scale_phi(segment, dtype, fragments, unscales)
    T.sync_grid()
    # sums = [sum_k x[k]^2, sum_k phi[r, k] * x[k]] of tile j, k in the warp's share of the segment
    for j in T.serial(cta.iterations + plan.distance):
        T.sync_threads(ITERATION, plan.loop_threads)
        if (j < cta.iterations) and (tx < segment.threads):
            T.sync_threads(LANDED, segment.threads + plan.apply_threads)
            stage = j % plan.num_stages
            project_tile(segment, dtype, sums, 0, fragments, unscales, x_tile, stage, tx)
            T.sync_threads(PROJECTED, segment.threads)
            send_sums(plan, cta, sums, gather_mailbox, j, tx // WARP, tx % WARP)


@macro
def send_sums(plan: Plan, cta: Cta, sums, gather_mailbox, tile, warp, lane):
    """The rank's partial sums of a tile, a warp a token: the sum over the rank's warps."""
    segment = plan.segment
    for p in T.unroll(ceil_div(plan.tile, segment.warps)):
        place = p * segment.warps + warp
        for q in T.unroll(ceil_div(segment.columns, WARP)):
            total = T.alloc_var(F32, 0.0)
            if (place < plan.tile) and (q * WARP + lane < segment.columns):
                for w in T.unroll(segment.warps):
                    total = add(total, sums[0, w, place, q * WARP + lane])
                send(
                    gather_mailbox[
                        cta.group, stage_of(tile, plan.mailbox_stages), cta.rank, place,
                        q * WARP + lane,
                    ],
                    total, tile, plan.mailbox_stages,
                )  # fmt: skip


@macro
def apply_warps(plan: Plan, cta: Cta, x, x_tile, weights, layer_input, thread):
    """Apply warps: load x `prefetch` tiles ahead, form layer_input `distance` tiles behind."""
    segment, threads = plan.segment, plan.apply_threads
    if plan.registers is not None:
        T.set_max_nreg(plan.registers[1], 0)
    if thread < threads:
        for j in T.serial(plan.prefetch):
            if j < cta.iterations:
                fetch(segment, x_tile, j, x, cta.first_token(plan, j), cta.rank, thread, threads)
            T.ptx_commit_group()
    T.sync_grid()
    # layer_input[c] = sum_i h_pre[i] * x[i, c] of tile j - distance
    for j in T.serial(cta.iterations + plan.distance):
        T.sync_threads(ITERATION, plan.loop_threads)
        if thread < threads:
            # into the stage whose tile the previous iteration applied
            if j + plan.prefetch < cta.iterations:
                first = cta.first_token(plan, j + plan.prefetch)
                stage = (j + plan.prefetch) % plan.num_stages
                fetch(segment, x_tile, stage, x, first, cta.rank, thread, threads)
            T.ptx_commit_group()
            if j < cta.iterations:
                T.ptx_wait_group(plan.prefetch)  # tile j is here; later ones may not be
                T.sync_threads(LANDED, segment.threads + threads)
            if j >= plan.distance:
                pre_apply(plan, cta, x_tile, weights, layer_input, j - plan.distance, thread)


@macro
def pre_apply(plan: Plan, cta: Cta, x_tile, weights, layer_input, tile, thread):
    """layer_input of a tile for the rank's channels."""
    width, first = plan.segment.width, cta.first_token(plan, tile)
    chunks = width // 8
    rows = max(1, plan.apply_threads // chunks)
    x_lane = T.alloc_local((8,), plan.dtype)
    words = T.view(x_lane, (4,), WORD)
    applied = T.alloc_local((8,), F32)
    weight = T.alloc_var(F32)
    present = T.min(plan.tokens - first, plan.tile)
    inner = thread % chunks * 8
    channel = cta.rank * width + inner
    if (thread < rows * chunks) and (channel < plan.C):
        # layer_input[c] = sum_i h_pre[i] * x[i, c]
        for row in T.unroll(ceil_div(plan.tile, rows)):
            place = row * rows + thread // chunks
            if (place < plan.tile) and (place < present):
                for v in T.unroll(8):
                    applied[v] = 0.0
                for i in T.unroll(plan.n):
                    for v in T.vectorized(8):
                        x_lane[v] = x_tile[tile % plan.num_stages, place, i * width + inner + v]
                    weight = weights[tile % 2, place, i]
                    if plan.dtype == "bfloat16":
                        for k in T.unroll(4):
                            applied[2 * k] += weight * lower(words[k])
                            applied[2 * k + 1] += weight * upper(words[k])
                    else:
                        for v in T.unroll(8):
                            applied[v] += weight * T.cast(x_lane[v], F32)
                for v in T.vectorized(8):
                    layer_input[first + place, channel + v] = T.cast(applied[v], plan.dtype)


@macro
def receive_and_reduce_warps(plan: Plan, cta: Cta, weights, reduced: Reduced, tx):
    """One receiver warp, which takes part in every iteration; reducer warps, which run freely."""
    if plan.registers is not None:
        T.set_max_nreg(plan.registers[2], 0)
    role = (tx - plan.first_threads[1]) // WARP
    T.sync_grid()
    iterations, last = cta.iterations, cta.last  # read once
    cta = cta._replace(iterations=iterations, last=last)
    if role == 0:
        receiver_warp(plan, cta, weights, reduced.apply_mailbox, tx % WARP)
    elif role <= plan.reducers:
        reducer_warp(plan, cta, reduced, role, tx % WARP)


@macro
def receiver_warp(plan: Plan, cta: Cta, weights, apply_mailbox, lane):
    """Receiver warp: h_pre of the tile that the next iteration applies, to shared memory."""
    messages = T.alloc_local((ceil_div(plan.tile * plan.n, WARP),), "int32")
    for p in T.unroll(ceil_div(plan.tile * plan.n, WARP)):
        messages[p] = 0
    # weights[place, i] = h_pre[i] of tile j + 1 - distance
    for j in T.serial(cta.iterations + plan.distance):
        T.sync_threads(ITERATION, plan.loop_threads)
        tile = j + 1 - plan.distance
        if (tile >= 0) and (tile < cta.iterations):
            receive_h_pre(plan, cta, messages, weights, apply_mailbox, tile, lane)
        if (tile >= -1) and (tile < cta.iterations - 1):
            peek_h_pre(plan, cta, messages, apply_mailbox, tile + 1, lane)


@macro
def peek_h_pre(plan: Plan, cta: Cta, messages, apply_mailbox, tile, lane):
    """Read the messages of a tile, stale or not."""
    for p in T.unroll(ceil_div(plan.tile * plan.n, WARP)):
        entry = T.min(p * WARP + lane, plan.tile * plan.n - 1)
        messages[p] = peek(
            apply_mailbox[
                cta.group, stage_of(tile, plan.mailbox_stages), entry // plan.n, entry % plan.n
            ]
        )


@macro
def receive_h_pre(plan: Plan, cta: Cta, messages, weights, apply_mailbox, tile, lane):
    """weights[tile] = h_pre of a tile, whose messages the previous iteration has peeked at."""
    stale = T.alloc_var("int32", 1)
    stale = 1
    while stale != 0:
        stale = 0
        for p in T.unroll(ceil_div(plan.tile * plan.n, WARP)):
            stale = stale | staleness(messages[p], tile, plan.mailbox_stages)
        stale = stale & 1
        if stale != 0:
            peek_h_pre(plan, cta, messages, apply_mailbox, tile, lane)
    for p in T.unroll(ceil_div(plan.tile * plan.n, WARP)):
        entry = p * WARP + lane
        if entry < plan.tile * plan.n:
            weights[tile % 2, entry // plan.n, entry % plan.n] = value_of(messages[p])


@macro
def reducer_warp(plan: Plan, cta: Cta, reduced: Reduced, role, lane):
    """Reducer warp 1, 2, ..: the maps of its tokens, then h_res of all of them, a lane a token.

    A tile has `tile_tokens_of_rank` tasks of the rank; a warp takes every `reducers`-th.
    """
    G, most = plan.tile, plan.tile_tokens_of_rank
    tasks = (cta.iterations * most + plan.reducers - role) // plan.reducers
    # inv_rms, projection, h_pre, h_post of a token, in the order of the tiles
    for step in T.serial(tasks):
        task = step * plan.reducers + role - 1
        tile = task // most
        first = (cta.rank + plan.ranks - tile * G % plan.ranks) % plan.ranks
        place = first + task % most * plan.ranks
        token = cta.first_token(plan, tile) + place
        if place < G:
            reduce_token(plan, cta, reduced, tile, place, token, lane)
    # h_res = sinkhorn(logits_res), a lane a token, while the last tiles are applied
    T.sync_warp()
    task = T.alloc_var("int32", lane * plan.reducers + role - 1)
    while task < cta.iterations * most:
        tile = task // most
        first = (cta.rank + plan.ranks - tile * G % plan.ranks) % plan.ranks
        place = first + task % most * plan.ranks
        token = (cta.last - tile * plan.groups) * G + place
        if (place < G) and (token < plan.tokens):
            residual_map(plan, reduced, token)
        task = task + plan.reducers * WARP


@macro
def reduce_token(plan: Plan, cta: Cta, reduced: Reduced, tile, place, token, lane):
    """Add the ranks' sums of a token, a column a lane; send h_pre to all ranks."""
    n, columns, stages = plan.n, plan.segment.columns, plan.mailbox_stages
    lanes = ceil_div(columns, WARP)
    messages = T.alloc_local((lanes, plan.ranks), "int32")
    totals = T.alloc_local((lanes,), F32)
    stale = T.alloc_var("int32", 1)
    scale = T.alloc_var(F32, 0.0)
    value = T.alloc_var(F32, 0.0)
    stage = stage_of(tile, stages)
    stale = 1
    while stale != 0:
        for q in T.unroll(lanes):
            for m in T.unroll(plan.ranks):
                messages[q, m] = peek(
                    reduced.gather_mailbox[
                        cta.group, stage, m, place, T.min(q * WARP + lane, columns - 1)
                    ]
                )
        stale = 0
        for q in T.unroll(lanes):
            for m in T.unroll(plan.ranks):
                stale = stale | staleness(messages[q, m], tile, stages)
        stale = stale & 1
    # split-K partials in the order of the ranks
    for q in T.unroll(lanes):
        totals[q] = value_of(messages[q, 0])
        for m in T.unroll(1, plan.ranks):
            totals[q] = add(totals[q], value_of(messages[q, m]))
    # inv_rms = 1 / sqrt(mean of x^2 + norm_eps)
    scale = T.shfl_sync(totals[0], 0)
    inverse_rms(scale, n * plan.C, plan.constants.norm_eps)
    for q in T.unroll(lanes):
        r = q * WARP + lane - 1
        # projection = (vec(x) @ phi^T) * inv_rms
        totals[q] = totals[q] * scale
        if (r >= 0) and (r < 2 * n):
            value = (
                totals[q] * T.if_then_else(r < n, reduced.alpha[0], reduced.alpha[1])
                + reduced.bias[r]
            )
            value = sigmoid(value)
            # h_pre = sigmoid(logits_pre) + pre_eps
            if r < n:
                send(
                    reduced.apply_mailbox[cta.group, stage, place, r],
                    value + plan.constants.pre_eps, tile, stages,
                )  # fmt: skip
            # h_post = post_scale * sigmoid(logits_post)
            if (r >= n) and (token < plan.tokens):
                reduced.h_post[token, r - n] = value * plan.constants.post_scale
        if (r >= 0) and (r < columns - 1) and (token < plan.tokens):
            reduced.projection[token, r] = totals[q]
    if (lane == 0) and (token < plan.tokens):
        reduced.inv_rms[token] = scale


@macro
def residual_map(plan: Plan, reduced: Reduced, token):
    """h_res = sinkhorn(logits_res) of a token; one thread."""
    n = plan.n
    matrix = T.alloc_local((n * n,), F32)
    for v in T.vectorized(n * n):
        matrix[v] = reduced.projection[token, 2 * n + v]
    # logits_res = projection * alpha_res + bias
    for v in T.unroll(n * n):
        matrix[v] = matrix[v] * reduced.alpha[2] + reduced.bias[2 * n + v]
    sinkhorn_registers(matrix, n, plan.constants.manifold)
    for v in T.vectorized(n * n):
        reduced.h_res[token, v] = matrix[v]
