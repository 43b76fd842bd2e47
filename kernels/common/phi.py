"""phi in registers, as the A operand of `projection.py`: pairs high + low of x's dtype.

bf16 has fp32's range and keeps 16 mantissa bits of every element. fp16 keeps 22 bits, but has a
small range: each warp scales its elements of a row by a power of two that brings the largest to
2^14 up to 2^15, and `project` scales the sum back. Beside an element that is not finite the low
part is NaN, and `project` drops it: the element changes the sums of its own row alone.
"""

from collections.abc import Callable

import tilelang.language as T

from .pairs import WORD
from .programs import F32
from .projection import SCALED, STEP, TILE_ROWS, WARP, Segment
from .split import exponent_of, scale_of, unscale_of


def load_macro(
    segment: Segment, dtype: str, first: int = 0, last: int | None = None
) -> Callable[..., None]:
    """The macro `load_phi(fragments, phi, member, tx)`, of some or all of a warp's steps.

    Where phi is to be scaled the registers hold fp32 values: call `scale_phi` after all steps.
    """
    n, C, rows, width, steps = (
        segment.n, segment.C, segment.rows, segment.width, segment.steps
    )  # fmt: skip
    phi_tiles, scaled = segment.phi_tiles, dtype == SCALED
    end = steps if last is None else last

    @T.macro
    def load_values(values, phi, member, tx, step, tile):
        """Eight neighbouring elements of the lane's row, zeros beyond phi."""
        inner = (tx // WARP * steps + step) * STEP + tx % 4 * 8
        stream = inner // width
        channel = member * width + inner % width
        for v in T.vectorized(8):
            values[v] = 0.0
        row = tile * TILE_ROWS + tx % WARP // 4
        if (stream < n) and (channel < C) and (row < rows):
            for v in T.vectorized(8):
                values[v] = phi[row, stream, channel + v]

    @T.macro
    def load_phi(fragments, phi, member, tx):
        """phi[:, :, segment] into registers, high and low parts, in the A operand's order."""
        values = T.alloc_local((8,), F32)
        for step in T.unroll(first, end):
            for tile in T.unroll(phi_tiles):
                load_values(values, phi, member, tx, step, tile)
                for half in T.unroll(2):
                    for pair in T.unroll(2):
                        for e in T.unroll(2):
                            base = ((step * 2 + half) * phi_tiles + tile) * 8 + pair * 4 + e
                            value = values[half * 4 + pair * 2 + e]
                            fragments[base] = T.cast(value, dtype)
                            low = value - T.cast(fragments[base], F32)
                            fragments[base + 2] = T.cast(low, dtype)

    @T.macro
    def load_values_of_phi(fragments, phi, member, tx):
        """The same as fp32, in the registers of the pairs to come."""
        values = T.alloc_local((8,), F32)
        for step in T.unroll(first, end):
            for tile in T.unroll(phi_tiles):
                load_values(values, phi, member, tx, step, tile)
                for v in T.unroll(8):
                    fragments[((step * 2 + v // 4) * phi_tiles + tile) * 4 + v % 4] = values[v]

    return load_values_of_phi if scaled else load_phi


def scale_macro(segment: Segment, dtype: str) -> Callable[..., None]:
    """The macro `scale_phi(fragments, unscales)`: from fp32 values to scaled pairs, for fp16."""
    steps, phi_tiles = segment.steps, segment.phi_tiles

    @T.macro
    def scale_phi(fragments, unscales):
        """A tile of a lane is of one row, and so is that of the other three of its quad."""
        high_word, low_word = T.alloc_local((1,), WORD), T.alloc_local((1,), WORD)
        high, low = T.view(high_word, (2,), SCALED), T.view(low_word, (2,), SCALED)
        values = T.alloc_local((2,), F32)
        largest = T.alloc_var(F32, 0.0)
        exponent = T.alloc_var("int32", 0)
        for tile in T.unroll(phi_tiles):
            largest = 0.0
            for block in T.unroll(steps * 2):
                for v in T.unroll(4):
                    largest = T.max(largest, T.abs(fragments[(block * phi_tiles + tile) * 4 + v]))
            largest = T.max(largest, T.shfl_xor(largest, 1))
            largest = T.max(largest, T.shfl_xor(largest, 2))
            exponent = exponent_of(largest)
            unscales[tile] = unscale_of(exponent)
            for block in T.unroll(steps * 2):
                for pair in T.unroll(2):
                    place = (block * phi_tiles + tile) * 4 + pair * 2
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

    @T.macro
    def keep(fragments, unscales):
        """Nothing is scaled."""

    return scale_phi if dtype == SCALED else keep
