"""phi in registers, as the A operand of `projection.py`: pairs high + low of x's dtype.

bf16 has fp32's range and keeps 16 mantissa bits of every element. fp16 keeps 22 bits, but has a
small range: each warp scales its elements of a row by a power of two that brings the largest to
2^14 up to 2^15, and `project` scales the sum back. Beside an element that is not finite the low
part is NaN, and `project` drops it: the element changes the sums of its own row alone.
"""

import tilelang.language as T

from .pairs import WORD
from .programs import F32, macro
from .projection import SCALED, STEP, TILE_ROWS, WARP, Segment
from .split import exponent_of, scale_of, unscale_of


@macro
def load_phi(segment: Segment, dtype, fragments, phi, member, tx, first=0, end=None):
    """phi[:, :, segment] into registers, of the warp's steps from `first` to before `end`.

    High and low parts, in the A operand's order. Where phi is to be scaled fp32 values in the
    registers of the pairs to come: call `scale_phi` after all steps.
    """
    phi_tiles = segment.phi_tiles
    values = T.alloc_local((8,), F32)
    for step in T.unroll(first, segment.steps if end is None else end):
        for tile in T.unroll(phi_tiles):
            load_values(segment, values, phi, member, tx, step, tile)
            if dtype == SCALED:
                for v in T.unroll(8):
                    fragments[((step * 2 + v // 4) * phi_tiles + tile) * 4 + v % 4] = values[v]
            else:
                for half in T.unroll(2):
                    for pair in T.unroll(2):
                        for e in T.unroll(2):
                            base = ((step * 2 + half) * phi_tiles + tile) * 8 + pair * 4 + e
                            value = values[half * 4 + pair * 2 + e]
                            fragments[base] = T.cast(value, dtype)
                            low = value - T.cast(fragments[base], F32)
                            fragments[base + 2] = T.cast(low, dtype)


@macro
def load_values(segment: Segment, values, phi, member, tx, step, tile):
    """Eight neighbouring elements of the lane's row, zeros beyond phi."""
    inner = (tx // WARP * segment.steps + step) * STEP + tx % 4 * 8
    stream = inner // segment.width
    channel = member * segment.width + inner % segment.width
    for v in T.vectorized(8):
        values[v] = 0.0
    row = tile * TILE_ROWS + tx % WARP // 4
    if (stream < segment.n) and (channel < segment.C) and (row < segment.rows):
        for v in T.vectorized(8):
            values[v] = phi[row, stream, channel + v]


@macro
def scale_phi(segment: Segment, dtype, fragments, unscales):
    """From fp32 values to scaled pairs, for fp16; what undoes the scales into `unscales`.

    A tile of a lane is of one row, and so is that of the other three of its quad.
    """
    if dtype == SCALED:
        high_word, low_word = T.alloc_local((1,), WORD), T.alloc_local((1,), WORD)
        high, low = T.view(high_word, (2,), SCALED), T.view(low_word, (2,), SCALED)
        values = T.alloc_local((2,), F32)
        largest = T.alloc_var(F32, 0.0)
        exponent = T.alloc_var("int32", 0)
        for tile in T.unroll(segment.phi_tiles):
            largest = 0.0
            for block in T.unroll(segment.steps * 2):
                for v in T.unroll(4):
                    place = (block * segment.phi_tiles + tile) * 4 + v
                    largest = T.max(largest, T.abs(fragments[place]))
            largest = T.max(largest, T.shfl_xor(largest, 1))
            largest = T.max(largest, T.shfl_xor(largest, 2))
            exponent = exponent_of(largest)
            unscales[tile] = unscale_of(exponent)
            for block in T.unroll(segment.steps * 2):
                for pair in T.unroll(2):
                    place = (block * segment.phi_tiles + tile) * 4 + pair * 2
                    for e in T.unroll(2):
                        values[e] = fragments[place + e] * scale_of(exponent)
                    for e in T.vectorized(2):
                        high[e] = T.cast(values[e], SCALED)
                    for e in T.unroll(2):
                        values[e] = values[e] - T.cast(high[e], F32)
                    for e in T.vectorized(2):
                        low[e] = T.cast(values[e], SCALED)
                    fragments[place] = T.reinterpret(high_word[0], F32)
                    fragments[place + 1] = T.reinterpret(low_word[0], F32)
