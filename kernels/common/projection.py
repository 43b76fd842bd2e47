"""What kernels that map tokens share: projecting a tile of tokens.

The projection keeps phi in registers; tiles of tokens pass through shared memory. In one warp's
`mma.m16n8k16` (lane = 4 * g + t) phi is the A operand and eight tokens are the B operand:

* A holds eight rows of phi twice: rows 0-7 are their high parts, rows 8-15 what rounding left over
  (phi = high + low, see `phi.py`), so a thread adds the two products with one instruction.
* The order of the K axis is free as long as A and B agree. One 16-byte read gives a lane eight
  neighbouring elements of a token; elements 0-3 feed one instruction, 4-7 the next. Neither operand
  needs `ldmatrix` or a shuffle.
"""

from dataclasses import dataclass
from typing import Any

import tilelang.language as T

from .programs import F32, PASS_CONFIGS, ceil_div, macro
from .split import LARGEST

WARP = 32
STEP = 32  # elements of a token that a warp consumes with one 16-byte read a lane: two k16 steps
TILE_ROWS = 8  # rows of phi in one A operand
MMA_NAMES = {"bfloat16": "bf16", "float16": "fp16"}
SCALED = "float16"  # of which phi may leave the range


# Roles per warp: every shared-memory hazard is ordered by hand, nothing is a TileLang pipeline, and
# the programs guard their tails (a guard that TileLang adds to an index would split 16-byte
# accesses). Subnormals are zero, which makes a reciprocal one instruction instead of ten.
WARP_ROLE_CONFIGS = {
    **PASS_CONFIGS,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.device_compile_flags": ["-ftz=true"],
}


def segment_width(C: int, members: int) -> int:
    """Channels of each of `members` segments: a multiple of 8, so that accesses have 16 bytes."""
    return ceil_div(ceil_div(C, members), 8) * 8


@dataclass(frozen=True)
class Segment:
    """One block's share of phi: `width` channels of every stream, `steps` x 32 elements a warp."""

    n: int
    C: int
    rows: int  # of phi
    width: int  # channels of the segment, a multiple of 8
    steps: int  # pieces of 32 elements that each warp holds
    group: int  # tokens of a tile, a multiple of 8

    @property
    def warps(self) -> int:
        """Warps that together hold the segment."""
        return ceil_div(self.n * self.width, STEP * self.steps)

    @property
    def threads(self) -> int:
        """Threads that hold the segment."""
        return WARP * self.warps

    @property
    def chunks(self) -> int:
        """16-byte pieces of a token's row that carry data or zeros."""
        return self.warps * self.steps * STEP // 8

    @property
    def row(self) -> int:
        """Elements of a token in shared memory: odd in 64-byte units, to spread over the banks."""
        units = self.warps * self.steps
        return STEP * (units + 1 - units % 2)

    @property
    def phi_tiles(self) -> int:
        """A operands that hold the rows of phi."""
        return ceil_div(self.rows, TILE_ROWS)

    @property
    def columns(self) -> int:
        """Partial sums of a token: the sum of squares, then the rows of phi."""
        return self.rows + 1

    @property
    def sums_row(self) -> int:
        """Floats of a token in `sums`, at least one of them spare.

        With 4 modulo 8 a warp's accumulators land in 32 different banks.
        """
        return ceil_div(self.columns + 1 - 4, 8) * 8 + 4

    @property
    def fragment_registers(self) -> int:
        """32-bit registers a thread needs for phi."""
        return self.steps * 2 * self.phi_tiles * 4

    def fragments(self, dtype: str) -> tuple[tuple[int], str]:
        """Shape and dtype of a thread's registers for phi; for fp16 they are fp32 words first."""
        if dtype == SCALED:
            return (self.fragment_registers,), F32
        return (2 * self.fragment_registers,), dtype

    def shared_bytes(self, tiles: int, sums: int = 2) -> int:
        """Shared memory of a ring of `tiles` tiles and of the sums of so many groups."""
        return self.group * (tiles * self.row * 2 + sums * self.warps * self.sums_row * 4)


@macro
def fetch(segment: Segment, tile, slot, x, first, member, tx, threads):
    """x[first : first + group, :, segment] on its way into tile[slot], zeros beyond x.

    A thread keeps its place in the row and passes over the tokens of the tile.
    """
    G, width, chunks = segment.group, segment.width, segment.chunks
    rows, tokens = max(1, threads // chunks), x.shape[0]
    for piece in T.unroll(ceil_div(chunks, threads)):
        chunk = tx % chunks + piece * threads
        inner = chunk * 8
        stream = inner // width
        channel = member * width + inner % width
        inside = (stream < segment.n) and (channel < segment.C)
        if (tx < rows * chunks) and (chunk < chunks):
            if inside and (first + G <= tokens):  # no predicates: half the instructions
                for row in T.unroll(ceil_div(G, rows)):
                    place = row * rows + tx // chunks
                    if place < G:
                        T.ptx_cp_async(
                            T.access_ptr(tile[slot, place, inner], "w", 8),
                            T.access_ptr(x[first + place, stream, channel], "r", 8),
                            8,
                        )
            else:
                for row in T.unroll(ceil_div(G, rows)):
                    place = row * rows + tx // chunks
                    if place < G:
                        T.ptx_cp_async(
                            T.access_ptr(tile[slot, place, inner], "w", 8),
                            T.access_ptr(x[first + place, stream, channel], "r", 8),
                            8,
                            predicate=inside and (first + place < tokens),
                        )


@macro
def project_tile(segment: Segment, dtype, sums, buffer, fragments, unscales, tile, slot, tx):
    """sums[buffer, warp] = [sum_k x[k]^2, sum_k phi[r, k] * x[k]] of a tile of tokens.

    k runs over the warp's elements. The sum of squares is the diagonal of x @ x^T: one instruction
    for the tensor cores, sixteen for the ALUs.
    """
    rows, steps, phi_tiles = segment.rows, segment.steps, segment.phi_tiles
    name = MMA_NAMES[dtype]
    tile_size = 4 if dtype == SCALED else 8  # of `fragments`
    accumulators = T.alloc_local((phi_tiles * 4,), F32)
    squares = T.alloc_local((4,), F32)
    square_rows = T.alloc_local((8,), dtype)
    x_lane = T.alloc_local((8,), dtype)
    warp = tx // WARP
    lane_row = tx % WARP // 4
    lane_pair = tx % 4
    for eight in T.serial(segment.group // 8):
        for v in T.unroll(8):
            square_rows[v] = T.cast(0.0, dtype)
        for v in T.unroll(phi_tiles * 4):
            accumulators[v] = 0.0
        for v in T.unroll(4):
            squares[v] = 0.0
        for step in T.unroll(steps):
            for v in T.vectorized(8):
                x_lane[v] = tile[
                    slot, eight * 8 + lane_row, (warp * steps + step) * STEP + lane_pair * 8 + v
                ]
            for half in T.unroll(2):
                for phi_tile in T.unroll(phi_tiles):
                    T.ptx_mma(
                        F32, "m16n8k16", "row", "col", name, name, "fp32", fragments.data,
                        ((step * 2 + half) * phi_tiles + phi_tile) * tile_size,
                        x_lane.data, half * 4, accumulators.data, phi_tile * 4, T.bool(False),
                    )  # fmt: skip
                for e in T.unroll(2):
                    square_rows[e] = x_lane[half * 4 + e]
                    square_rows[4 + e] = x_lane[half * 4 + 2 + e]
                T.ptx_mma(
                    F32, "m16n8k16", "row", "col", name, name, "fp32", square_rows.data, 0,
                    x_lane.data, half * 4, squares.data, 0, T.bool(False),
                )  # fmt: skip
        token = eight * 8
        if lane_row // 2 == lane_pair:
            sums[buffer, warp, token + lane_row, 0] = T.if_then_else(
                lane_row % 2 == 0, squares[0], squares[1]
            )
        for phi_tile in T.unroll(phi_tiles):
            row = phi_tile * TILE_ROWS + lane_row
            if row < rows:
                # the sum of low parts, where it is a number
                for e in T.unroll(2):
                    sums[buffer, warp, token + lane_pair * 2 + e, 1 + row] = (
                        accumulators[phi_tile * 4 + e]
                        + T.min(accumulators[phi_tile * 4 + 2 + e], LARGEST)
                    ) * (unscales[phi_tile] if dtype == SCALED else 1.0)


def add(total: Any, part: Any) -> Any:
    """Total + part of sums of squares, where subnormal numbers count whatever the nvcc options."""
    return T.call_extern(F32, "__fmaf_ieee_rn", total, 1.0, part)


@macro
def inverse_rms(scale: T.Ref, elements, norm_eps):
    """From the sum of squares to `1 / sqrt(sum / elements + norm_eps)`; 0 where the sum is 0.

    A small sum, whose mean could be subnormal, is lifted by 2^64 first, and norm_eps with it: exact
    on the way there and back.
    """
    lift = T.alloc_var(F32, 1.0)
    lift = T.if_then_else(scale < 2.0**-100, 2.0**64, 1.0)
    scale = T.call_extern(F32, "__fmaf_ieee_rn", scale, lift, 0.0)
    eps = T.if_then_else(lift > 1.0, min(norm_eps * 2.0**64, 2.0**127), norm_eps)
    scale = T.if_then_else(scale == 0.0, 0.0, T.rsqrt(scale * (1.0 / elements) + eps))
    scale = T.if_then_else(lift > 1.0, scale * 2.0**32, scale)
