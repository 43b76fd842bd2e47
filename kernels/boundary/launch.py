"""Merge and the next sublayer's `pre` in one persistent launch: x_next is not read again.

    x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]
    layer_input, h_post_next, h_res_next = pre(x_next)                  (as in pre/launch.py)

A token moves (n + 1) * C elements in and (n + 1) * C out. All results have the bits of `merge` and
then `pre`. docs/kernels/boundary.md draws the pipeline.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import tilelang.language as T
import torch
from torch import Tensor

from .. import merge
from ..common.architectures import overlaps
from ..common.constants import Constants
from ..common.problem import Problem
from ..common.programs import (
    F32,
    ITEM_BYTES,
    architecture,
    ceil_div,
    dtype_name,
    logits_per_token,
    multiprocessors,
    program,
)
from ..common.projection import WARP, WARP_ROLE_CONFIGS
from ..pre import launch as pre
from ..pre import persistent, simt
from ..pre.plan import Cta, Reduced
from ..pre.roles import empty_mailboxes, receive_and_reduce_warps
from .roles import CHUNK, MAPS, STREAMS, Inputs, Staged, merge_warps, project_warps

MEASURED = ("sm_90a",)  # on sm_100a two words of a round spill
MOST_RANKS = 28  # measured; more of them spill more
FEW_RANKS = 3  # whose reducers are busy: a tile in flight is enough
MINIMUM_WIDTH = 160  # channels of a rank: a merge warp, a token at a time, has lanes for 256


@dataclass(frozen=True)
class Config(persistent.Config):
    """Launch knobs: those of the persistent `pre`, with other defaults.

    Smaller tiles than `pre` has, and twice as many: what shared memory holds then hides the
    latency of the mailboxes. No bit depends on the tile.
    """

    group: int = 8  # tokens of a tile
    ahead: int = 2
    lag: int = 8
    apply_warps: int = 8
    registers: int = 48  # of a thread of the receiver and reducer warps
    merge_registers: int = 88  # of a thread of the merge warps
    spare: ClassVar[int] = 16  # at C = 7168 seven words spill, at 1280 to 2560 none

    def registers_of_roles(self, n: int, C: int) -> tuple[int, int, int]:
        """Registers of a projection, merge, and receiver or reducer thread after reallocation."""
        project, merging, threads = self.first_threads(n, C)
        left = 65536 // threads // 8 * 8 * threads - self.registers * (threads - merging)
        left -= self.merge_registers * (merging - project)
        return min(240, left // project // 8 * 8), self.merge_registers, self.registers

    def shared_bytes(self, n: int, C: int) -> int:
        """Shared memory of a CTA."""
        rest = self.ahead * self.segment(n, C).width * 2 + (self.ahead + 1) * MAPS * 4
        return super().shared_bytes(n, C) + self.group * rest

    @lru_cache(maxsize=1024)  # noqa: B019 - few configurations, asked for at every launch
    def launches(self, n: int, C: int, arch: str) -> bool:
        """Whether shared memory, registers and threads allow the kernel."""
        whole = self.group % self.apply_warps == 0
        lanes = self.segment(n, C).width <= WARP * CHUNK
        return n == STREAMS and whole and lanes and super().launches(n, C, arch)


@lru_cache(maxsize=1024)
def beside(config: Any, n: int, C: int, arch: str) -> Config | None:
    """The configuration that adds as `pre` does with `config`; None where two launches run."""
    if not isinstance(config, persistent.Config):
        return None
    ranks = config.members
    own = Config(ranks, config.teams, config.steps, ahead=2 if ranks > FEW_RANKS else 1)
    # more ranks leave lanes idle and are slower; one alone waits for its reducers
    full = 1 < ranks == ceil_div(C, WARP * CHUNK) <= MOST_RANKS
    full = full and own.segment(n, C).width >= MINIMUM_WIDTH
    return own if full and arch in MEASURED and own.launches(n, C, arch) else None


@program(WARP_ROLE_CONFIGS)
def boundary_program(
    C: int, dtype: str, config: Config, constants: Constants, reallocate: bool
) -> Any:
    """Merge and `pre`: a CTA is a rank of a group, its warps have roles."""
    n, G = STREAMS, config.group
    plan = config.plan(n, C, dtype, constants, reallocate)
    tokens, segment, prefetch = plan.tokens, plan.segment, plan.prefetch
    merge_first, receive_first, threads = plan.first_threads

    @T.prim_func
    def mhc_boundary(
        x: T.Tensor((tokens, n, C), dtype),
        layer_output: T.Tensor((tokens, C), dtype),
        h_post: T.Tensor((tokens, n), F32),
        h_res: T.Tensor((tokens, n * n), F32),
        phi: T.Tensor((segment.rows, n, C), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((segment.rows,), F32),
        gather_mailbox: T.Tensor(plan.mailbox_shapes[0], "int32"),
        apply_mailbox: T.Tensor(plan.mailbox_shapes[1], "int32"),
        x_next: T.Tensor((tokens, n, C), dtype),
        layer_input: T.Tensor((tokens, C), dtype),
        h_post_next: T.Tensor((tokens, n), F32),
        h_res_next: T.Tensor((tokens, n * n), F32),
        projection: T.Tensor((tokens, segment.rows), F32),
        inv_rms: T.Tensor((tokens,), F32),
    ):
        with T.Kernel(plan.ranks, plan.groups, threads=threads) as (rank, group):
            tx = T.get_thread_binding()
            x_tile = T.alloc_shared((plan.num_stages, G, segment.row), dtype)
            output_tile = T.alloc_shared((prefetch, G, segment.width), dtype)
            maps = T.alloc_shared((prefetch + 1, G, MAPS), F32)
            sums = T.alloc_shared((1, segment.warps, G, segment.sums_row), F32)
            weights = T.alloc_shared((2, G, n), F32)  # h_pre
            # variables, not expressions: the simplifier would expand them into every use
            tiles = T.ceildiv(tokens, G)
            iterations = T.alloc_var("int32", (tiles + plan.groups - 1 - group) // plan.groups)
            last = T.alloc_var("int32", tiles - 1 - group)
            cta = Cta(group, rank, iterations, last)
            empty_mailboxes(plan, cta, gather_mailbox, apply_mailbox, tx)
            if tx == 0:
                sums[0, 0, 0, segment.columns] = 0.0  # see `opaque`
            if tx < merge_first:
                project_warps(plan, cta, phi, x_tile, sums, gather_mailbox, tx)
            elif tx < receive_first:
                inputs = Inputs(x, layer_output, h_post, h_res)
                staged = Staged(x_tile, output_tile, maps, sums, weights)
                merge_warps(plan, cta, inputs, staged, x_next, layer_input, tx - merge_first)
            else:
                reduced = Reduced(
                    gather_mailbox, apply_mailbox, alpha, bias, h_post_next, h_res_next,
                    projection, inv_rms,
                )  # fmt: skip
                receive_and_reduce_warps(plan, cta, weights, reduced, tx)

    return mhc_boundary


def forward(
    x: Tensor,
    layer_output: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    config: "Config | pre.Config | persistent.Config | simt.Config",
    **constants: Any,
) -> tuple[Tensor, ...] | None:
    """Merge of a sublayer and everything before the next layer (eqs. 7, 8, 9 and 14-19).

    Args:
        x: [T, n, C], bf16, fp16 or fp32, as all tensors starting at 16 bytes. Residual streams.
        layer_output: [T, C], dtype of x.
        h_post: [T, n], fp32.
        h_res: [T, n, n], fp32, [out, in].
        phi: [n*n + 2n, n*C], fp32. The next sublayer's, as alpha and bias.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        config: of this launch, or the one that `pre` would have: ranks and groups are then its
            own, and all results have the bits of `merge` and `pre`.
        **constants: as in `pre.forward`.

    Returns:
        x_next [T, n, C] and layer_input [T, C] in x's dtype; h_post_next [T, n], h_res_next
        [T, n, n], projection [T, n*n + 2n], inv_rms [T], fp32. None where `merge` and `pre` are to
        be called: with few tokens, n other than 4, fp32, a C that is no multiple of 8, more
        ranks than ceil(C / 256) or than 28, or a GPU other than those `MEASURED`.

    Raises:
        ValueError: A `Config` of this module does not launch on this GPU.
    """
    tokens, n, C = x.shape
    if not tokens:
        return None
    arch, available = architecture(x.device), multiprocessors(x.device)
    if not isinstance(config, Config):
        config = beside(config, n, C, arch)
        if config is None:
            return None
    persistent.check_launch("boundary", config, n, C, arch, available)
    rows = logits_per_token(n)
    h_post_next, h_res_next, projection = (
        x.new_empty(tokens, columns, dtype=torch.float32) for columns in (n, n * n, rows)
    )
    inv_rms = x.new_empty(tokens, dtype=torch.float32)
    x_next, layer_input = torch.empty_like(x), torch.empty_like(layer_output)
    compiled = Constants.of(**constants)
    kernel = boundary_program(arch, C, dtype_name(x), config, compiled, overlaps(arch))
    kernel(
        x, layer_output, h_post, h_res.view(tokens, n * n),
        phi.view(rows, n, C), alpha, bias,
        *persistent.mailboxes(config, n, x.device),
        x_next, layer_input, h_post_next, h_res_next, projection, inv_rms,
    )  # fmt: skip
    return x_next, layer_input, h_post_next, h_res_next.view(tokens, n, n), projection, inv_rms


def traffic(problem: Problem) -> int:
    """Bytes that must move forward: those of `merge` and `pre`, which reads x_next on chip."""
    streams = problem.tokens * problem.n * problem.channels * ITEM_BYTES[problem.dtype]
    return merge.traffic(problem.of("merge")) + pre.traffic(problem.of("pre")) - streams
