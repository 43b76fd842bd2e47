"""`pre` in one launch: mapping, Sinkhorn and pre-apply, x read once. Equations as in pre.py.

HBM sees n * C elements read and C written a token, and phi once a team. How x stays on chip between
the projection, which needs the whole token, and pre-apply, which needs the projection's result:

* The blocks of the GPU form teams. A member of a team owns a segment of the channels (all n streams
  of it) and keeps phi's columns for that segment in REGISTERS, so phi costs no bandwidth after the
  first microseconds.
* Groups of 16 tokens flow through a ring of shared-memory tiles, `ahead` groups in flight from HBM.
  The main warps project a group and send the member's partial sums to the others through L2; `lag`
  groups later the receiver warps have added them in the order of the members, and the main warps
  form layer_input from the tile, still in shared memory. One barrier a round keeps roles in step.
* A message is one word: a float whose last bit is a flag that flips whenever its slot is reused. It
  validates itself, so there is no fence, no separate flag and one trip through L2 instead of three;
  the reader asks a round ahead.
* Every token's maps are written by one member, whose owner warp reads all of the token's parts.
  Sinkhorn runs at the end, one thread a token.

Members wait for each other, so the launch is cooperative (`T.sync_grid` makes it so): all blocks
are resident or the launch fails. No atomics on data: a token's sums are formed over segments that
depend on C alone, in a fixed order.

Unchecked: slot reuse follows from the rounds (slots >= 2 * lag - 1) and from relaxed 4-byte
accesses alone; no race checker has seen it. `pre.default_config` does not choose this form before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ._programs import F32, architecture, ceil_div, dtype_name, logits_per_token, program
from ._programs import multiprocessors as count_multiprocessors
from ._projection import WARP, WARP_ROLE_CONFIGS, Segment, segment_width, shared_limit
from ._team_roles import (
    apply_macro,
    maps_macro,
    owner_macros,
    receive_macro,
    send_macros,
    word_columns,
)


@dataclass(frozen=True)
class Config:
    """Launch knobs of the team kernel.

    Args:
        members: blocks of a team; each owns ceil(C / members) channels of every stream.
        teams: teams that share the tokens; members * teams blocks must be resident together.
        steps: pieces of 32 elements of nC that a main warp holds.
        group: tokens that travel together.
        ahead: groups in flight from memory.
        lag: groups between project and apply.
        batches: 8-token pieces of a group whose instructions interleave (2 measured 4% slower on
            the H200, 2026-11-22: registers).
        helpers_send: the receiver and owner warps publish the partial sums, not the main warps.
    """

    members: int
    teams: int
    steps: int = 4
    group: int = 16
    ahead: int = 2
    lag: int = 3
    batches: int = 1
    helpers_send: bool = False

    def __post_init__(self) -> None:
        """Reject what cannot launch on any GPU."""
        smallest = min(self.ahead, self.members, self.teams, self.steps, self.group, self.batches)
        if smallest < 1 or self.lag < 2 or self.group % (8 * max(self.batches, 1)):
            raise ValueError(f"pre: config must be one that can launch, got {self}")

    @property
    def depth(self) -> int:
        """Tiles of the ring: in flight, projected but not applied, being applied."""
        return self.ahead + self.lag + 1

    @property
    def slots(self) -> int:
        """Slots of the exchange, a power of two.

        A member may run 2 * lag - 1 groups ahead of another one's reads.
        """
        return 1 << (2 * self.lag - 2).bit_length()

    def segment(self, n: int, channels: int) -> Segment:
        """The share of a member."""
        width, rows = segment_width(channels, self.members), logits_per_token(n)
        return Segment(n, channels, rows, width, self.steps, self.group, self.batches)

    def receivers(self, n: int) -> int:
        """Warps that add the parts that pre-apply waits for, one lane a token and quantity."""
        return ceil_div(self.group, WARP // (n + 1))

    def threads(self, n: int, channels: int) -> int:
        """Threads of a block: main warps, receivers, the owner warp."""
        return self.segment(n, channels).threads + WARP * (self.receivers(n) + 1)

    def exchange_shape(self, n: int) -> tuple[int, int, int, int, int]:
        """Words [team, slot, member, token, column] that pass between members."""
        return self.teams, self.slots, self.members, self.group, word_columns(n)

    def launches(self, n: int, channels: int, arch: str) -> bool:
        """Whether shared memory, registers and threads allow the kernel."""
        segment = self.segment(n, channels)
        threads = self.threads(n, channels)
        registers = segment.fragment_registers + self.batches * 4 * (segment.phi_tiles + 1) + 48
        fits = segment.shared_bytes(self.depth) <= shared_limit(arch)
        return fits and threads <= 1024 and threads * registers <= 65536 and segment.warps >= n


def candidates(n: int, channels: int, *, arch: str, multiprocessors: int) -> Iterator[Config]:
    """Every configuration worth timing; impossible ones never leave."""
    for members in sorted({ceil_div(channels, width) for width in (192, 224, 256, 320, 512)}):
        if members <= multiprocessors:
            for ahead, lag in ((2, 3), (1, 4), (1, 3), (1, 2)):
                for helpers_send in (False, True):
                    teams = multiprocessors // members
                    config = Config(members, teams, ahead=ahead, lag=lag, helpers_send=helpers_send)
                    if config.launches(n, channels, arch):
                        yield config


@program(WARP_ROLE_CONFIGS)
def team_program(
    n: int,
    channels: int,
    dtype: str,
    config: Config,
    norm_eps: float,
    pre_eps: float,
    post_scale: float,
    iters: int,
    sinkhorn_eps: float,
) -> Any:
    """Everything of `pre`, by teams of blocks."""
    C, G = channels, config.group
    members, teams, helpers_send = config.members, config.teams, config.helpers_send
    ahead, lag, depth, slots = config.ahead, config.lag, config.depth, config.slots
    segment = config.segment(n, C)
    rows, warps, main_threads = segment.rows, segment.warps, segment.threads
    threads, receivers = config.threads(n, C), config.receivers(n)
    lanes, owned_tokens = ceil_div(segment.columns, WARP), ceil_div(G, members)
    exchange_shape = config.exchange_shape(n)
    tokens = T.dynamic("tokens")
    load_phi, fetch = segment.load_macro(dtype), segment.fetch_macro(tokens)
    project = segment.project_macro(dtype)
    clear, send = send_macros(segment, slots, threads)
    receive = receive_macro(segment, members, lag, slots, norm_eps, pre_eps)
    request, own = owner_macros(segment, members, slots, tokens)
    pre_apply = apply_macro(segment, depth, dtype, tokens)
    maps = maps_macro(segment, norm_eps, post_scale, iters, sinkhorn_eps)

    @T.prim_func
    def mhc_pre_team(
        x: T.Tensor((tokens, n, C), dtype),
        phi: T.Tensor((rows, n, C), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((rows,), F32),
        exchange: T.Tensor(exchange_shape, "int32"),
        layer_input: T.Tensor((tokens, C), dtype),
        h_post: T.Tensor((tokens, n), F32),
        h_res: T.Tensor((tokens, n * n), F32),
        projection: T.Tensor((tokens, rows), F32),
        inv_rms: T.Tensor((tokens,), F32),
    ):
        with T.Kernel(members, teams, threads=threads) as (member, team):
            tx = T.get_thread_binding()
            warp = tx // WARP
            helper = warp - warps
            lane = tx % WARP
            x_tile = T.alloc_shared((depth, G, segment.row), dtype)
            # sums[group % 2, i, token, columns], a column that padding leaves free, holds h_pre[i]
            sums = T.alloc_shared((2, warps, G, segment.sums_row), F32)
            fragments = T.alloc_local((segment.fragment_registers * 2,), dtype)
            words = T.alloc_local((lanes, owned_tokens, members), "int32")
            # variables, not expressions: the simplifier would expand them into every use
            rounds = T.alloc_var("int32", (T.ceildiv(tokens, G) + teams - 1 - team) // teams)
            owned = T.alloc_var("int32", member)
            # what a receiver lane multiplies and adds: constants of its column
            gate = T.alloc_var(F32, alpha[0])
            offset = T.alloc_var(F32, bias[T.max(lane % (n + 1) - 1, 0)])

            clear(exchange, team, member, tx)
            for q in T.unroll(lanes):
                for s in T.unroll(owned_tokens):
                    for m in T.unroll(members):
                        words[q, s, m] = 0
            if tx < main_threads:
                for j in T.serial(ahead):
                    fetch(x_tile, j, x, T.cast(j * teams + team, "int64") * G, member, tx)
                    T.ptx_commit_group()
                load_phi(fragments, phi, member, tx)
            T.sync_grid()

            for j in T.serial(rounds + lag):
                if tx < main_threads:
                    T.ptx_wait_group(ahead - 1)
                T.sync_threads()

                if tx < main_threads:
                    if not helpers_send:
                        send(sums, exchange, team, member, j, rounds, warp, warps, lane)
                    # fetch group j + ahead into the tile that the previous round applied
                    if j + ahead < rounds:
                        first = T.cast((j + ahead) * teams + team, "int64") * G
                        fetch(x_tile, (j + ahead) % depth, x, first, member, tx)
                    T.ptx_commit_group()
                    # half of the warps projects while the other half applies, then they change
                    # places (nested ifs would not do: TVM's HoistIfThenElse loses one of them)
                    for turn in T.serial(2):
                        if ((turn + warp // 4) % 2 == 0) and (j < rounds):
                            project(sums, j % 2, fragments, x_tile, j % depth, tx)
                        if ((turn + warp // 4) % 2 == 1) and (j >= lag):
                            done = T.cast((j - lag) * teams + team, "int64") * G
                            pre_apply(layer_input, x_tile, sums, j - lag, done, member, tx)
                elif warp < warps + receivers:
                    if helpers_send:
                        send(sums, exchange, team, member, j, rounds, helper, receivers + 1, lane)
                    receive(words, sums, exchange, team, j, rounds, gate, offset, helper, lane)
                else:
                    if helpers_send:
                        send(sums, exchange, team, member, j, rounds, helper, receivers + 1, lane)
                    if j >= lag:
                        done = T.cast((j - lag) * teams + team, "int64") * G
                        own(words, projection, inv_rms, exchange, team, j - lag, done, owned, lane)
                        owned = owned - G % members
                        if owned < 0:
                            owned = owned + members
                    if j >= lag - 1:
                        request(words, exchange, team, j + 1 - lag, owned, lane)

            # the maps of the tokens that this member owns, one thread a token
            T.sync_threads()
            owned_total = (rounds * G + members - 1 - member) // members
            for p in T.serial(T.ceildiv(owned_total, threads)):
                entry = member + (p * threads + tx) * members
                token = T.cast(entry // G * teams + team, "int64") * G + entry % G
                if (entry < rounds * G) and (token < tokens):
                    maps(token, alpha, bias, h_post, h_res, projection, inv_rms)

    return mhc_pre_team


def launch(
    config: Config,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    outputs: tuple[Tensor, ...],
    constants: tuple[float, float, float, int, float],
) -> None:
    """Launch the team kernel on at least one token; x and phi 16-byte aligned.

    Args:
        config: of the launch.
        x: [T, n, C], bf16 or fp16.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        outputs: layer_input [T, C], h_post [T, n], h_res [T, n*n], projection [T, n*n + 2n],
            inv_rms [T]; written.
        constants: norm_eps, pre_eps, post_scale, iters, sinkhorn_eps.
    """
    _, n, channels = x.shape
    arch, available = architecture(x.device), count_multiprocessors(x.device)
    if config.members * config.teams > available or not config.launches(n, channels, arch):
        raise ValueError(
            f"pre: config must launch for n {n}, C {channels} on the {available} multiprocessors "
            f"of this {arch} GPU, got {config}"
        )
    exchange = torch.empty(config.exchange_shape(n), dtype=torch.int32, device=x.device)
    kernel = team_program(arch, n, channels, dtype_name(x), config, *constants)
    phi = phi.view(logits_per_token(n), n, channels)
    kernel(x, phi, alpha, bias, exchange, *outputs)
