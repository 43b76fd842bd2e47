"""What the warps of `boundary` that merge do in a round, as macros: a token a warp at a time.

A lane has the same 16 bytes of every stream of its tokens from fetching until x_next is written, so
nothing but the maps passes between lanes.
"""

from collections.abc import Callable

import tilelang.language as T

from ..common.pairs import WORD, lower, upper
from ..common.programs import F32, ceil_div
from ..common.projection import WARP, Segment

STREAMS = 4  # 16 bytes of h_post, a row of h_res
CHUNK = 8  # channels of 16 bytes
MAPS = STREAMS * STREAMS + STREAMS  # floats of a token: h_res, then h_post


def stream_macros(
    segment: Segment, tokens: object, warps: int, dtype: str
) -> tuple[Callable[..., None], ...]:
    """The macros `clear_pad`, `fetch`, `fetch_output`, `take_output` and `merge`."""
    n, C, G, width = segment.n, segment.channels, segment.group, segment.width
    pad = segment.chunks * CHUNK - n * width  # of a row of x_tile
    pieces = max(pad // CHUNK, 1)

    @T.macro
    def clear_pad(x_tile, depth, tx):
        """Zeros behind the last stream, where phi is zero, too."""
        for p in T.unroll(ceil_div(depth * G * pad, warps * WARP * CHUNK)):
            entry = p * warps * WARP + tx
            row, inner = entry // pieces, n * width + entry % pieces * CHUNK
            if row < depth * G:
                for v in T.vectorized(CHUNK):
                    x_tile[row // G, row % G, inner + v] = T.cast(0.0, dtype)

    @T.macro
    def fetch(x_tile, maps, slot, maps_slot, x, h_res, h_post, first, member, tx):
        """X and the maps of a group on their way into their tiles, zeros beyond them."""
        lane = tx % WARP
        inner = lane * CHUNK
        channel = member * width + inner
        for row in T.unroll(G // warps):
            place = row * warps + tx // WARP
            token = first + place
            if inner < width:
                for i in T.unroll(n):
                    T.ptx_cp_async(
                        T.access_ptr(x_tile[slot, place, i * width + inner], "w", CHUNK),
                        T.access_ptr(x[token, i, channel], "r", CHUNK),
                        CHUNK,
                        predicate=(channel < C) and (token < tokens),
                    )
            if lane < n:
                T.ptx_cp_async(
                    T.access_ptr(maps[maps_slot, place, lane * 4], "w", 4),
                    T.access_ptr(h_res[token, lane * 4], "r", 4),
                    4,
                    predicate=token < tokens,
                )
            elif lane == n:
                T.ptx_cp_async(
                    T.access_ptr(maps[maps_slot, place, n * n], "w", 4),
                    T.access_ptr(h_post[token, 0], "r", 4),
                    4,
                    predicate=token < tokens,
                )

    @T.macro
    def fetch_output(output_tile, slot, layer_output, first, member, tx):
        """layer_output of a group on its way into its tile, zeros beyond it."""
        inner = tx % WARP * CHUNK
        channel = member * width + inner
        for row in T.unroll(G // warps):
            place = row * warps + tx // WARP
            if inner < width:
                T.ptx_cp_async(
                    T.access_ptr(output_tile[slot, place, inner], "w", CHUNK),
                    T.access_ptr(layer_output[first + place, channel], "r", CHUNK),
                    CHUNK,
                    predicate=(channel < C) and (first + place < tokens),
                )

    @T.macro
    def take_output(outputs, output_tile, slot, tx):
        """A lane's layer_output of a group."""
        inner = tx % WARP * CHUNK
        for row in T.unroll(G // warps):
            if inner < width:
                for v in T.vectorized(CHUNK):
                    outputs[row, v] = output_tile[slot, row * warps + tx // WARP, inner + v]

    @T.macro
    def merge(x_tile, outputs, maps, slot, maps_slot, x_next, first, member, tx):
        """x_next of a group into its tile, in x's place, and to memory."""
        lane, warp = tx % WARP, tx // WARP
        inner = lane * CHUNK
        channel = member * width + inner
        streams = T.alloc_local((n, CHUNK), dtype)
        words = T.view(streams, (n, CHUNK // 2), WORD)
        output_words = T.view(outputs, (G // warps, CHUNK // 2), WORD)
        weights = T.alloc_local((MAPS,), F32)
        merged = T.alloc_local((n, 2), F32)
        values = T.alloc_local((2,), F32)
        for row in T.unroll(G // warps):
            place = row * warps + warp
            token = first + place
            if inner < width:
                for i in T.unroll(n):
                    for v in T.vectorized(CHUNK):
                        streams[i, v] = x_tile[slot, place, i * width + inner + v]
                for k in T.unroll(MAPS // 4):
                    for v in T.vectorized(4):
                        weights[k * 4 + v] = maps[maps_slot, place, k * 4 + v]
                # x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]
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
                        x_tile[slot, place, o * width + inner + v] = streams[o, v]
                if (channel < C) and (token < tokens):
                    for o in T.unroll(n):
                        for v in T.vectorized(CHUNK):
                            x_next[token, o, channel + v] = streams[o, v]

    return clear_pad, fetch, fetch_output, take_output, merge
