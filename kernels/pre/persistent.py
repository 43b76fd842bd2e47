"""`pre` in one launch: mapping, Sinkhorn and pre-apply, x read once. Equations as in pre.py.

HBM sees n * C elements read and C written a token, and phi once a team. How x stays on chip between
the projection, which needs the whole token, and pre-apply, which needs the projection's result:

* The blocks of the GPU form teams. A member of a team owns a segment of the channels (all n streams
  of it) and keeps phi's columns for that segment in REGISTERS, so phi costs no bandwidth after the
  first microseconds.
* Groups of 16 tokens flow through a ring of shared-memory tiles. The projecting warps project a
  group and send the member's partial sums through L2. Each token has one member whose owner warps
  wait for its sums, add them in the order of the members, and answer every member with h_pre.
  `lag` groups later the apply warps form layer_input from the tile, still in shared memory. Owner
  warps run freely; the other roles meet once a round.
* A message is one word: a float whose last bit is a flag that flips whenever its slot is reused. It
  validates itself, so there is no fence, no separate flag and one trip through L2 instead of three.
* From sm_90 on warps hand registers over: those that project hold phi, the others need few.
* Sinkhorn runs in the owner warps once their last sums are in, one lane a token, while the last
  groups are still being applied.

Members wait for each other, so the launch is cooperative (`T.sync_grid` makes it so): all blocks
are resident or the launch fails. No atomics on data: a token's sums are formed over segments that
depend on C alone, in a fixed order; a word that travels loses its last mantissa bit.

Why no message is lost or mistaken: a member writes the sums of group j over those of group
j - slots. It has then received h_pre of group j - lag, which needed the owners to have read the
sums of all groups up to there. Answers likewise: an owner has the sums of group j only once every
member has begun its round j and so received group j - lag. A reader can tell group j from group
j - slots by the flag; `Config.slots` keeps j - 2 * slots away.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import tilelang.language as T
import torch
from torch import Tensor

from ..common.architectures import overlaps, shared_limit
from ..common.knobs import knob
from ..common.phi import load_macro, scale_macro
from ..common.problem import Problem, Target
from ..common.programs import F32, architecture, ceil_div, dtype_name, logits_per_token, program
from ..common.programs import multiprocessors as count_multiprocessors
from ..common.projection import WARP, WARP_ROLE_CONFIGS, Segment, segment_width
from .roles import (
    apply_macro,
    help_macro,
    send_macros,
    word_columns,
)

WARPGROUP = 4  # warps that hand registers over together
MINIMUM_MEMBERS = 4  # of fewer, each owns so many tokens that two launches do better


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
        apply_warps: warps that fetch x and form layer_input.
        owners: warps that add the members' sums of the tokens that a member owns.
        registers: of a thread of the other roles, on GPUs where warps can hand registers over; the
            projecting warps take what is left.
    """

    members: int = knob(reduction_order=True)
    teams: int
    steps: int = knob(4, reduction_order=True)
    group: int = knob(16, reduction_order=True)
    ahead: int = 1
    lag: int = 4
    batches: int = knob(1, reduction_order=True)
    apply_warps: int = 4
    owners: int = 3
    registers: int = 80
    spare: ClassVar[int] = 32  # registers of a projecting thread for all but phi and sums

    def __post_init__(self) -> None:
        """Reject what cannot launch on any GPU."""
        counts = (self.members, self.teams, self.steps, self.group, self.batches)
        smallest = min(*counts, self.ahead, self.apply_warps, self.owners)
        if smallest < 1 or self.lag < 2 or self.group % (8 * max(self.batches, 1)):
            raise ValueError(
                "pre: config must have positive counts, a lag of at least 2 and a group of a "
                f"multiple of 8 * batches tokens, got {self}"
            )
        if self.registers % 8 or not 24 <= self.registers <= 240:
            raise ValueError(
                "pre: config.registers must be a multiple of 8 from 24 to 240, got "
                f"{self.registers}"
            )

    @property
    def depth(self) -> int:
        """Tiles of the ring: in flight, projected but not applied, being applied."""
        return self.ahead + self.lag + 1

    @property
    def slots(self) -> int:
        """Slots of the exchange, a power of two.

        A member overwrites the parts of group j - slots only after it has received h_pre of group
        j - lag, hence slots >= lag. A word's one flag bit tells group j from group j - slots but
        not from j - 2 * slots, hence no owner warp may skip more than `slots` groups.
        """
        return 1 << (max(self.lag, self.longest_skip()) - 1).bit_length()

    def longest_skip(self) -> int:
        """Groups between two tokens of an owner warp, at most; the first token counts from -1."""
        return _longest_skip(self.group, self.members, self.owners)

    def segment(self, n: int, channels: int) -> Segment:
        """The share of a member."""
        width, rows = segment_width(channels, self.members), logits_per_token(n)
        return Segment(n, channels, rows, width, self.steps, self.group, self.batches)

    def roles(self, n: int, channels: int) -> tuple[int, int, int]:
        """First thread of the apply warps and of the receivers, and one past the last.

        Whole warpgroups; the first warp after the apply warps receives, the next ones own.
        """
        project = ceil_div(self.segment(n, channels).warps, WARPGROUP)
        apply = project + ceil_div(self.apply_warps, WARPGROUP)
        receive = apply + ceil_div(1 + self.owners, WARPGROUP)
        size = WARP * WARPGROUP
        return project * size, apply * size, receive * size

    def project_registers(self, n: int, channels: int) -> int:
        """Registers of a projecting thread once the other roles have given theirs up."""
        project, _, threads = self.roles(n, channels)
        granted = 65536 // threads // 8 * 8 * threads - self.registers * (threads - project)
        return min(240, granted // project // 8 * 8)

    def exchange_shape(self, n: int) -> tuple[int, int, int, int, int]:
        """Words [team, slot, member, token, column] that pass between members."""
        return self.teams, self.slots, self.members, self.group, word_columns(n)

    def shared_bytes(self, n: int, channels: int) -> int:
        """Shared memory of a block."""
        return self.segment(n, channels).shared_bytes(self.depth, 1) + 8 * n * self.group

    def launches(self, n: int, channels: int, arch: str) -> bool:
        """Whether shared memory, registers and threads allow the kernel."""
        segment = self.segment(n, channels)
        threads = self.roles(n, channels)[2]
        needed = segment.fragment_registers + self.batches * 4 * (segment.phi_tiles + 1)
        granted = 65536 // max(threads, 1) // 8 * 8
        if overlaps(arch):
            granted = self.project_registers(n, channels)
        fits = self.shared_bytes(n, channels) <= shared_limit(arch)
        fits = fits and segment.width <= 8 * WARP * self.apply_warps  # 8 channels a lane
        return fits and threads <= 1024 and needed + self.spare <= granted


@lru_cache(maxsize=1024)
def _longest_skip(tokens: int, members: int, owners: int) -> int:
    """`Config.longest_skip` for groups of some tokens; it walks through all owner warps."""
    shares, longest = ceil_div(tokens, members), 1
    period = members * owners  # in groups: then a warp's places repeat
    for member in range(members):
        for warp in range(owners):
            last = -1
            for share in range(warp, 2 * period * shares, owners):
                group, turn = divmod(share, shares)
                place = (member - group * tokens) % members + turn * members
                if place < tokens:
                    longest, last = max(longest, group - last), group
    return longest


@lru_cache(maxsize=1024)
def _launches(config: Config, n: int, channels: int, arch: str) -> bool:
    """`config.launches`, which a launch asks every time."""
    return config.launches(n, channels, arch)


def default_config(problem: Problem, target: Target) -> Config | None:
    """Members of about 1024 elements (n = 4); None where too few fit or the GPU cannot run it.

    H200, 2026-11-24: lag 4 needs ahead 1 for the ring to fit and is 3 to 14% faster than lag 3 with
    ahead 2. Members of fewer than 8 own several tokens of a group: 7 owner warps take 46 us at
    8192 x 1280 where 3 take 51; at 8192 x 2560 they take 82 where 3 take 77.
    """
    return _default(problem.n, problem.channels, target)


@lru_cache(maxsize=1024)
def _default(n: int, channels: int, target: Target) -> Config | None:
    width = max(32, 1024 // n // ceil_div(logits_per_token(n), 24))
    members = ceil_div(channels, width)
    words = members * ceil_div(logits_per_token(n) + 1, WARP)  # that a lane adds: registers
    if members < MINIMUM_MEMBERS or members > target.multiprocessors or words > 48:
        return None
    owners, registers = (7, 48) if members < 8 else (3, 80)
    steps = 4 if n <= 4 else 1
    teams = target.multiprocessors // members
    config = Config(members, teams, steps, owners=owners, registers=registers)
    return config if config.launches(n, channels, target.arch) else None


def candidates(problem: Problem, target: Target) -> Iterator[Config]:
    """Every configuration worth timing that can launch."""
    n, channels = problem.n, problem.channels
    for members in sorted({ceil_div(channels, width) for width in (192, 224, 256)}):
        if members <= target.multiprocessors:
            teams = target.multiprocessors // members
            for ahead, lag in ((1, 4), (2, 3), (2, 4)):
                for apply_warps, owners, registers in ((4, 3, 80), (8, 3, 64), (4, 7, 64)):
                    knobs = {"ahead": ahead, "lag": lag, "apply_warps": apply_warps}
                    config = Config(members, teams, owners=owners, registers=registers, **knobs)
                    if config.launches(n, channels, target.arch):
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
    handover: bool,
) -> Any:
    """Everything of `pre`, by teams of blocks."""
    C, G = channels, config.group
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
    load_phi, scale_phi = load_macro(segment, dtype), scale_macro(segment, dtype)
    project = segment.project_macro(dtype)
    fetch = segment.fetch_macro(tokens, WARP * apply_warps)
    clear, send = send_macros(segment, slots, threads)
    pre_apply = apply_macro(segment, depth, dtype, tokens, WARP * apply_warps)
    constants = norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    help = help_macro(segment, members, teams, owners, slots, lag, meeting, tokens, constants)

    @T.prim_func
    def mhc_pre_team(
        x: T.Tensor((tokens, n, C), dtype),
        phi: T.Tensor((rows, n, C), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((rows,), F32),
        exchange: T.Tensor(exchange_shape, "int32"),
        answers: T.Tensor((teams, slots, G, n), "int32"),
        layer_input: T.Tensor((tokens, C), dtype),
        h_post: T.Tensor((tokens, n), F32),
        h_res: T.Tensor((tokens, n * n), F32),
        projection: T.Tensor((tokens, rows), F32),
        inv_rms: T.Tensor((tokens,), F32),
    ):
        with T.Kernel(members, teams, threads=threads) as (member, team):
            tx = T.get_thread_binding()
            lane = tx % WARP
            x_tile = T.alloc_shared((depth, G, segment.row), dtype)
            sums = T.alloc_shared((1, warps, G, segment.sums_row), F32)
            weights = T.alloc_shared((2, G, n), F32)  # h_pre
            # a variable, not an expression: the simplifier would expand it into every use
            rounds = T.alloc_var("int32", (T.ceildiv(tokens, G) + teams - 1 - team) // teams)
            # round j has group last - j * teams: what the launch ahead wrote last is in L2
            last = T.alloc_var("int32", T.ceildiv(tokens, G) - 1 - team)

            clear(exchange, answers, team, member, tx)
            if tx < apply_first:
                if handover:
                    T.set_max_nreg(project_registers, 1)
                fragments = T.alloc_local(*segment.fragments(dtype))
                unscales = T.alloc_local((segment.phi_tiles,), F32)
                if tx < main_threads:
                    load_phi(fragments, phi, member, tx)
                    scale_phi(fragments, unscales)
                T.sync_grid()
                for j in T.serial(rounds + lag):
                    T.sync_threads(2, meeting)
                    if (j < rounds) and (tx < main_threads):
                        T.sync_threads(3, main_threads + apply_warps * WARP)
                        project(sums, 0, fragments, unscales, x_tile, j % depth, tx)
                        T.sync_threads(1, main_threads)
                        send(sums, exchange, team, member, j, tx // WARP, warps, lane)
            elif tx < receive_first:
                if handover:
                    T.set_max_nreg(config.registers, 0)
                thread = tx - apply_first
                if thread < apply_warps * WARP:
                    for j in T.serial(ahead):
                        if j < rounds:
                            first = T.cast(last - j * teams, "int64") * G
                            fetch(x_tile, j, x, first, member, thread)
                        T.ptx_commit_group()
                T.sync_grid()
                for j in T.serial(rounds + lag):
                    T.sync_threads(2, meeting)
                    if thread < apply_warps * WARP:
                        # fetch group j + ahead into the tile that the previous round applied
                        if j + ahead < rounds:
                            first = T.cast(last - (j + ahead) * teams, "int64") * G
                            fetch(x_tile, (j + ahead) % depth, x, first, member, thread)
                        T.ptx_commit_group()
                        if j < rounds:
                            T.ptx_wait_group(ahead)  # group j is here; those behind it are not
                            T.sync_threads(3, main_threads + apply_warps * WARP)
                        if j >= lag:
                            done = T.cast(last - (j - lag) * teams, "int64") * G
                            pre_apply(layer_input, x_tile, weights, j - lag, done, member, thread)
            else:
                if handover:
                    T.set_max_nreg(config.registers, 0)
                role = (tx - receive_first) // WARP
                T.sync_grid()
                help(
                    exchange, answers, weights, h_post, h_res, projection, inv_rms, alpha, bias,
                    team, member, rounds, last, role, lane,
                )  # fmt: skip

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
    check("pre", config, n, channels, arch, available)
    messages = exchange(config, n, x.device)
    kernel = team_program(arch, n, channels, dtype_name(x), config, *constants, overlaps(arch))
    phi = phi.view(logits_per_token(n), n, channels)
    kernel(x, phi, alpha, bias, *messages, *outputs)


def check(op: str, config: Config, n: int, channels: int, arch: str, available: int) -> None:
    """Reject what does not launch on a GPU of so many multiprocessors."""
    if config.members * config.teams > available or not _launches(config, n, channels, arch):
        raise ValueError(
            f"{op}: config must launch for n {n}, C {channels} on the {available} multiprocessors "
            f"of this {arch} GPU, got {config}"
        )


def exchange(config: Config, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the words that pass between members: partial sums, and the owners' answers."""
    shapes = config.exchange_shape(n), (config.teams, config.slots, config.group, n)
    sums, answers = math.prod(shapes[0]), math.prod(shapes[1])
    workspace = torch.empty(sums + answers, dtype=torch.int32, device=device)
    return workspace[:sums].view(shapes[0]), workspace[sums:].view(shapes[1])
