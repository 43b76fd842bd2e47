"""What the warps of the persistent `pre` and of `boundary` know: constants, buffers, barriers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import tilelang.language as T

from ..common.constants import Constants
from ..common.programs import ceil_div, logits_per_token
from ..common.projection import WARP, Segment

# Named barriers of a CTA.
PROJECTED = 1  # among projection warps: the partial sums of a tile are in shared memory
ITERATION = 2  # all warps but the reducers: an iteration begins
LANDED = 3  # projection and apply warps: the tile of this iteration is in shared memory


@dataclass(frozen=True)
class Plan:
    """Constants of one program, the first argument of its macros."""

    n: int
    C: int
    dtype: str
    tokens: Any  # the dynamic number of them
    segment: Segment  # the channels of a rank
    ranks: int  # CTAs of a group
    groups: int  # CTA groups that share the tokens
    prefetch: int  # tiles in flight from memory
    distance: int  # iterations from the projection of a tile to its pre-apply
    num_stages: int  # tiles of the ring in shared memory
    mailbox_stages: int
    apply_warps: int
    reducers: int  # warps of a rank
    # [group, stage, rank, token of the tile, column] and [group, stage, token of the tile, stream]
    mailbox_shapes: tuple[tuple[int, ...], tuple[int, ...]]
    first_threads: tuple[int, int, int]  # of apply warps and receiver warp, one past the last
    # of projection, apply, and other warps after setmaxnreg; None on GPUs without it
    registers: tuple[int, int, int] | None
    constants: Constants

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.segment.group

    @property
    def loop_threads(self) -> int:
        """Threads that meet at every iteration: all but the reducers."""
        return self.first_threads[1] + WARP

    @property
    def apply_threads(self) -> int:
        """Threads of the apply warps."""
        return self.apply_warps * WARP

    @property
    def tile_tokens_of_rank(self) -> int:
        """Tokens of a tile that one rank reduces, at most."""
        return ceil_div(self.tile, self.ranks)


class Cta(NamedTuple):
    """Where a CTA is, and its loop: iteration j has tile last - j * groups of the tokens.

    Tiles go from the last to the first: the launch ahead left the last tokens in L2.
    """

    group: Any
    rank: Any
    iterations: Any
    last: Any

    def first_token(self, plan: Plan, j: Any) -> Any:
        """The first token of the tile of iteration j."""
        return T.cast(self.last - j * plan.groups, "int64") * plan.tile


class Reduced(NamedTuple):
    """The buffers that reducer warps read and write."""

    gather_mailbox: Any
    apply_mailbox: Any
    alpha: Any
    bias: Any
    h_post: Any
    h_res: Any
    projection: Any
    inv_rms: Any


def message_columns(n: int) -> int:
    """Messages of a token and rank: the partial sums, padded to 32 bytes."""
    return ceil_div(logits_per_token(n) + 1, 8) * 8
