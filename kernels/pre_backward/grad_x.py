"""What the warps that form grad_x do in `pre_backward_team`, as macros.

A warp owns 32 channels of all four streams, as two tiles of 16 a stream; a lane is 4 * g + q. All
products are `mma.m16n8k*` whose rows are the 16 channels of a tile, so transposing `ldmatrix` feeds
what shared memory holds token by token, and `stmatrix` puts results back. With u, b, p, s = 0 or 1:

* grad_raw @ phi: A = phi, in registers as fp16, scaled by a power of two to the range of a member's
  part of it; B = grad_raw in fp16, scaled to the range of its token: 11 bits, as tf32. N = 2q + b
  is token 8u + 4b + q.
* sum_o h_res[o, i] * part[o, c]: K = (token, source) of four tokens and N = 2q + s is token q and
  stream 2p + s. Weights between different tokens are zero: most of a product is wasted, but no
  element is converted or loaded for it. Weights are pairs high + low of bf16, 16 bits.

Column 2q + b of the first kind and column 2q + s of the second are of one lane, and so are elements
2q + s of a fragment of x and 2q + b of one of grad_layer_input: radial * x and h_pre *
grad_layer_input, of one element each, are plain FMAs with nothing moved between lanes. Products
with zeros between tokens would take more registers for fragments, and spill.
A token of a part to mix that is not finite reaches the other three.

`_team_backward_roles.publish` and `leave_words` leave grad_raw and weights in this order.
"""

from collections.abc import Callable
from typing import Any

import tilelang.language as T
from tilelang import tvm

from ..common.pairs import WORD, lower, upper
from ..common.programs import F32
from ..common.split import exponent_of, scale_of, unscale_of
from ..mapping.grad_x_pass import ADDED, MIXED
from .mailbox import (
    BF16,
    CHUNK,
    F16,
    GROUP,
    RADIAL,
    ROW_TILES,
    ROW_WORDS,
    STREAMS,
    SUM_WARPS,
    WARP,
    WARP_CHANNELS,
    Share,
    largest_of,
    load_macro,
    unknown,
)

TILES = STREAMS * WARP_CHANNELS // 16  # of 16 channels of a stream


def store_matrices(row: Any, *words: Any) -> Any:
    """`stmatrix` with transposition."""
    operation = tvm.tirx.op.Op.get("tl.ptx_stmatrix")
    return T.call_intrin("handle", operation, T.bool(True), len(words), row, *words)


def columns_macros(share: Share, tokens: object) -> tuple[Callable[..., None], ...]:
    """The macros `load_phi` and `form` of warps that mix."""
    C, width = share.channels, share.width
    threads, token_size = share.warps * WARP, (STREAMS + 1) * width
    load = load_macro(transposed=True)

    @T.macro
    def load_phi(phi_tile, scaled, high_low, phi, member, tx):
        """Keep phi of the lane's elements, scaled to fp16's range: rows 2q, 2q + 1, 2q + 8, ..

        What undoes the scale, the member's, goes behind the first of the scaled rows; high_low is
        used on the way.
        """
        maxima = T.view(high_low, (WARP * ROW_TILES * 4,), F32)
        values = T.alloc_local((TILES * ROW_TILES * 4,), F32)
        largest = T.alloc_var(F32, 0.0)
        exponent = T.alloc_var("int32", 0)
        lane, warp = tx % WARP, tx // WARP
        channel = member * width + warp * WARP_CHANNELS + lane // 4
        # chunks are there or not for a whole warp
        present = T.alloc_var("int32", share.chunks(member) - warp * (WARP_CHANNELS // CHUNK))
        for tile in T.unroll(TILES):
            for h in T.unroll(2):
                for r in T.unroll(ROW_TILES):
                    for k in T.unroll(2):
                        index = (tile * ROW_TILES + r) * 4 + h * 2 + k
                        values[index] = 0.0
                        if share.whole or (tile % 2 * 2 + h < present):
                            values[index] = phi[
                                r * 8 + lane % 4 * 2 + k, tile // 2, channel + tile % 2 * 16 + h * 8
                            ]
                        largest = T.max(largest, T.abs(values[index]))
        for step in T.unroll(5):
            largest = T.max(largest, T.shfl_xor(largest, 1 << step))
        if lane == 0:
            maxima[warp] = largest
        T.sync_threads(5, threads)
        exponent = exponent_of(largest_of(maxima, share.warps))
        largest = scale_of(exponent)
        if tx == 0:
            T.view(scaled, (2 * WARP * 4,), F32)[3] = unscale_of(exponent)
        for v in T.unroll(TILES * ROW_TILES * 4):
            phi_tile[v] = T.cast(values[v] * largest, F16)

    @T.macro
    def begin(rows, scaled, lane, u):
        """grad_raw of eight tokens, which loads do not fetch past stores."""
        for k in T.vectorized(8):
            rows[k] = scaled[u, lane, k]

    @T.macro
    def store_rows(grad_x, flat_part, part_slot, first, member, tx):
        """Rows of grad_x from where products have left them, which is in the part's place."""
        out = T.alloc_local((CHUNK,), BF16)
        thread = T.alloc_var("int32", tx)
        lane = thread % WARP
        g, q = lane // 4, lane % 4
        present = T.alloc_var("int32", T.cast(T.min(tokens - first, GROUP), "int32"))
        chunk = T.alloc_var("int32", 0)
        at_out = T.alloc_var("int32", 0)
        inner = T.alloc_var("int32", 0)  # in chunks, as origin
        origin = T.alloc_var("int64", 0)
        # lanes of a quarter of the warp: tokens t and t + 2, so that they meet in no bank
        chunk = thread // WARP * (WARP_CHANNELS // CHUNK) + q
        inner = (g % 2 * 2 * STREAMS + g // 2) * (C // CHUNK) + chunk
        origin = first * (STREAMS * C // CHUNK) + member * (width // CHUNK)
        origin = origin + T.cast(T.cast(inner, WORD), "int64")
        at_out = ((part_slot * GROUP + g % 2 * 2) * STREAMS + g // 2) * (width // CHUNK)
        at_out = at_out + (chunk ^ (g % 2 * 4 + g // 2 % 2))
        inner = T.if_then_else(
            share.whole or (chunk < share.chunks(member)), present - g % 2 * 2, 0
        )
        for turn in T.unroll(8):
            place = turn // 2 * 4 + turn % 2
            for v in T.vectorized(CHUNK):
                out[v] = flat_part[
                    ((at_out ^ (turn % 2 * 2 + turn // 2 % 2)) + place * (STREAMS * width // CHUNK))
                    * CHUNK
                    + v
                ]
            if place < inner:
                for v in T.vectorized(CHUNK):
                    grad_x[(origin + place * (STREAMS * C // CHUNK)) * CHUNK + v] = out[v]

    @T.macro
    def form(
        grad_x, phi_tile, tiles, staged, high_low, scaled, weights,
        slot, part_slot, first, member, tx, released,
    ):  # fmt: skip
        """grad_x of a group for the warp's channels."""
        warp = tx // WARP
        lane = tx % WARP
        g, q = lane // 4, lane % 4
        row, second = lane % 8, lane // 16  # of what the lane names to ldmatrix and stmatrix
        words = T.view(high_low, (GROUP * ROW_WORDS * 2,), BF16)
        flat = T.view(tiles, (share.depth * GROUP * token_size,), BF16)
        flat_part = T.view(staged, (2 * GROUP * STREAMS * width,), BF16)
        rows = T.alloc_local((8,), F16)
        source = T.alloc_local((16,), BF16)
        x_words = T.alloc_local((4,), WORD)
        grad_words = T.alloc_local((4,), WORD)
        h_pre = T.alloc_local((4,), F32)  # of two tokens and streams
        rest = T.alloc_local((4,), F32)  # radial and what undoes the scale, of two tokens
        products = T.alloc_local((8,), F32)
        mixed = T.alloc_local((8,), F32)
        mixing_pairs = T.alloc_local((8,), BF16)
        result_words = T.alloc_local((8,), WORD)
        # tensor cores take views from their beginning only: an offset would count words
        source_x = T.view(x_words, (8,), BF16)
        source_grad = T.view(grad_words, (8,), BF16)
        result = T.view(result_words, (16,), BF16)
        # the lane's rows for ldmatrix, then for stmatrix; in bits 3 and 4 another chunk, see above
        chunk = T.alloc_var("int32", 0)
        at_grad = T.alloc_var("int32", 0)
        at_x = T.alloc_var("int32", 0)
        at_part = T.alloc_var("int32", 0)
        at_word = T.alloc_var("int32", 0)
        chunk = (warp * (WARP_CHANNELS // CHUNK) + lane // 8 % 2) ^ row
        at_grad = (slot * GROUP + row % 2 * 4 + row // 2) * token_size + STREAMS * width
        at_grad = at_grad + (chunk ^ second * 2) * CHUNK
        at_x = (slot * GROUP + second * 4 + row // 2) * token_size + row % 2 * width
        at_x = at_x + (chunk ^ second) * CHUNK
        at_part = (part_slot * GROUP + row // 2) * (STREAMS * width) + chunk * CHUNK
        at_part = at_part + (second * 2 + row % 2) * width
        # a quarter of a warp reads one token's words, in three banks of its row
        at_word = g // 2 * (ROW_WORDS // 4) + T.if_then_else(g // 2 == q, g % 2, 2)
        begin(rows, scaled, lane, 0)
        for u in T.unroll(2):
            load(source_grad, 0, flat, at_grad + u * (8 * token_size))  # of both tiles
            for t in T.unroll(2):
                for b in T.unroll(2):
                    for v in T.vectorized(2):
                        rest[b * 2 + v] = weights[u * 8 + b * 4 + q, RADIAL + v]
                # two streams after the other two: all at once are more registers than there are
                for p in T.unroll(2):
                    if (share.part == MIXED) and (p == 1):
                        T.sync_warp()  # else loads come earlier than there are registers
                    load(
                        source_x, 0, flat,
                        (at_x ^ (t * 2 * CHUNK)) + (u * (8 * token_size) + p * 2 * width),
                    )  # fmt: skip
                    # products[c, t] = sum_k phi[k, c] * grad_raw[t, k], scaled
                    for v in T.unroll(8):
                        products[v] = 0.0
                    for i in T.unroll(2):
                        T.ptx_mma(
                            F32, "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
                            phi_tile.data, ((p * 2 + i) * 2 + t) * ROW_TILES * 4, rows.data, 0,
                            products.data, i * 4, T.bool(False),
                        )  # fmt: skip
                    for i in T.unroll(2):
                        T.ptx_mma(
                            F32, "m16n8k8", "row", "col", "fp16", "fp16", "fp32",
                            phi_tile.data, ((p * 2 + i) * 2 + t) * ROW_TILES * 4 + 8, rows.data, 4,
                            products.data, i * 4, T.bool(False),
                        )  # fmt: skip
                    # radial * x[i, c] + h_pre[i] * grad_layer_input[c]
                    for b in T.unroll(2):
                        for v in T.vectorized(2):
                            h_pre[b * 2 + v] = weights[u * 8 + b * 4 + q, p * 2 + v]
                    for b in T.unroll(2):
                        for h in T.unroll(2):
                            word = x_words[b * 2 + h]
                            grad_word = grad_words[t * 2 + h]
                            grad = upper(grad_word) if b == 1 else lower(grad_word)
                            mixed[b * 4 + h * 2] = lower(word) * rest[b * 2] + grad * h_pre[b * 2]
                            mixed[b * 4 + h * 2 + 1] = (
                                upper(word) * rest[b * 2] + grad * h_pre[b * 2 + 1]
                            )
                    if (share.part == MIXED) and (u == 0) and (t == 0) and (p == 0):
                        T.sync_threads(5, threads + SUM_WARPS * WARP)
                    if (share.part != "") and (p == 0):
                        for b in T.unroll(2):
                            load(
                                source, b * 8, flat_part,
                                (at_part ^ ((t * 2 + b) * CHUNK))
                                + (u * 8 + b * 4) * STREAMS * width,
                            )  # fmt: skip
                    for b in T.unroll(2):
                        if share.part == ADDED:
                            for v in T.unroll(4):
                                mixed[b * 4 + v] += T.cast(source[b * 8 + p * 4 + v], F32)
                        # .. or sum_o h_res[o, i] * part[o, c]
                        if share.part == MIXED:
                            for v in T.vectorized(8):
                                mixing_pairs[v] = words[
                                    (at_word + (u * 8 + b * 4) * (ROW_WORDS // 4) + p * 3) * 8 + v
                                ]
                            for low in T.unroll(2):
                                T.ptx_mma(
                                    F32, "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
                                    source.data, b * 8, mixing_pairs.data, low * 4,
                                    mixed.data, b * 4, T.bool(False),
                                )  # fmt: skip
                    for b in T.unroll(2):
                        for v in T.unroll(4):
                            result[b * 8 + p * 4 + v] = T.cast(
                                products[v % 2 * 4 + v // 2 * 2 + b] * rest[b * 2 + 1]
                                + mixed[b * 4 + v],
                                BF16,
                            )
                if (u == 0) and (t == 1):
                    begin(rows, scaled, lane, 1)
                T.sync_warp()
                for b in T.unroll(2):
                    # in the part's place, which this warp alone reads
                    store_matrices(
                        T.access_ptr(
                            flat_part[
                                (at_part ^ ((t * 2 + b) * CHUNK))
                                + (u * 8 + b * 4) * STREAMS * width
                            ],
                            "w", CHUNK,
                        ),
                        result_words[b * 4], result_words[b * 4 + 1],
                        result_words[b * 4 + 2], result_words[b * 4 + 3],
                    )  # fmt: skip
        T.named_barrier_arrive(1, released)
        T.sync_warp()
        # the thread anew: what follows from it is kept through all products, else, and spilled
        store_rows(grad_x, flat_part, part_slot, first, member, unknown(weights, tx))

    return load_phi, form
