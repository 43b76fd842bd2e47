"""grad_x warps of the persistent backward of `pre`.

A warp owns 32 channels of all four streams, as two tiles of 16 a stream; a lane is 4 * g + q. All
products are `mma.m16n8k*` whose rows are the 16 channels of a tile, so transposing `ldmatrix` reads
what shared memory holds token by token, and `stmatrix` writes results back. With u, b, p, s = 0, 1:

* grad_raw @ phi: A = phi, in registers as fp16, scaled by a power of two to the range of a rank's
  segment of it; B = grad_raw in fp16, scaled to the range of its token: 11 bits, as tf32.
  N = 2q + b is token 8u + 4b + q.
* sum_o h_res[o, i] * merge_grad[o, c]: K = (token, source) of four tokens and N = 2q + s is token q
  and stream 2p + s. Weights between different tokens are zero: most of a product is wasted, but no
  element is converted or loaded for it. Weights are pairs high + low of bf16, 16 bits.

Column 2q + b of the first kind and column 2q + s of the second are of one lane, and so are elements
2q + s of a fragment of x and 2q + b of one of grad_layer_input: radial * x and h_pre *
grad_layer_input, of one element each, are plain FMAs with nothing moved between lanes. Products
with zeros between tokens would take more registers for fragments, and spill.
A token of merge_grad to mix that is not finite reaches the other three.
"""

from functools import reduce
from typing import Any, NamedTuple

import tilelang.language as T
from tilelang import tvm

from ..common.pairs import WORD, lower, upper
from ..common.programs import F32, macro
from ..common.split import exponent_of, scale_of, unscale_of
from ..mapping.grad_x_pass import ADDED, MIXED
from .plan import (
    BF16,
    CHUNK,
    F16,
    GRAD_PHI_WARPS,
    ITERATION,
    MIXING,
    PUBLISHED,
    RADIAL,
    ROW_TILES,
    ROW_WORDS,
    STREAMS,
    TILE,
    WARP,
    WARP_CHANNELS,
    Cta,
    Plan,
    Shared,
    load_matrices,
    opaque,
)

TILES = STREAMS * WARP_CHANNELS // 16  # of 16 channels of a stream


class Lane(NamedTuple):
    """A grad_x thread's registers during a tile."""

    rows: Any  # grad_raw
    source: Any  # merge_grad
    x_words: Any
    grad_words: Any  # grad_layer_input
    h_pre: Any  # of two tokens and streams
    rest: Any  # radial and what undoes the scale, of two tokens
    products: Any  # of phi
    mixed: Any  # all other terms
    mixing_pairs: Any  # weights of h_res
    result_words: Any
    result: Any  # grad_x
    at_part: Any  # addresses
    at_word: Any


def store_matrices(row: Any, *words: Any) -> Any:
    """`stmatrix` with transposition."""
    operation = tvm.tirx.op.Op.get("tl.ptx_stmatrix")
    return T.call_intrin("handle", operation, T.bool(True), len(words), row, *words)


def part_address(plan: Plan, lane: Lane, u: Any, t: Any, b: Any) -> Any:
    """Of the lane's row of four matrices of merge_grad, then of grad_x."""
    return (lane.at_part ^ ((t * 2 + b) * CHUNK)) + (u * 8 + b * 4) * STREAMS * plan.width


@macro
def grad_x_warps(plan: Plan, cta: Cta, phi, grad_x, shared: Shared, reallocate, tx):
    """Iteration j forms grad_x of a tile whose dot products are `distance` iterations old."""
    threads, weights = plan.first_threads[2], shared.weights
    phi_tile = T.alloc_local((TILES * ROW_TILES * 4,), F16)
    # two iterations of the producers do not need what follows
    T.named_barrier_arrive(ITERATION, threads)
    T.sync_threads(PUBLISHED, threads)
    T.named_barrier_arrive(ITERATION, threads)
    if tx < plan.grad_x_threads:
        load_phi(plan, cta, phi_tile, shared, phi, tx)
    if reallocate:
        T.set_max_nreg(plan.registers[0], int(plan.registers[0] > plan.initial_registers))
    for _ in T.serial(1, plan.distance):
        T.sync_threads(PUBLISHED, threads)
        T.named_barrier_arrive(ITERATION, threads)
    # grad_x[i, c] = sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]
    #                + h_pre[i] * grad_layer_input[c] + merge_grad[i, c] of tile j
    for j in T.serial(cta.iterations):
        lane = T.alloc_var("int32", opaque(weights, tx))
        T.sync_threads(PUBLISHED, threads)
        first = plan.first_token(cta, j)
        if (tx < plan.grad_x_threads) and (first < plan.tokens):
            form_grad_x(
                plan, cta, grad_x, phi_tile, shared, j % plan.num_stages, j % 2, first, lane
            )
        elif j < cta.iterations - 1:
            T.named_barrier_arrive(ITERATION, threads)


@macro
def load_phi(plan: Plan, cta: Cta, phi_tile, shared: Shared, phi, tx):
    """Keep phi of the lane's elements, scaled to fp16's range: rows 2q, 2q + 1, 2q + 8, ..

    What undoes the scale, the rank's, goes after the first of the scaled rows; high_low is used on
    the way.
    """
    warps = plan.grad_x_threads // WARP
    maxima = T.view(shared.high_low, (WARP * ROW_TILES * 4,), F32)
    values = T.alloc_local((TILES * ROW_TILES * 4,), F32)
    largest = T.alloc_var(F32, 0.0)
    exponent = T.alloc_var("int32", 0)
    lane, warp = tx % WARP, tx // WARP
    channel = cta.rank * plan.width + warp * WARP_CHANNELS + lane // 4
    # chunks are there or not for a whole warp
    present = T.alloc_var("int32", plan.chunks(cta.rank) - warp * (WARP_CHANNELS // CHUNK))
    for tile in T.unroll(TILES):
        for h in T.unroll(2):
            for r in T.unroll(ROW_TILES):
                for k in T.unroll(2):
                    index = (tile * ROW_TILES + r) * 4 + h * 2 + k
                    values[index] = 0.0
                    if plan.whole or (tile % 2 * 2 + h < present):
                        values[index] = phi[
                            r * 8 + lane % 4 * 2 + k, tile // 2, channel + tile % 2 * 16 + h * 8
                        ]
                    largest = T.max(largest, T.abs(values[index]))
    for step in T.unroll(5):
        largest = T.max(largest, T.shfl_xor(largest, 1 << step))
    if lane == 0:
        maxima[warp] = largest
    T.sync_threads(MIXING, plan.grad_x_threads)
    exponent = exponent_of(reduce(T.max, [maxima[w] for w in range(warps)]))
    largest = scale_of(exponent)
    if tx == 0:
        T.view(shared.scaled, (2 * WARP * 4,), F32)[3] = unscale_of(exponent)
    for v in T.unroll(TILES * ROW_TILES * 4):
        phi_tile[v] = T.cast(values[v] * largest, F16)


@macro
def form_grad_x(plan: Plan, cta: Cta, grad_x, phi_tile, shared: Shared, stage, part, first, tx):
    """grad_x of a tile for the warp's channels, by way of stage `part` of `staged`."""
    width, token_size = plan.width, plan.token_size
    warp = tx // WARP
    lane = tx % WARP
    g, q = lane // 4, lane % 4
    row, second = lane % 8, lane // 16  # of what the lane names to ldmatrix and stmatrix
    words = T.view(shared.high_low, (TILE * ROW_WORDS * 2,), BF16)
    flat = T.view(shared.tiles, (plan.num_stages * TILE * token_size,), BF16)
    flat_part = T.view(shared.staged, (2 * TILE * STREAMS * width,), BF16)
    rows = T.alloc_local((8,), F16)
    source = T.alloc_local((16,), BF16)
    x_words = T.alloc_local((4,), WORD)
    grad_words = T.alloc_local((4,), WORD)
    h_pre = T.alloc_local((4,), F32)
    rest = T.alloc_local((4,), F32)
    products = T.alloc_local((8,), F32)
    mixed = T.alloc_local((8,), F32)
    mixing_pairs = T.alloc_local((8,), BF16)
    result_words = T.alloc_local((8,), WORD)
    # tensor cores take views from their beginning only: an offset would count words
    source_x = T.view(x_words, (8,), BF16)
    source_grad = T.view(grad_words, (8,), BF16)
    result = T.view(result_words, (16,), BF16)
    # the lane's rows for ldmatrix, then for stmatrix; in bits 3 and 4 another chunk
    chunk = T.alloc_var("int32", 0)
    at_grad = T.alloc_var("int32", 0)
    at_x = T.alloc_var("int32", 0)
    at_part = T.alloc_var("int32", 0)
    at_word = T.alloc_var("int32", 0)
    chunk = (warp * (WARP_CHANNELS // CHUNK) + lane // 8 % 2) ^ row
    at_grad = (stage * TILE + row % 2 * 4 + row // 2) * token_size + STREAMS * width
    at_grad = at_grad + (chunk ^ second * 2) * CHUNK
    at_x = (stage * TILE + second * 4 + row // 2) * token_size + row % 2 * width
    at_x = at_x + (chunk ^ second) * CHUNK
    at_part = (part * TILE + row // 2) * (STREAMS * width) + chunk * CHUNK
    at_part = at_part + (second * 2 + row % 2) * width
    # a quarter of a warp reads one token's words, in three banks of its row
    at_word = g // 2 * (ROW_WORDS // 4) + T.if_then_else(g // 2 == q, g % 2, 2)
    registers = Lane(
        rows, source, x_words, grad_words, h_pre, rest, products, mixed, mixing_pairs,
        result_words, result, at_part, at_word,
    )  # fmt: skip
    load_rows(rows, shared.scaled, lane, 0)
    # grad_x[i, c] of eight tokens u, 16 channels t, four tokens b, two streams p
    for u in T.unroll(2):
        load_matrices(source_grad, 0, flat, at_grad + u * (8 * token_size), True)  # of both tiles
        for t in T.unroll(2):
            for b in T.unroll(2):
                for v in T.vectorized(2):
                    rest[b * 2 + v] = shared.weights[u * 8 + b * 4 + q, RADIAL + v]
            # two streams after the other two: all at once are more registers than there are
            for p in T.unroll(2):
                if (plan.merge_grad == MIXED) and (p == 1):
                    T.sync_warp()  # else loads come earlier than there are registers
                load_matrices(
                    source_x, 0, flat,
                    (at_x ^ (t * 2 * CHUNK)) + (u * (8 * token_size) + p * 2 * width), True,
                )  # fmt: skip
                multiply_phi(phi_tile, registers, p, t)
                add_x_and_layer(shared.weights, registers, u, t, p, q)
                if (plan.merge_grad == MIXED) and (u == 0) and (t == 0) and (p == 0):
                    T.sync_threads(MIXING, plan.grad_x_threads + GRAD_PHI_WARPS * WARP)
                add_merge_grad(plan, flat_part, words, registers, u, t, p)
                for b in T.unroll(2):
                    for v in T.unroll(4):
                        result[b * 8 + p * 4 + v] = T.cast(
                            products[v % 2 * 4 + v // 2 * 2 + b] * rest[b * 2 + 1]
                            + mixed[b * 4 + v],
                            BF16,
                        )
            if (u == 0) and (t == 1):
                load_rows(rows, shared.scaled, lane, 1)
            T.sync_warp()
            store_result(plan, flat_part, registers, u, t)
    T.named_barrier_arrive(ITERATION, plan.first_threads[2])
    T.sync_warp()
    # the thread anew: what follows from it is kept through all products, else, and spilled
    store_rows(plan, cta, grad_x, flat_part, part, first, opaque(shared.weights, tx))


@macro
def load_rows(rows, scaled, lane, u):
    """grad_raw of eight tokens, which loads do not fetch past stores."""
    for k in T.vectorized(8):
        rows[k] = scaled[u, lane, k]


@macro
def multiply_phi(phi_tile, lane: Lane, p, t):
    """products[c, t] = sum_k phi[k, c] * grad_raw[t, k], scaled."""
    for v in T.unroll(8):
        lane.products[v] = 0.0
    for i in T.unroll(2):
        T.ptx_mma(
            F32, "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
            phi_tile.data, ((p * 2 + i) * 2 + t) * ROW_TILES * 4, lane.rows.data, 0,
            lane.products.data, i * 4, T.bool(False),
        )  # fmt: skip
    for i in T.unroll(2):
        T.ptx_mma(
            F32, "m16n8k8", "row", "col", "fp16", "fp16", "fp32",
            phi_tile.data, ((p * 2 + i) * 2 + t) * ROW_TILES * 4 + 8, lane.rows.data, 4,
            lane.products.data, i * 4, T.bool(False),
        )  # fmt: skip


@macro
def add_x_and_layer(weights, lane: Lane, u, t, p, q):
    """mixed[i, c] = radial * x[i, c] + h_pre[i] * grad_layer_input[c]."""
    rest, h_pre, mixed = lane.rest, lane.h_pre, lane.mixed
    for b in T.unroll(2):
        for v in T.vectorized(2):
            h_pre[b * 2 + v] = weights[u * 8 + b * 4 + q, p * 2 + v]
    for b in T.unroll(2):
        for h in T.unroll(2):
            word = lane.x_words[b * 2 + h]
            grad_word = lane.grad_words[t * 2 + h]
            grad = upper(grad_word) if b == 1 else lower(grad_word)
            mixed[b * 4 + h * 2] = lower(word) * rest[b * 2] + grad * h_pre[b * 2]
            mixed[b * 4 + h * 2 + 1] = upper(word) * rest[b * 2] + grad * h_pre[b * 2 + 1]


@macro
def add_merge_grad(plan: Plan, flat_part, words, lane: Lane, u, t, p):
    """mixed[i, c] += merge_grad[i, c], or += sum_o h_res[o, i] * merge_grad[o, c]."""
    source, mixed, mixing_pairs = lane.source, lane.mixed, lane.mixing_pairs
    if (plan.merge_grad != "") and (p == 0):
        for b in T.unroll(2):
            load_matrices(source, b * 8, flat_part, part_address(plan, lane, u, t, b), True)
    for b in T.unroll(2):
        if plan.merge_grad == ADDED:
            for v in T.unroll(4):
                mixed[b * 4 + v] += T.cast(source[b * 8 + p * 4 + v], F32)
        if plan.merge_grad == MIXED:
            for v in T.vectorized(8):
                mixing_pairs[v] = words[
                    (lane.at_word + (u * 8 + b * 4) * (ROW_WORDS // 4) + p * 3) * 8 + v
                ]
            for low in T.unroll(2):
                T.ptx_mma(
                    F32, "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
                    source.data, b * 8, mixing_pairs.data, low * 4,
                    mixed.data, b * 4, T.bool(False),
                )  # fmt: skip


@macro
def store_result(plan: Plan, flat_part, lane: Lane, u, t):
    """Write grad_x in merge_grad's place, which this warp alone reads."""
    for b in T.unroll(2):
        store_matrices(
            T.access_ptr(flat_part[part_address(plan, lane, u, t, b)], "w", CHUNK),
            lane.result_words[b * 4], lane.result_words[b * 4 + 1],
            lane.result_words[b * 4 + 2], lane.result_words[b * 4 + 3],
        )  # fmt: skip


@macro
def store_rows(plan: Plan, cta: Cta, grad_x, flat_part, part, first, tx):
    """Copy rows of grad_x from shared to global memory."""
    C, width, rank = plan.C, plan.width, cta.rank
    out = T.alloc_local((CHUNK,), BF16)
    thread = T.alloc_var("int32", tx)
    lane = thread % WARP
    g, q = lane // 4, lane % 4
    present = T.alloc_var("int32", T.cast(T.min(plan.tokens - first, TILE), "int32"))
    chunk = T.alloc_var("int32", 0)
    at_out = T.alloc_var("int32", 0)
    inner = T.alloc_var("int32", 0)  # in chunks, as origin
    origin = T.alloc_var("int64", 0)
    # lanes of a quarter of the warp: tokens t and t + 2, so that they meet in no bank
    chunk = thread // WARP * (WARP_CHANNELS // CHUNK) + q
    inner = (g % 2 * 2 * STREAMS + g // 2) * (C // CHUNK) + chunk
    origin = first * (STREAMS * C // CHUNK) + rank * (width // CHUNK)
    origin = origin + T.cast(T.cast(inner, WORD), "int64")
    at_out = ((part * TILE + g % 2 * 2) * STREAMS + g // 2) * (width // CHUNK)
    at_out = at_out + (chunk ^ (g % 2 * 4 + g // 2 % 2))
    inner = T.if_then_else(plan.whole or (chunk < plan.chunks(rank)), present - g % 2 * 2, 0)
    for step in T.unroll(8):
        place = step // 2 * 4 + step % 2
        for v in T.vectorized(CHUNK):
            out[v] = flat_part[
                ((at_out ^ (step % 2 * 2 + step // 2 % 2)) + place * (STREAMS * width // CHUNK))
                * CHUNK
                + v
            ]
        if place < inner:
            for v in T.vectorized(CHUNK):
                grad_x[(origin + place * (STREAMS * C // CHUNK)) * CHUNK + v] = out[v]
