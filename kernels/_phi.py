"""phi in registers, as the A operand of `_projection`: pairs high + low of x's dtype.

bf16 has fp32's range and keeps 16 mantissa bits of every element. fp16 keeps 22 bits, but has a
small range: each warp scales its elements of a row by a power of two that brings the largest to
2^14 up to 2^15, and `project` scales the sum back. So 22 bits count from the row's largest element,
whatever its size. An element that is not finite reaches its own row's sums only, as in the
reference.
"""

from collections.abc import Callable

import tilelang.language as T

from ._programs import F32
from ._projection import SCALED, STEP, TILE_ROWS, WARP, Segment
from ._split import exponent_of, rest, scale_of, unscale_of


def load_macro(
    segment: Segment, dtype: str, first: int = 0, last: int | None = None
) -> Callable[..., None]:
    """The macro `load_phi(fragments, unscales, phi, member, tx)`, of some or all of a warp's steps.

    Where phi is scaled, which takes all steps, the macro without `last` loads them all.
    """
    n, C, rows, width, steps = (
        segment.n, segment.channels, segment.rows, segment.width, segment.steps
    )  # fmt: skip
    phi_tiles, scaled = segment.phi_tiles, dtype == SCALED
    end = steps if last is None else last
    scale_rows = scale_macro(segment)

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
    def load_phi(fragments, unscales, phi, member, tx):
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
                            fragments[base + 2] = T.cast(rest(value, fragments[base]), dtype)

    @T.macro
    def load_scaled_phi(fragments, unscales, phi, member, tx):
        """The same in fp16, by way of all values in registers."""
        if last is None:
            values = T.alloc_local((8,), F32)
            wide = T.alloc_local((steps * phi_tiles * 8,), F32)
            for step in T.unroll(steps):
                for tile in T.unroll(phi_tiles):
                    load_values(values, phi, member, tx, step, tile)
                    for v in T.unroll(8):
                        wide[((step * 2 + v // 4) * phi_tiles + tile) * 4 + v % 4] = values[v]
            scale_rows(fragments, unscales, wide)

    return load_scaled_phi if scaled else load_phi


def scale_macro(segment: Segment) -> Callable[..., None]:
    """The macro `scale_rows(fragments, unscales, wide)`: from fp32 values to scaled pairs."""
    steps, phi_tiles = segment.steps, segment.phi_tiles

    @T.macro
    def scale_rows(fragments, unscales, wide):
        """A tile of a lane is of one row, and so is that of the other three of its quad."""
        pair_values = T.alloc_local((2,), F32)
        largest = T.alloc_var(F32, 0.0)
        exponent = T.alloc_var("int32", 0)
        for tile in T.unroll(phi_tiles):
            largest = 0.0
            for block in T.unroll(steps * 2):
                for v in T.unroll(4):
                    largest = T.max(largest, T.abs(wide[(block * phi_tiles + tile) * 4 + v]))
            largest = T.max(largest, T.shfl_xor(largest, 1))
            largest = T.max(largest, T.shfl_xor(largest, 2))
            exponent = exponent_of(largest)
            unscales[tile] = unscale_of(exponent)
            for block in T.unroll(steps * 2):
                for pair in T.unroll(2):
                    base = (block * phi_tiles + tile) * 8 + pair * 4
                    for e in T.unroll(2):
                        pair_values[e] = wide[base // 2 + e] * scale_of(exponent)
                        fragments[base + e] = T.cast(pair_values[e], SCALED)
                        fragments[base + 2 + e] = T.cast(
                            rest(pair_values[e], fragments[base + e]), SCALED
                        )

    return scale_rows
