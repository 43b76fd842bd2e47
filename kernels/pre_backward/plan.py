"""What the warps of the persistent backward of `pre` know: constants, buffers, barriers, addresses.

Tiles in shared memory hold chunks of 8 elements, swizzled with their token's number, so that
neither a row nor the four tokens that a warp reads at once meet in a bank.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import tilelang.language as T

from ..common.pairs import WORD
from ..common.programs import macro

WARP = 32
TILE = 16  # tokens of a tile: K of the products for grad_phi
CHUNK = 8  # elements of 16 bytes
WARP_CHANNELS = 32  # of all streams, of which a grad_x warp forms grad_x
STREAMS = 4  # n: a group holds 24 rows of phi and grad_phi in registers
ROW_TILES = 3  # of 8 rows
RADIAL = 6  # column of a token's weights, before what undoes its scale
ROW_WORDS = 24  # of a token's h_res: streams 0 and 1 (4 each), 4 zeros, streams 2 and 3, 4 zeros
GRAD_PHI_WARPS = STREAMS  # a stream each
PRODUCERS = 4  # producer warps; warp d has tokens 4d .. 4d + 3 of a tile
BF16, F16 = "bfloat16", "float16"

# Named barriers of a CTA.
ITERATION = 1  # an iteration begins
PUBLISHED = 2  # the per-token backward state of a tile is in shared memory
LANDED = 3  # among producer warps: the tile that the previous iteration asked for is here
READ = 4  # among grad_phi warps: grad_raw is in registers, h_res may take its place
MIXING = 5  # grad_phi and grad_x warps: h_res is there; before the loop, among grad_x warps


@dataclass(frozen=True)
class Plan:
    """Constants of one program, the first argument of its macros."""

    C: int
    width: int  # channels of a rank, 64 to 256: whole lines of 128 bytes, to swizzle and to copy
    ranks: int  # CTAs of a group
    groups: int  # CTA groups that share the tokens
    distance: int  # iterations from the dot products of a tile to its grad_x
    mailbox_stages: int  # a power of two
    merge_grad: str  # what merge adds to grad_x: "", ADDED or MIXED of `grad_x_pass`
    first_threads: tuple[int, int, int]  # of grad_phi and producer warps, one past the last
    registers: tuple[int, int, int]  # of grad_x, grad_phi and producer warps after setmaxnreg
    initial_registers: int
    tokens: Any  # the dynamic number of them

    @property
    def num_stages(self) -> int:
        """Tiles of x and grad_layer_input in the ring."""
        return self.distance + 2

    @property
    def grad_x_threads(self) -> int:
        """Threads of the warps that form grad_x."""
        return self.width // WARP_CHANNELS * WARP

    @property
    def whole(self) -> bool:
        """Whether every rank has all of its channels."""
        return self.C % self.width == 0

    @property
    def token_size(self) -> int:
        """Elements of a token in the ring: x, and grad_layer_input as its last stream."""
        return (STREAMS + 1) * self.width

    def chunks(self, rank: Any) -> Any:
        """Chunks of a stream from the rank's first to the last."""
        return (self.C - rank * self.width) // CHUNK

    def first_token(self, cta: "Cta", tile: Any) -> Any:
        """Of a tile of the group, none below zero.

        Products that may wrap as far as the compiler knows: else it takes the sum apart, keeps the
        parts during the whole loop, and spills.
        """
        number = T.cast(tile, WORD) * T.uint32(self.groups) + T.cast(cta.group, WORD)
        return T.cast(number, "int64") * TILE


class Cta(NamedTuple):
    """Where a CTA is, how many tiles its group has, and its iterations, at least 1."""

    group: Any
    rank: Any
    tiles: Any
    iterations: Any


class Shared(NamedTuple):
    """The buffers in shared memory."""

    tiles: Any  # the ring of x and grad_layer_input
    staged: Any  # merge's part of grad_x, then grad_x, of two tiles
    high_low: Any  # grad_raw as a pair of bf16, then h_res
    scaled: Any  # grad_raw in fp16
    weights: Any  # of a token: h_pre, the zero of `opaque`, an unused float, radial, the unscale


def swizzled(chunk: Any, token: Any, stream: Any) -> Any:
    """First element of a chunk of a token and stream, the fifth being grad_layer_input."""
    return (chunk ^ (token % 4 * 2 + (token // 4 + stream) % 2)) * CHUNK


def opaque(weights: Any, thread: Any) -> Any:
    """A thread's number, added to a zero in shared memory.

    The compiler cannot know it. Else it keeps what follows from it, two dozen registers of a grad_x
    thread, during the whole loop, and spills.
    """
    return thread + T.reinterpret(weights[0, STREAMS], "int32")


@macro
def load_matrices(fragment, begin, tiles, at, transposed):
    """Four matrices of 8 x 8 by `ldmatrix`, of the rows that the lanes name."""
    T.ptx_ldmatrix(
        T.bool(transposed), 4,
        T.access_ptr(tiles[at], "r", CHUNK),
        T.access_ptr(fragment[begin], "w", 8),
    )  # fmt: skip
