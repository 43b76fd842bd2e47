"""What the warps that form columns do in `pre_backward_team`, as macros.

Notation: E = n * width elements of a member, in chunks of 8; a lane is 4 * g + q. A warp owns 128
elements; its lane has chunks g and 8 + g of them, for the tokens q, q + 4, q + 8, q + 12. In
`mma.m16n8k*` these are both what the lane accumulates of grad_x and what it feeds to grad_phi, so
that neither product needs `ldmatrix` or a shuffle:

* Row r of an instruction is element 2 * m + r // 8 of chunk r % 8; column (or K) 8 * u + 2 * q + b
  is token q + 4 * (2 * u + b).
* grad_x: A = phi, in registers as fp16, scaled by a power of two to the range of a warp's part of
  it; B = grad_raw in fp16, scaled to the range of its token: 11 bits, as tf32.
* grad_phi: A = x, as it is; B = grad_raw as a pair high + low of bf16.

`_team_backward_roles.publish` leaves grad_raw in this order.
"""

from collections.abc import Callable

import tilelang.language as T

from ._mapping_columns import ADDED, MIXED
from ._pairs import WORD, lower, upper
from ._programs import F32, logits_per_token
from ._team_backward_roles import (
    BF16,
    CHUNK,
    F16,
    GROUP,
    ROW_TILES,
    STREAMS,
    WARP,
    WARP_CHUNKS,
    Share,
    exponent_of,
    swizzled,
)


def columns_macros(share: Share, tokens: object) -> tuple[Callable[..., None], ...]:
    """The macros `load_phi`, `form` and `add_phi`."""
    C, width, chunks = share.channels, share.width, share.chunks
    stream_chunks, logits = width // CHUNK, logits_per_token(STREAMS)

    @T.macro
    def load_phi(phi_tile, weights, phi, member, tx):
        """Keep phi of the lane's elements, scaled to fp16's range: rows 2q, 2q + 1, 2q + 8, .."""
        values = T.alloc_local((2, ROW_TILES * 2, CHUNK), F32)
        largest = T.alloc_var(F32, 0.0)
        exponent = T.alloc_var("int32", 0)
        lane, warp = tx % WARP, tx // WARP
        for h in T.unroll(2):
            chunk = warp * WARP_CHUNKS + h * 8 + lane // 4
            channel = member * width + chunk % stream_chunks * CHUNK
            for r in T.unroll(ROW_TILES * 2):
                for v in T.vectorized(CHUNK):
                    values[h, r, v] = 0.0
                if (chunk < chunks) and (channel < C):
                    for v in T.vectorized(CHUNK):
                        values[h, r, v] = phi[
                            r // 2 * 8 + lane % 4 * 2 + r % 2, chunk // stream_chunks, channel + v
                        ]
                for v in T.unroll(CHUNK):
                    largest = T.max(largest, T.abs(values[h, r, v]))
        for step in T.unroll(5):
            largest = T.max(largest, T.shfl_xor(largest, 1 << step))
        exponent = exponent_of(largest)
        largest = T.reinterpret((268 - exponent) << 23, F32)
        if lane == 0:  # the tokens' rows have room
            weights[warp, STREAMS + 2] = T.reinterpret((exponent - 14) << 23, F32)
        T.sync_warp()
        for h in T.unroll(2):
            for m in T.unroll(4):
                for r in T.unroll(ROW_TILES):
                    for e in T.unroll(2):
                        for k in T.unroll(2):
                            phi_tile[((h * 4 + m) * ROW_TILES + r) * 4 + e * 2 + k] = T.cast(
                                values[h, r * 2 + k, m * 2 + e] * largest, F16
                            )

    @T.macro
    def add_scaled(result, words, weight):
        """Add the chunk in some words, weighted."""
        for k in T.unroll(CHUNK // 2):
            result[2 * k] += weight * lower(words[k])
            result[2 * k + 1] += weight * upper(words[k])

    @T.macro
    def form(
        grad_x, grad_phi, phi_tile, streams, inputs, staged, h_res, high_low, scaled, weights,
        slot, part_slot, first, member, tx, meeting,
    ):  # fmt: skip
        """grad_x of a group, and its share of grad_phi, for the warp's elements."""
        lane, warp = tx % WARP, tx // WARP
        q = lane % 4
        present = T.alloc_var("int32", T.cast(T.min(tokens - first, GROUP), "int32"))
        inner_origin = T.alloc_var("int32", 0)  # of the lane's first token, in chunks
        origin = T.alloc_var("int64", 0)
        x_lane = T.alloc_local((4, CHUNK), BF16)
        columns = T.alloc_local((4 * 8,), BF16)
        pairs = T.alloc_local((ROW_TILES * 4,), BF16)
        rows = T.alloc_local((8,), F16)
        products = T.alloc_local((4 * 4,), F32)
        stream_lane = T.alloc_local((CHUNK,), BF16)
        grad_input = T.alloc_local((CHUNK,), BF16)
        part = T.alloc_local((CHUNK,), BF16)
        stream_words = T.view(stream_lane, (CHUNK // 2,), WORD)
        grad_words = T.view(grad_input, (CHUNK // 2,), WORD)
        part_words = T.view(part, (CHUNK // 2,), WORD)
        result = T.alloc_local((CHUNK,), F32)
        mixing = T.alloc_local((2,), F32)
        weight = T.alloc_var(F32, 0.0)
        for h in T.unroll(2):
            chunk = T.min(warp * WARP_CHUNKS + h * 8 + lane // 4, chunks - 1)
            inner = chunk % stream_chunks
            channel = member * width + inner * CHUNK
            stream = chunk // stream_chunks
            inside = (warp * WARP_CHUNKS + h * 8 + lane // 4 < chunks) and (channel < C)
            inner_origin = (q * STREAMS + stream) * (C // CHUNK) + channel // CHUNK
            origin = first * (STREAMS * C // CHUNK) + T.cast(inner_origin, "int64")
            if share.part == MIXED:
                # lane t or 16 + t has h_res[o, i] of token t and two o; i is the warp's in h
                mixed_row = T.min(first + lane % GROUP, tokens - 1)
                for r in T.unroll(2):
                    mixing[r] = h_res[mixed_row, (lane // GROUP * 2 + r) * STREAMS + stream]
            for c in T.unroll(4):
                for v in T.vectorized(CHUNK):
                    x_lane[c, v] = streams[slot, c * 4 + q, stream, swizzled(inner, q) + v]
            for m in T.unroll(4):
                for c in T.unroll(4):
                    for e in T.unroll(2):
                        columns[m * 8 + c // 2 * 4 + e * 2 + c % 2] = x_lane[c, m * 2 + e]
            # grad_phi[k, e] += sum_t grad_raw[t, k] * x[t, e], high parts, then low ones
            for low in T.unroll(2):
                for r in T.unroll(ROW_TILES):
                    for k in T.vectorized(4):
                        pairs[r * 4 + k] = high_low[lane, (low * ROW_TILES + r) * 4 + k]
                for m in T.unroll(4):
                    for r in T.unroll(ROW_TILES):
                        T.ptx_mma(
                            F32, "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
                            columns.data, m * 8, pairs.data, r * 4,
                            grad_phi.data, ((h * 4 + m) * ROW_TILES + r) * 4, T.bool(False),
                        )  # fmt: skip
            # the part is here; x is read again: that takes fewer registers than keeping it
            if h == 0:
                T.sync_threads(3, meeting)
            T.sync_warp()
            for u in T.unroll(2):
                # products[t, e] = sum_k grad_raw[t, k] * phi[k, e], scaled
                for k in T.vectorized(8):
                    rows[k] = scaled[u, lane, k]
                for m in T.unroll(4):
                    for v in T.unroll(4):
                        products[m * 4 + v] = 0.0
                    T.ptx_mma(
                        F32, "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
                        phi_tile.data, (h * 4 + m) * ROW_TILES * 4, rows.data, 0,
                        products.data, m * 4, T.bool(False),
                    )  # fmt: skip
                    T.ptx_mma(
                        F32, "m16n8k8", "row", "col", "fp16", "fp16", "fp32",
                        phi_tile.data, (h * 4 + m) * ROW_TILES * 4 + 8, rows.data, 4,
                        products.data, m * 4, T.bool(False),
                    )  # fmt: skip
                # grad_x[i, c] = sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]
                #                + h_pre[i] * grad_layer_input[c] + part[i, c] ..
                for c in T.unroll(2):
                    token = (u * 2 + c) * 4 + q
                    scale = weights[token, STREAMS + 1] * weights[warp, STREAMS + 2]
                    for v in T.unroll(CHUNK):
                        result[v] = products[v // 2 * 4 + v % 2 * 2 + c] * scale
                    if share.part == ADDED:
                        for v in T.vectorized(CHUNK):
                            part[v] = staged[part_slot, token, stream, swizzled(inner, q) + v]
                        add_scaled(result, part_words, 1.0)
                    # part[i, c] .. or sum_o h_res[o, i] * part[o, c]
                    if share.part == MIXED:
                        for o in T.unroll(STREAMS):
                            weight = T.shfl_sync(mixing[o % 2], o // 2 * GROUP + token)
                            for v in T.vectorized(CHUNK):
                                part[v] = staged[part_slot, token, o, swizzled(inner, q) + v]
                            add_scaled(result, part_words, weight)
                    radial = weights[token, STREAMS]
                    h_pre = weights[token, stream]
                    for v in T.vectorized(CHUNK):
                        stream_lane[v] = streams[slot, token, stream, swizzled(inner, q) + v]
                    add_scaled(result, stream_words, radial)
                    for v in T.vectorized(CHUNK):
                        grad_input[v] = inputs[slot, token, 0, swizzled(inner, q) + v]
                    add_scaled(result, grad_words, h_pre)
                    if inside and (token < present):
                        for v in T.vectorized(CHUNK):
                            grad_x[
                                (origin + (u * 2 + c) * (4 * STREAMS * C // CHUNK)) * CHUNK + v
                            ] = T.cast(result[v], BF16)

    @T.macro
    def add_phi(grad_phi_parts, grad_phi, again, team, member, tx):
        """The team's part of grad_phi for the warp's elements, added to what is there `again`."""
        lane, warp = tx % WARP, tx // WARP
        values = T.alloc_local((CHUNK,), F32)
        inner = T.alloc_var("int32", 0)
        origin = T.alloc_var("int64", 0)  # in chunks
        for h in T.unroll(2):
            chunk = warp * WARP_CHUNKS + h * 8 + lane // 4
            channel = member * width + chunk % stream_chunks * CHUNK
            inner = (lane % 4 * 2 * STREAMS + chunk // stream_chunks) * (C // CHUNK)
            inner += channel // CHUNK
            origin = T.cast(team * (logits * STREAMS * C // CHUNK) + inner, "int64")
            if (chunk < chunks) and (channel < C):
                for r in T.unroll(ROW_TILES * 2):
                    row = (r // 2 * 8 + r % 2) * STREAMS * C
                    for v in T.unroll(CHUNK):
                        values[v] = 0.0
                    if again:
                        for v in T.vectorized(CHUNK):
                            values[v] = grad_phi_parts[origin * CHUNK + row + v]
                    for v in T.unroll(CHUNK):
                        values[v] += grad_phi[
                            ((h * 4 + v // 2) * ROW_TILES + r // 2) * 4 + v % 2 * 2 + r % 2
                        ]
                    for v in T.vectorized(CHUNK):
                        grad_phi_parts[origin * CHUNK + row + v] = values[v]
        for v in T.unroll(2 * 4 * ROW_TILES * 4):
            grad_phi[v] = 0.0

    return load_phi, form, add_phi
