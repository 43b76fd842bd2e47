"""`pre`, backward, in one pass over x: dot products and columns by teams of blocks.

Equations as in pre_backward.py. Per token (3n + 1) C elements are read and n C written (13 C at
n = 4 with merge's share of grad_x), where two passes read another (n + 1) C.

grad_x needs grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c], a sum over the whole token, so x
must stay on chip between the two. As in `pre_team` the blocks of the GPU form teams; a member owns
a segment of the channels, all streams of it, and groups of 16 tokens flow through a ring of
shared-memory tiles:

* Four helper warps fetch x and grad_layer_input, form the member's dot products and send them
  through L2 to every member of the team: 64 words a group, self-validating as in `pre_team`. One
  round later they add the members' words in the order of the members, each member for itself,
  complete the records and leave them in shared memory in the order that the tensor cores want.
* `lag` rounds after the dot products the warps that mix, 32 channels each, form grad_x from the
  tile and from part. phi stays in registers.
* Beside them four warps, a stream each, add to their share of grad_phi, in registers for the whole
  walk, which is why they take over registers from all others, and fetch part a round ahead.

All blocks must be resident, so the launch is cooperative. No atomics on data: a token's sums are
formed over segments that depend on C alone, in a fixed order; a word that travels loses its last
mantissa bit. The teams' parts of grad_phi are added by the next launch.

Why no message is lost or mistaken: a member sends the dot products of group j in its round j, when
it has received group j - lag. So every member had sent group j - lag, hence was in round j - lag
and had received group j - 2 * lag, whose slot may be used again: slots >= 2 * lag. A reader waits
for group j from round j + lag - 1 on; it has then received group j - slots, and a sender comes to
group j + slots only once the reader has received group j, so one bit tells a slot's groups apart.

What a round waits for. Tiles were asked for a round ago: the fetch of group j + 1 is on its way
before group j has to be there. The members' words of group j + 1 - lag, sent a round ago, and the
rest of its records are asked for before the dot products of group j and used after them: asked for
earlier they would be stale more often, and take registers from the dot products.
Barriers: 1 begins a round, 2 follows the records, 3 the fetch, among helpers; at 4 grad_raw is in
registers and h_res takes its place, which the warps that mix see after 5.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ..common.architectures import overlaps, shared_limit
from ..common.knobs import knob
from ..common.pairs import WORD
from ..common.problem import Problem, Target
from ..common.programs import F32, architecture, ceil_div, logits_per_token, program
from ..common.programs import multiprocessors as count_multiprocessors
from ..common.projection import WARP_ROLE_CONFIGS
from ..mapping.grad_x_pass import ADDED, MIXED
from ..mapping.token_state import record_width, sums_width
from .grad_phi import sums_macros
from .grad_x import TILES, columns_macros
from .mailbox import (
    BF16,
    CHUNK,
    F16,
    GROUP,
    HELPERS,
    ROW_TILES,
    STREAMS,
    SUM_WARPS,
    WARP,
    Share,
    dots_macro,
    fetch_macro,
    first_token,
    receive_macros,
    unknown,
)

WARPGROUP = 4 * WARP
WIDEST = 256  # channels of a member: a lane of the helpers has 8
MOST_MEMBERS = 32  # half of them are registers of a helper
LINE = 64  # channels of 128 bytes: 240 channels a member take 264 us where 256 take 208
FLUSH = 512  # rounds after which the sums of grad_phi go to memory


@dataclass(frozen=True)
class Config:
    """Launch knobs of the team kernel.

    Attributes:
        members: blocks of a team; each owns ceil(C / members) channels of every stream.
        teams: teams that share the tokens; members * teams blocks must be resident together.
        lag: rounds from the dot products of a group to its columns. H200, 2026-11-24, 8192 x 2560:
            2 take 188 us where 1, with another group in flight, takes 199.
        registers: of a helper thread, where warps hand registers over; 16 fewer beside warps that
            mix a part, for at most 16 members.
    """

    members: int = knob(reduction_order=True)
    teams: int
    lag: int = 2
    registers: int = 80

    def __post_init__(self) -> None:
        """Reject what cannot launch on any GPU."""
        if self.members < 2 or self.teams < 1 or self.lag < 2:
            raise ValueError(f"pre_backward: config must be one that can launch, got {self}")
        if self.registers % 8 or not 40 <= self.registers <= 168:
            raise ValueError(f"pre_backward: config.registers must be 40 to 168, got {self}")

    @property
    def group(self) -> int:
        """Tokens that travel together."""
        return GROUP

    @property
    def sums(self) -> int:
        """Rows of block_sums that the helpers write."""
        return self.teams * HELPERS

    @property
    def slots(self) -> int:
        """Slots of the exchange, a power of two."""
        return 1 << (2 * self.lag - 1).bit_length()

    @property
    def exchange_shape(self) -> tuple[int, ...]:
        """Of the words between members."""
        return self.teams, self.slots, self.members, GROUP * STREAMS

    def exchange(self, device: torch.device) -> Tensor:
        """Words between members, which the launch ahead empties."""
        return torch.empty(self.exchange_shape, dtype=torch.int32, device=device)

    def share(self, channels: int, part: str = ADDED) -> Share:
        """The share of a member."""
        width = ceil_div(ceil_div(channels, self.members), LINE) * LINE
        return Share(channels, width, self.lag + 2, part)

    def threads(self, channels: int) -> tuple[int, int, int]:
        """First thread of those that sum grad_phi, first helper, one past the last: warpgroups."""
        mixers = ceil_div(self.share(channels).warps * WARP, WARPGROUP) * WARPGROUP
        return mixers, mixers + SUM_WARPS * WARP, mixers + (SUM_WARPS + HELPERS) * WARP

    def handed(self, channels: int, part: str = ADDED) -> tuple[int, int, int, int]:
        """Registers of a thread: before any is handed over, then of mixers, sums and helpers."""
        mixers, _, threads = self.threads(channels)
        width = self.share(channels).width
        before = 65536 // threads // 8 * 8
        others = max(24, min(32, 112 - self.registers)) if width > 192 else 48
        sums = width // 16 * ROW_TILES * 4 + others
        # 112 are left to those that mix, which is what they take, instead of 104
        fewer = 16 if part == MIXED and self.members <= 16 else 0
        helping = self.registers - fewer
        left = before * threads - (helping + sums) * WARPGROUP
        return before, min(240, left // mixers // 8 * 8), sums, helping

    def launches(self, channels: int, arch: str) -> bool:
        """Whether shared memory and registers allow the kernel."""
        share = self.share(channels)
        fits = share.shared_bytes <= shared_limit(arch) and share.width <= WIDEST
        fits = fits and overlaps(arch)  # else no handing over of registers
        return fits and self.handed(channels)[1] >= 96 and self.members <= MOST_MEMBERS


@lru_cache(maxsize=1024)
def _launches(config: Config, channels: int, arch: str) -> bool:
    """`config.launches`, which a launch asks every time."""
    return config.launches(channels, arch)


@lru_cache(maxsize=1024)
def default_config(problem: Problem, target: Target) -> Config | None:
    """The first of `candidates`; None where no team can run."""
    return next(candidates(problem, target), None)


def candidates(problem: Problem, target: Target) -> Iterator[Config]:
    """Every configuration worth timing that can launch."""
    channels = problem.channels
    if problem.n != STREAMS or channels % CHUNK:
        return
    # on sm_100a, where nothing is measured, more than 128 channels spill a word or some
    for width in (256, 192, 128) if target.arch == "sm_90a" else (128, 192, 256):
        members = ceil_div(channels, width)
        if 2 <= members <= target.multiprocessors:
            config = Config(members, target.multiprocessors // members)
            if config.launches(channels, target.arch):
                yield config


@program(WARP_ROLE_CONFIGS)
def team_program(channels: int, part_is: str, config: Config, handover: bool) -> Any:
    """Everything of `pre`'s backward behind the unfinished records, by teams of blocks."""
    C, n = channels, STREAMS
    members, teams = config.members, config.teams
    lag, slots = config.lag, config.slots
    share, with_part = config.share(C, part_is), bool(part_is)
    depth = share.depth
    sums_first, helpers_first, threads = config.threads(C)
    column_threads = share.warps * WARP
    registers, mixing_registers, sums_registers, helping_registers = config.handed(C, part_is)
    sums_size = share.width // 16 * ROW_TILES * 4
    logits, width, sums_row = logits_per_token(n), record_width(n), sums_width(n)
    tokens = T.dynamic("tokens")
    fetch = fetch_macro(share, tokens)
    send_dots = dots_macro(share, slots)
    ask, request, receive, publish, leave_sums = receive_macros(share, members, slots)
    load_phi, form = columns_macros(share, tokens)
    fetch_part, mixing_words, add_group, flush = sums_macros(share, tokens)

    @T.prim_func
    def mhc_pre_backward_team(
        # first, so that the number of tokens is read from it: products below may wrap at 2^31
        projection: T.Tensor((tokens, logits), F32),
        inv_rms: T.Tensor((tokens,), F32),
        unfinished: T.Tensor((tokens, width), F32),
        grad_layer_input: T.Tensor((tokens * C,), BF16),
        x: T.Tensor((tokens * (n * C),), BF16),
        part: T.Tensor((tokens * (n * C),), BF16),
        h_res: T.Tensor((tokens, n * n), F32),
        phi: T.Tensor((logits, n, C), F32),
        alpha: T.Tensor((3,), F32),
        exchange: T.Tensor(config.exchange_shape, "int32"),
        grad_x: T.Tensor((tokens * (n * C),), BF16),
        grad_phi_parts: T.Tensor((teams * logits * n * C,), F32),
        block_sums: T.Tensor((teams * HELPERS, sums_row), F32),
    ):
        with T.Kernel(members, teams, threads=threads) as (member, team):
            tx = T.get_thread_binding()
            tiles = T.alloc_shared((depth, GROUP, n + 1, share.width), BF16)
            staged = T.alloc_shared((2, GROUP, n, share.width), BF16)
            high_low = T.alloc_shared((WARP, ROW_TILES * 8), BF16)
            scaled = T.alloc_shared((2, WARP, 8), F16)
            weights = T.alloc_shared((GROUP, 8), F32)
            # a variable, not an expression: the simplifier would expand it into every use
            rounds = T.alloc_var("int32", (T.ceildiv(tokens, GROUP) + teams - 1 - team) // teams)
            turns = T.alloc_var("int32", T.max(rounds, 1))  # a team without tokens leaves zeros

            if tx == 0:
                weights[0, n] = 0.0  # see `unknown`
            T.sync_threads()
            if turns == 0:  # never: that it is here makes the launch cooperative
                T.sync_grid()
            if tx < sums_first:
                phi_tile = T.alloc_local((TILES * ROW_TILES * 4,), F16)
                # two rounds of the helpers do not need what follows
                T.named_barrier_arrive(1, threads)
                T.sync_threads(2, threads)
                T.named_barrier_arrive(1, threads)
                if tx < column_threads:
                    load_phi(phi_tile, scaled, high_low, phi, member, tx)
                if handover:
                    T.set_max_nreg(mixing_registers, int(mixing_registers > registers))
                for _ in T.serial(1, lag):
                    T.sync_threads(2, threads)
                    T.named_barrier_arrive(1, threads)
                for group in T.serial(turns):
                    lane = T.alloc_var("int32", unknown(weights, tx))
                    T.sync_threads(2, threads)
                    first = first_token(group, teams, team)
                    if (tx < column_threads) and (first < tokens):
                        form(
                            grad_x, phi_tile, tiles, staged, high_low, scaled, weights,
                            group % depth, group % 2, first, member, lane, threads,
                        )  # fmt: skip
                    elif group < turns - 1:
                        T.named_barrier_arrive(1, threads)
            elif tx < helpers_first:
                T.named_barrier_arrive(1, threads)
                T.sync_threads(2, threads)
                T.named_barrier_arrive(1, threads)
                if handover:
                    T.set_max_nreg(sums_registers, int(sums_registers > registers))
                grad_phi = T.alloc_local((sums_size,), F32)
                mixing = T.alloc_local((2,), WORD)
                T.clear(grad_phi)
                for j in T.serial(1, turns + lag):
                    thread = T.alloc_var("int32", unknown(weights, tx - sums_first))
                    first = T.cast((j - lag) * teams + team, "int64") * GROUP
                    if part_is == MIXED:
                        mixing_words(mixing, h_res, first, thread)
                    if with_part:
                        T.ptx_wait_group(0)  # the part that the last round asked for
                    T.sync_threads(2, threads)
                    if (j >= lag) and (j - lag < rounds):
                        add_group(
                            grad_phi, tiles, high_low, mixing, (j - lag) % depth, thread,
                            column_threads + SUM_WARPS * WARP,
                        )  # fmt: skip
                    if j < turns + lag - 1:
                        T.named_barrier_arrive(1, threads)
                    # the slot's last results were read before the second barrier
                    if with_part:
                        T.sync_warp()
                        thread = unknown(weights, tx - sums_first)  # not kept until here
                        first = T.cast((j + 1 - lag) * teams + team, "int64") * GROUP
                        fetch_part(part, staged, (j + 1 + lag) % 2, first, member, thread)
                        T.ptx_commit_group()
                    # sums of the tensor cores lose digits as they grow: a new one begins
                    if (j == turns + lag - 1) or ((j >= lag) and ((j - lag) % FLUSH == FLUSH - 1)):
                        flush(grad_phi_parts, grad_phi, j - lag >= FLUSH, team, member, thread)
            else:
                if handover:
                    T.set_max_nreg(helping_registers, 0)
                thread = T.alloc_var("int32", tx - helpers_first)
                words = T.alloc_local((ceil_div(members, 2),), "int32")
                record = T.alloc_local((6,), F32)
                ready = T.alloc_local((5,), F32)
                sums = T.alloc_local((2,), F32)
                gate = T.alloc_var(F32, alpha[0])
                group = T.alloc_var("int32", 0)
                T.clear(words)
                T.clear(record)
                T.clear(ready)
                T.clear(sums)
                # read with the rest; the first place is for what undoes the scale of phi
                scaled[thread // 64, thread // 2 % WARP, 6 + thread % 2] = T.cast(0.0, F16)
                fetch(x, grad_layer_input, tiles, 0, first_token(0, teams, team), member, thread)
                T.ptx_commit_group()
                for j in T.serial(turns + lag):
                    thread = unknown(weights, tx - helpers_first)
                    T.sync_threads(1, threads)
                    if j >= lag:
                        publish(ready, high_low, scaled, weights, thread)
                    T.named_barrier_arrive(2, threads)
                    group = j + 1 - lag
                    if j + 1 < rounds:
                        first = first_token(j + 1, teams, team)
                        fetch(x, grad_layer_input, tiles, (j + 1) % depth, first, member, thread)
                    T.ptx_commit_group()
                    if (group >= 0) and (group < rounds):  # here once the dot products are sent
                        first = first_token(group, teams, team)
                        request(record, unfinished, projection, inv_rms, first, tokens, thread)
                        ask(words, exchange, team, group, thread)
                    # what the previous round asked for is here: group j
                    T.ptx_wait_group(1)
                    T.sync_threads(3, HELPERS * WARP)
                    if j < rounds:
                        send_dots(tiles, j % depth, exchange, team, member, j, thread)
                    if (group >= 0) and (group < rounds):
                        first = first_token(group, teams, team)
                        receive(
                            words, record, ready, exchange, gate, sums, team, group, first,
                            tokens, thread,
                        )  # fmt: skip
                if member == 0:
                    leave_sums(block_sums, sums, team * HELPERS, thread)

    return mhc_pre_backward_team


def launch(
    config: Config,
    grad_layer_input: Tensor,
    x: Tensor,
    phi: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    alpha: Tensor,
    unfinished: Tensor,
    grad_x_part: Tensor | None,
    h_res: Tensor | None,
    exchange: Tensor,
    block_sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch the team kernel on at least one token.

    Args:
        config: of the launch.
        grad_layer_input: [T, C], bf16.
        x: [T, n, C], bf16.
        phi: [n*n + 2n, n*C], fp32.
        projection: [T, n*n + 2n], fp32.
        inv_rms: [T], fp32.
        alpha: [3], fp32.
        unfinished: [T, record_width(n)], fp32, of `token_records` without grad_h_pre.
        grad_x_part: [T, n, C], bf16, or None.
        h_res: [T, n, n], fp32, with which grad_x_part is mixed, or None.
        exchange: config.exchange_shape, int32, emptied by `token_records`.
        block_sums: [config.teams * HELPERS, sums_width(n)], fp32; written.

    Returns:
        grad_x [T, n, C], bf16, and the teams' parts of grad_phi [teams, n*n + 2n, n, C], fp32.
    """
    _, n, channels = x.shape
    arch, available = architecture(x.device), count_multiprocessors(x.device)
    fits = n == STREAMS and x.dtype == torch.bfloat16 and _launches(config, channels, arch)
    if config.members * config.teams > available or not fits:
        raise ValueError(
            f"pre_backward: config must launch for {x.dtype}, n {n}, C {channels} on the "
            f"{available} multiprocessors of this {arch} GPU, got {config}"
        )
    grad_x = torch.empty_like(x)
    parts = phi.new_empty(config.teams, phi.shape[0], n, channels)
    part_is = "" if grad_x_part is None else ADDED if h_res is None else MIXED
    kernel = team_program(arch, channels, part_is, config, overlaps(arch))
    # what a program leaves unread still has its shape
    part = x if grad_x_part is None else grad_x_part
    mixing = projection.view(-1)[: len(x) * n * n] if h_res is None else h_res
    kernel(
        projection, inv_rms, unfinished, grad_layer_input.view(-1), x.view(-1), part.view(-1),
        mixing.view(len(x), n * n), phi.view(parts.shape[1:]), alpha, exchange, grad_x.view(-1),
        parts.view(-1), block_sums,
    )  # fmt: skip
    return grad_x, parts
