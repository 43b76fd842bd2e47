"""Merge and the next sublayer's `pre` in one launch: x_next is written and not read again.

    x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]
    layer_input, h_post_next, h_res_next = pre(x_next)                        (as in pre.py)

It is the kernel of `pre_team` with another way into its ring. The warps that fetch, eight here, ask
for x, layer_output and the maps of a group a round ahead, merge the group where it lies and write
x_next to memory; a round later the warps that project read it from there. Everything behind that
is `pre_team`'s own and merge adds in the order of `merge`, so all results have the bits of the two
launches. A token moves 5C in and 5C out (n = 4) where merge and `pre` move 14C.

Projecting follows merging a round later, not within the round, where each would wait for the other.
The ring has the depth of `pre_team`'s, with layer_output beside it for one round and the maps for
two: a lane takes its layer_output into registers as a round begins and asks for the next. Sums
leave a round later than in `pre_team`, after h_pre of a later group has come, so the slots that
keep messages apart suffice.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import tilelang.language as T
import torch
from torch import Tensor

from .. import merge
from ..common.architectures import overlaps
from ..common.phi import load_macro, scale_macro
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
from ..pre import persistent as pre_team
from ..pre import simt as pre_any
from ..pre.roles import apply_macro, help_macro, send_macros
from .roles import CHUNK, MAPS, STREAMS, stream_macros

MEASURED = ("sm_90a",)  # on sm_100a two words of a round spill
MOST_MEMBERS = 28  # measured; more of them spill more


@dataclass(frozen=True)
class Config(pre_team.Config):
    """Launch knobs: those of `pre_team`, with other defaults.

    Args:
        merge_registers: of a thread that merges; `registers` are those of the warps that own.
    """

    apply_warps: int = 8
    registers: int = 48
    merge_registers: int = 88
    spare: ClassVar[int] = 16  # at C = 7168 seven words spill, at 1280 to 2560 none

    def project_registers(self, n: int, channels: int) -> int:
        """Registers of a projecting thread once the other roles have given theirs up."""
        project, merging, threads = self.roles(n, channels)
        left = 65536 // threads // 8 * 8 * threads - self.registers * (threads - merging)
        return min(240, (left - self.merge_registers * (merging - project)) // project // 8 * 8)

    def shared_bytes(self, n: int, channels: int) -> int:
        """Shared memory of a block."""
        rest = self.ahead * self.segment(n, channels).width * 2 + (self.ahead + 1) * MAPS * 4
        return super().shared_bytes(n, channels) + self.group * rest

    def launches(self, n: int, channels: int, arch: str) -> bool:
        """Whether shared memory, registers and threads allow the kernel."""
        whole = self.group % self.apply_warps == 0
        lanes = self.segment(n, channels).width <= WARP * CHUNK
        return n == STREAMS and whole and lanes and super().launches(n, channels, arch)


@lru_cache(maxsize=1024)
def beside(config: Any, n: int, channels: int, arch: str) -> Config | None:
    """The configuration that adds as `pre` does with one of its own; None where two launches run.

    H200, 2026-11-28, us, `merge` and `pre` / one launch: 8192 x 1280 89 / 78, 8192 x 2560
    163 / 140, 8192 x 4096 256 / 216, 4096 x 7168 250 / 217, 512 x 2560 20.5 / 17.4. More
    members than ceil(C / 256) leave lanes idle and are slower: 32 at 4096 x 7168 236 / 267.

    Args:
        config: of `pre`; its form by teams, which is for many tokens, has a counterpart.
        n: streams.
        channels: C.
        arch: such as "sm_90a".
    """
    if not isinstance(config, pre_team.Config):
        return None
    own = Config(config.members, config.teams, config.steps, config.group)
    full = own.members == ceil_div(channels, WARP * CHUNK) <= MOST_MEMBERS
    return own if full and arch in MEASURED and own.launches(n, channels, arch) else None


def unknown(sums: Any, value: Any) -> Any:
    """An integer plus a zero from shared memory: what follows from it is not kept in registers.

    Not for addresses of stores: nvcc then splits 16-byte ones, in the whole function.
    """
    return value + T.reinterpret(sums[0, 0, 0, logits_per_token(STREAMS) + 1], "int32")


@program(WARP_ROLE_CONFIGS)
def boundary_program(
    channels: int,
    dtype: str,
    config: Config,
    norm_eps: float,
    pre_eps: float,
    post_scale: float,
    iters: int,
    sinkhorn_eps: float,
    handover: bool,
) -> Any:
    """Merge and `pre`, by teams of blocks."""
    n, C, G = STREAMS, channels, config.group
    members, teams = config.members, config.teams
    ahead, lag, depth, slots = config.ahead, config.lag, config.depth, config.slots
    segment = config.segment(n, C)
    rows, warps, main_threads = segment.rows, segment.warps, segment.threads
    apply_first, receive_first, threads = config.roles(n, C)
    owners, apply_warps = config.owners, config.apply_warps
    meeting = receive_first + WARP  # threads that meet every round: all but the owners
    project_registers = config.project_registers(n, C)
    exchange_shape = config.exchange_shape(n)
    tokens = T.dynamic("tokens")
    half = (config.steps + 1) // 2
    load_first, load_rest = load_macro(segment, dtype, 0, half), load_macro(segment, dtype, half)
    scale_phi, project = scale_macro(segment, dtype), segment.project_macro(dtype)
    clear_pad, fetch, fetch_output, take_output, merge = stream_macros(
        segment, tokens, apply_warps, dtype
    )
    clear, send = send_macros(segment, slots, threads)
    pre_apply = apply_macro(segment, depth, dtype, tokens, WARP * apply_warps)
    constants = norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    help = help_macro(segment, members, teams, owners, slots, lag, meeting, tokens, constants)

    @T.prim_func
    def mhc_boundary(
        x: T.Tensor((tokens, n, C), dtype),
        layer_output: T.Tensor((tokens, C), dtype),
        h_post: T.Tensor((tokens, n), F32),
        h_res: T.Tensor((tokens, n * n), F32),
        phi: T.Tensor((rows, n, C), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((rows,), F32),
        exchange: T.Tensor(exchange_shape, "int32"),
        answers: T.Tensor((teams, slots, G, n), "int32"),
        x_next: T.Tensor((tokens, n, C), dtype),
        layer_input: T.Tensor((tokens, C), dtype),
        h_post_next: T.Tensor((tokens, n), F32),
        h_res_next: T.Tensor((tokens, n * n), F32),
        projection: T.Tensor((tokens, rows), F32),
        inv_rms: T.Tensor((tokens,), F32),
    ):
        with T.Kernel(members, teams, threads=threads) as (member, team):
            tx = T.get_thread_binding()
            lane = tx % WARP
            x_tile = T.alloc_shared((depth, G, segment.row), dtype)
            output_tile = T.alloc_shared((ahead, G, segment.width), dtype)
            maps = T.alloc_shared((ahead + 1, G, MAPS), F32)
            sums = T.alloc_shared((1, warps, G, segment.sums_row), F32)
            weights = T.alloc_shared((2, G, n), F32)  # h_pre
            # a variable, not an expression: the simplifier would expand it into every use
            rounds = T.alloc_var("int32", (T.ceildiv(tokens, G) + teams - 1 - team) // teams)
            # round j has group last - j * teams: what the launch ahead wrote last is in L2
            last = T.alloc_var("int32", T.ceildiv(tokens, G) - 1 - team)

            clear(exchange, answers, team, member, tx)
            if tx == 0:
                sums[0, 0, 0, segment.columns] = 0.0  # see `unknown`
            if tx < apply_first:
                if handover:
                    T.set_max_nreg(project_registers, 1)
                fragments = T.alloc_local(*segment.fragments(dtype))
                unscales = T.alloc_local((segment.phi_tiles,), F32)
                thread = T.alloc_var("int32", tx)
                # one half after the other; the compiler, to whom the second condition is not that
                # of the first, would load both at once, for which there are no registers
                if (tx < main_threads) and (rounds > 0):
                    load_first(fragments, phi, member, tx)
                if (tx < main_threads) and (last >= 0):
                    load_rest(fragments, phi, member, tx)
                if (tx < main_threads) and (rounds + last > 0):  # the same again
                    scale_phi(fragments, unscales)
                T.sync_grid()
                for j in T.serial(rounds + lag):
                    T.sync_threads(2, meeting)
                    if (j > 0) and (j <= rounds) and (tx < main_threads):
                        thread = unknown(sums, tx)
                        project(sums, 0, fragments, unscales, x_tile, (j - 1) % depth, thread)
                        T.sync_threads(1, main_threads)
                        thread = unknown(sums, tx)
                        send(
                            sums, exchange, team, member, j - 1, thread // WARP, warps,
                            thread % WARP,
                        )  # fmt: skip
            elif tx < receive_first:
                if handover:
                    T.set_max_nreg(config.merge_registers, 0)
                thread = T.alloc_var("int32", tx - apply_first)
                outputs = T.alloc_local((G // apply_warps, CHUNK), dtype)
                clear_pad(x_tile, depth, thread)
                for j in T.serial(ahead):
                    if j < rounds:
                        first = T.cast(last - j * teams, "int64") * G
                        fetch(x_tile, maps, j, j, x, h_res, h_post, first, member, thread)
                        fetch_output(output_tile, j, layer_output, first, member, thread)
                    T.ptx_commit_group()
                    T.ptx_commit_group()
                T.sync_grid()
                for j in T.serial(rounds + lag):
                    T.sync_threads(2, meeting)
                    # group j + ahead: x into the tile that the previous round applied
                    later = T.cast(last - (j + ahead) * teams, "int64") * G
                    if j + ahead < rounds:
                        thread = unknown(sums, tx - apply_first)
                        fetch(
                            x_tile, maps, (j + ahead) % depth, (j + ahead) % (ahead + 1), x, h_res,
                            h_post, later, member, thread,
                        )  # fmt: skip
                    T.ptx_commit_group()
                    if j < rounds:
                        T.ptx_wait_group(2 * ahead - 1)  # group j is here; those behind it are not
                        T.sync_warp()  # which fetched its tokens' maps
                        take_output(outputs, output_tile, j % ahead, tx - apply_first)
                    if j + ahead < rounds:
                        thread = unknown(sums, tx - apply_first)
                        fetch_output(output_tile, j % ahead, layer_output, later, member, thread)
                    T.ptx_commit_group()
                    if j < rounds:
                        this = T.cast(last - j * teams, "int64") * G
                        merge(
                            x_tile, outputs, maps, j % depth, j % (ahead + 1), x_next, this, member,
                            tx - apply_first,
                        )  # fmt: skip
                    if j >= lag:
                        done = T.cast(last - (j - lag) * teams, "int64") * G
                        pre_apply(
                            layer_input, x_tile, weights, j - lag, done, member, tx - apply_first
                        )
            else:
                if handover:
                    T.set_max_nreg(config.registers, 0)
                role = (tx - receive_first) // WARP
                T.sync_grid()
                help(
                    exchange, answers, weights, h_post_next, h_res_next, projection, inv_rms,
                    alpha, bias, team, member, rounds, last, role, lane,
                )  # fmt: skip

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
    norm_eps: float,
    pre_eps: float,
    post_scale: float,
    iters: int,
    sinkhorn_eps: float,
    config: "Config | pre.Config | pre_team.Config | pre_any.Config",
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
        norm_eps: as in `pre.forward`, as are the next four.
        pre_eps: see there.
        post_scale: see there.
        iters: see there.
        sinkhorn_eps: see there.
        config: of this launch, or the one that `pre` would have: members and teams are then its
            own, and all results have the bits of `merge` and `pre`.

    Returns:
        x_next [T, n, C] and layer_input [T, C] in x's dtype; h_post_next [T, n], h_res_next
        [T, n, n], projection [T, n*n + 2n], inv_rms [T], fp32. None where `merge` and `pre` are to
        be called: with few tokens, n other than 4, fp32, a C that is no multiple of 8, more
        members than ceil(C / 256) or than 28, or a GPU other than those `MEASURED`.

    Raises:
        ValueError: A `Config` of this module does not launch on this GPU.
    """
    tokens, n, channels = x.shape
    if not tokens:
        return None
    arch, available = architecture(x.device), multiprocessors(x.device)
    if not isinstance(config, Config):
        config = beside(config, n, channels, arch)
        if config is None:
            return None
    pre_team.check("boundary", config, n, channels, arch, available)
    rows = logits_per_token(n)
    h_post_next, h_res_next, projection = (
        x.new_empty(tokens, columns, dtype=torch.float32) for columns in (n, n * n, rows)
    )
    inv_rms = x.new_empty(tokens, dtype=torch.float32)
    x_next, layer_input = torch.empty_like(x), torch.empty_like(layer_output)
    constants = float(norm_eps), float(pre_eps), float(post_scale), int(iters), float(sinkhorn_eps)
    kernel = boundary_program(arch, channels, dtype_name(x), config, *constants, overlaps(arch))
    kernel(
        x, layer_output, h_post, h_res.view(tokens, n * n),
        phi.view(rows, n, channels), alpha, bias,
        *pre_team.exchange(config, n, x.device),
        x_next, layer_input, h_post_next, h_res_next, projection, inv_rms,
    )  # fmt: skip
    return x_next, layer_input, h_post_next, h_res_next.view(tokens, n, n), projection, inv_rms


def traffic(problem: Problem) -> int:
    """Bytes that must move forward: those of `merge` and `pre`, which reads x_next on chip."""
    streams = problem.tokens * problem.n * problem.channels * ITEM_BYTES[problem.dtype]
    return merge.traffic(problem.of("merge")) + pre.traffic(problem.of("pre")) - streams
