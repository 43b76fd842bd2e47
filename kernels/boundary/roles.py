"""What the warps of `boundary` do that are not those of `pre`: docs/kernels/boundary.md."""

from typing import Any, NamedTuple

import tilelang.language as T

from ..common.pairs import WORD, lower, upper
from ..common.phi import load_phi, scale_phi
from ..common.programs import F32, ceil_div, logits_per_token, macro
from ..common.projection import WARP, project_tile
from ..pre.plan import ITERATION, PROJECTED, Cta, Plan
from ..pre.roles import pre_apply, send_sums

STREAMS = 4  # 16 bytes of h_post, a row of h_res
CHUNK = 8  # channels of 16 bytes
MAPS = STREAMS * STREAMS + STREAMS  # floats of a token: h_res, then h_post


class Inputs(NamedTuple):
    """What the merge warps read from memory."""

    x: Any
    layer_output: Any
    h_post: Any
    h_res: Any


class Staged(NamedTuple):
    """The buffers in shared memory."""

    x_tile: Any
    output_tile: Any
    maps: Any
    sums: Any
    weights: Any


def opaque(sums: Any, value: Any) -> Any:
    """An integer plus a zero from shared memory: what follows from it is not kept in registers.

    Not for addresses of stores: nvcc then splits 16-byte ones, in the whole function.
    """
    return value + T.reinterpret(sums[0, 0, 0, logits_per_token(STREAMS) + 1], "int32")


@macro
def project_warps(plan: Plan, cta: Cta, phi, x_tile, sums, gather_mailbox, tx):
    """Projection warps: as those of `pre`, an iteration after the merge of a tile."""
    segment, dtype, half = plan.segment, plan.dtype, (plan.segment.steps + 1) // 2
    if plan.registers is not None:
        T.set_max_nreg(plan.registers[0], 1)
    fragments = T.alloc_local(*segment.fragments(dtype))
    unscales = T.alloc_local((segment.phi_tiles,), F32)
    thread = T.alloc_var("int32", tx)
    # one half after the other; the compiler, to whom the second condition is not that of the
    # first, would load both at once, for which there are no registers
    if (tx < segment.threads) and (cta.iterations > 0):
        load_phi(segment, dtype, fragments, phi, cta.rank, tx, 0, half)
    if (tx < segment.threads) and (cta.last >= 0):
        load_phi(segment, dtype, fragments, phi, cta.rank, tx, half)
    if (tx < segment.threads) and (cta.iterations + cta.last > 0):  # the same again
        scale_phi(segment, dtype, fragments, unscales)
    T.sync_grid()
    # sums = [sum_k x_next[k]^2, sum_k phi[r, k] * x_next[k]] of tile j - 1, k in the warp's share
    for j in T.serial(cta.iterations + plan.distance):
        T.sync_threads(ITERATION, plan.loop_threads)
        if (j > 0) and (j <= cta.iterations) and (tx < segment.threads):
            thread = opaque(sums, tx)
            stage = (j - 1) % plan.num_stages
            project_tile(segment, dtype, sums, 0, fragments, unscales, x_tile, stage, thread)
            T.sync_threads(PROJECTED, segment.threads)
            thread = opaque(sums, tx)
            send_sums(plan, cta, sums, gather_mailbox, j - 1, thread // WARP, thread % WARP)


@macro
def merge_warps(plan: Plan, cta: Cta, inputs: Inputs, staged: Staged, x_next, layer_input, tx):
    """Merge warps: load `prefetch` tiles ahead, merge this one, form layer_input `distance` behind.

    Two groups of copies an iteration: x and the maps, then layer_output.
    """
    ahead = plan.prefetch
    if plan.registers is not None:
        T.set_max_nreg(plan.registers[1], 0)
    thread = T.alloc_var("int32", tx)
    outputs = T.alloc_local((plan.tile // plan.apply_warps, CHUNK), plan.dtype)
    clear_padding(plan, staged.x_tile, thread)
    for j in T.serial(ahead):
        if j < cta.iterations:
            first = cta.first_token(plan, j)
            fetch(plan, cta, inputs, staged, j, j, first, thread)
            fetch_output(plan, cta, inputs, staged, j, first, thread)
        T.ptx_commit_group()
        T.ptx_commit_group()
    T.sync_grid()
    # x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c] of tile j
    # layer_input[c] = sum_i h_pre[i] * x_next[i, c] of tile j - distance
    for j in T.serial(cta.iterations + plan.distance):
        T.sync_threads(ITERATION, plan.loop_threads)
        # into the stage whose tile the previous iteration applied
        later = cta.first_token(plan, j + ahead)
        if j + ahead < cta.iterations:
            thread = opaque(staged.sums, tx)
            stage = (j + ahead) % plan.num_stages
            fetch(plan, cta, inputs, staged, stage, (j + ahead) % (ahead + 1), later, thread)
        T.ptx_commit_group()
        if j < cta.iterations:
            T.ptx_wait_group(2 * ahead - 1)  # tile j is here; later ones may not be
            T.sync_warp()  # a warp has copied the maps of its tokens
            take_output(plan, outputs, staged.output_tile, j % ahead, tx)
        if j + ahead < cta.iterations:
            thread = opaque(staged.sums, tx)
            fetch_output(plan, cta, inputs, staged, j % ahead, later, thread)
        T.ptx_commit_group()
        if j < cta.iterations:
            merge_tile(plan, cta, staged, outputs, x_next, j, tx)
        if j >= plan.distance:
            pre_apply(plan, cta, staged.x_tile, staged.weights, layer_input, j - plan.distance, tx)


@macro
def clear_padding(plan: Plan, x_tile, tx):
    """Zeros after the last stream in a row of x_tile, where phi is zero, too."""
    segment, stages, G = plan.segment, plan.num_stages, plan.tile
    data = plan.n * segment.width
    padding = segment.chunks * CHUNK - data
    pieces = max(padding // CHUNK, 1)
    for p in T.unroll(ceil_div(stages * G * padding, plan.apply_threads * CHUNK)):
        entry = p * plan.apply_threads + tx
        row, inner = entry // pieces, data + entry % pieces * CHUNK
        if row < stages * G:
            for v in T.vectorized(CHUNK):
                x_tile[row // G, row % G, inner + v] = T.cast(0.0, plan.dtype)


@macro
def fetch(plan: Plan, cta: Cta, inputs: Inputs, staged: Staged, stage, maps_stage, first, tx):
    """Copy x and the maps of a tile, a token a warp; zeros beyond the tokens and C."""
    lane, width = tx % WARP, plan.segment.width
    inner = lane * CHUNK
    channel = cta.rank * width + inner
    for row in T.unroll(plan.tile // plan.apply_warps):
        place = row * plan.apply_warps + tx // WARP
        token = first + place
        if inner < width:
            for i in T.unroll(plan.n):
                T.ptx_cp_async(
                    T.access_ptr(staged.x_tile[stage, place, i * width + inner], "w", CHUNK),
                    T.access_ptr(inputs.x[token, i, channel], "r", CHUNK),
                    CHUNK,
                    predicate=(channel < plan.C) and (token < plan.tokens),
                )
        if lane < plan.n:
            T.ptx_cp_async(
                T.access_ptr(staged.maps[maps_stage, place, lane * 4], "w", 4),
                T.access_ptr(inputs.h_res[token, lane * 4], "r", 4),
                4,
                predicate=token < plan.tokens,
            )
        elif lane == plan.n:
            T.ptx_cp_async(
                T.access_ptr(staged.maps[maps_stage, place, plan.n * plan.n], "w", 4),
                T.access_ptr(inputs.h_post[token, 0], "r", 4),
                4,
                predicate=token < plan.tokens,
            )


@macro
def fetch_output(plan: Plan, cta: Cta, inputs: Inputs, staged: Staged, stage, first, tx):
    """Copy layer_output of a tile; zeros beyond the tokens and C."""
    inner, width = tx % WARP * CHUNK, plan.segment.width
    channel = cta.rank * width + inner
    for row in T.unroll(plan.tile // plan.apply_warps):
        place = row * plan.apply_warps + tx // WARP
        if inner < width:
            T.ptx_cp_async(
                T.access_ptr(staged.output_tile[stage, place, inner], "w", CHUNK),
                T.access_ptr(inputs.layer_output[first + place, channel], "r", CHUNK),
                CHUNK,
                predicate=(channel < plan.C) and (first + place < plan.tokens),
            )


@macro
def take_output(plan: Plan, outputs, output_tile, stage, tx):
    """A lane's layer_output of a tile into registers, so that its stage can be copied to."""
    inner = tx % WARP * CHUNK
    for row in T.unroll(plan.tile // plan.apply_warps):
        if inner < plan.segment.width:
            for v in T.vectorized(CHUNK):
                outputs[row, v] = output_tile[stage, row * plan.apply_warps + tx // WARP, inner + v]


@macro
def merge_tile(plan: Plan, cta: Cta, staged: Staged, outputs, x_next, j, tx):
    """x_next of a tile: it replaces x in shared memory and goes to global memory."""
    n, width, dtype = plan.n, plan.segment.width, plan.dtype
    rows, first = plan.tile // plan.apply_warps, cta.first_token(plan, j)
    stage, maps_stage = j % plan.num_stages, j % (plan.prefetch + 1)
    lane, warp = tx % WARP, tx // WARP
    inner = lane * CHUNK
    channel = cta.rank * width + inner
    streams = T.alloc_local((n, CHUNK), dtype)
    words = T.view(streams, (n, CHUNK // 2), WORD)
    output_words = T.view(outputs, (rows, CHUNK // 2), WORD)
    weights = T.alloc_local((MAPS,), F32)
    merged = T.alloc_local((n, 2), F32)
    values = T.alloc_local((2,), F32)
    # x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]
    for row in T.unroll(rows):
        place = row * plan.apply_warps + warp
        token = first + place
        if inner < width:
            for i in T.unroll(n):
                for v in T.vectorized(CHUNK):
                    streams[i, v] = staged.x_tile[stage, place, i * width + inner + v]
            for k in T.unroll(MAPS // 4):
                for v in T.vectorized(4):
                    weights[k * 4 + v] = staged.maps[maps_stage, place, k * 4 + v]
            for k in T.unroll(CHUNK // 2):
                if dtype == "bfloat16":
                    values[0] = lower(output_words[row, k])
                    values[1] = upper(output_words[row, k])
                else:
                    for e in T.unroll(2):
                        values[e] = T.cast(outputs[row, k * 2 + e], F32)
                for o in T.unroll(n):
                    for e in T.unroll(2):
                        merged[o, e] = weights[n * n + o] * values[e]
                for i in T.unroll(n):
                    if dtype == "bfloat16":
                        values[0] = lower(words[i, k])
                        values[1] = upper(words[i, k])
                    else:
                        for e in T.unroll(2):
                            values[e] = T.cast(streams[i, k * 2 + e], F32)
                    for o in T.unroll(n):
                        for e in T.unroll(2):
                            merged[o, e] += weights[o * n + i] * values[e]
                for o in T.unroll(n):
                    for e in T.vectorized(2):
                        streams[o, k * 2 + e] = T.cast(merged[o, e], dtype)
            for o in T.unroll(n):
                for v in T.vectorized(CHUNK):
                    staged.x_tile[stage, place, o * width + inner + v] = streams[o, v]
            if (channel < plan.C) and (token < plan.tokens):
                for o in T.unroll(n):
                    for v in T.vectorized(CHUNK):
                        x_next[token, o, channel + v] = streams[o, v]
