"""`pre` in one launch, by CTA groups: x is read once. Equations as in pre/launch.py.

A token moves n * C elements in and C out; phi crosses the chip once a group. docs/kernels/pre.md
draws the pipeline. Ranks wait for each other, so the launch is cooperative (`T.sync_grid` makes it
so).
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
from ..common.constants import Constants
from ..common.knobs import check, knob
from ..common.problem import Problem, Target
from ..common.programs import F32, architecture, ceil_div, dtype_name, logits_per_token, program
from ..common.programs import multiprocessors as count_multiprocessors
from ..common.projection import WARP, WARP_ROLE_CONFIGS, Segment, segment_width
from .plan import Cta, Plan, Reduced, message_columns
from .roles import apply_warps, empty_mailboxes, project_warps, receive_and_reduce_warps

# Apply warps, reducer warps, and registers of their threads, worth timing.
ROLES = ((4, 3, 80), (8, 3, 64), (4, 7, 64), (4, 7, 48), (4, 11, 48))
WARPGROUP = 4  # warps that reallocate registers together
MINIMUM_RANKS = 4  # of fewer, each reduces many tokens of a tile; measured for n = 4 alone,
MINIMUM_CHANNELS = 256  # from which on any number of ranks is faster than two launches


@dataclass(frozen=True)
class Config:
    """Launch knobs of the persistent kernel.

    Tuned tables store these names. `Plan` and docs/kernels/pre.md have those of the field.
    """

    members: int = knob(reduction_order=True)  # ranks of a group
    teams: int  # CTA groups; members * teams CTAs must be resident together
    steps: int = knob(4, reduction_order=True)  # pieces of 32 elements that a projection warp holds
    group: int = knob(16, reduction_order=True)  # tokens of a tile
    ahead: int = 1  # prefetch distance
    lag: int = 4  # pipeline distance
    apply_warps: int = 4
    owners: int = 3  # reducer warps
    registers: int = 80  # of a thread of all roles but projection, which takes what is left
    spare: ClassVar[int] = 32  # registers of a projecting thread for all but phi and sums

    def __post_init__(self) -> None:
        """Reject what cannot launch on any GPU."""
        group = self.group > 0 and self.group % 8 == 0
        registers = self.registers % 8 == 0 and 24 <= self.registers <= 240
        rules = {
            "lag": (self.lag >= 2, "at least 2"),
            "group": (group, "a multiple of 8"),
            "registers": (registers, "a multiple of 8 from 24 to 240"),
        }
        positive = "members", "teams", "steps", "ahead", "apply_warps", "owners"
        check("pre", self, *positive, **rules)

    @property
    def num_stages(self) -> int:
        """Tiles of the ring: in flight, projected but not applied, being applied."""
        return self.ahead + self.lag + 1

    @property
    def mailbox_stages(self) -> int:
        """Stages of the mailboxes, a power of two; docs/kernels/pre.md says why so many."""
        return 1 << (max(self.lag, self.longest_skip()) - 1).bit_length()

    def longest_skip(self) -> int:
        """Tiles between two tokens of a reducer, at most; the first token counts from -1."""
        return _longest_skip(self.group, self.members, self.owners)

    def segment(self, n: int, C: int) -> Segment:
        """The channels of a rank."""
        width, rows = segment_width(C, self.members), logits_per_token(n)
        return Segment(n, C, rows, width, self.steps, self.group)

    def first_threads(self, n: int, C: int) -> tuple[int, int, int]:
        """As in `Plan`: roles are whole warpgroups; the reducer warps follow the receiver warp."""
        project = ceil_div(self.segment(n, C).warps, WARPGROUP)
        apply = project + ceil_div(self.apply_warps, WARPGROUP)
        receive = apply + ceil_div(1 + self.owners, WARPGROUP)
        size = WARP * WARPGROUP
        return project * size, apply * size, receive * size

    def registers_of_roles(self, n: int, C: int) -> tuple[int, int, int]:
        """Registers of a projection, apply, and receiver or reducer thread after reallocation."""
        project, _, threads = self.first_threads(n, C)
        granted = 65536 // threads // 8 * 8 * threads - self.registers * (threads - project)
        return min(240, granted // project // 8 * 8), self.registers, self.registers

    def mailbox_shapes(self, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As in `Plan`."""
        common = self.teams, self.mailbox_stages
        return (*common, self.members, self.group, message_columns(n)), (*common, self.group, n)

    def shared_bytes(self, n: int, C: int) -> int:
        """Shared memory of a CTA."""
        return self.segment(n, C).shared_bytes(self.num_stages, 1) + 8 * n * self.group

    @lru_cache(maxsize=1024)  # noqa: B019 - few configurations, asked for at every launch
    def launches(self, n: int, C: int, arch: str) -> bool:
        """Whether shared memory, registers and threads allow the kernel."""
        segment = self.segment(n, C)
        threads = self.first_threads(n, C)[2]
        needed = segment.fragment_registers + 4 * (segment.phi_tiles + 1)
        granted = 65536 // max(threads, 1) // 8 * 8
        if overlaps(arch):
            granted = self.registers_of_roles(n, C)[0]
        fits = self.shared_bytes(n, C) <= shared_limit(arch)
        fits = fits and segment.width <= 8 * WARP * self.apply_warps  # 8 channels a lane
        return fits and threads <= 1024 and needed + self.spare <= granted

    def plan(self, n: int, C: int, dtype: str, constants: Constants, reallocate: bool) -> Plan:
        """The constants of a program."""
        return Plan(
            n, C, dtype, T.dynamic("tokens"), self.segment(n, C), self.members,
            self.teams, self.ahead, self.lag, self.num_stages, self.mailbox_stages,
            self.apply_warps, self.owners, self.mailbox_shapes(n), self.first_threads(n, C),
            self.registers_of_roles(n, C) if reallocate else None, constants,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _longest_skip(tokens: int, ranks: int, reducers: int) -> int:
    """`Config.longest_skip` for tiles of some tokens."""
    each, longest = ceil_div(tokens, ranks), 1
    period = ranks * reducers  # in tiles: then a warp's places repeat
    for rank in range(ranks):
        for warp in range(reducers):
            last = -1
            for task in range(warp, 2 * period * each, reducers):
                tile, step = divmod(task, each)
                place = (rank - tile * tokens) % ranks + step * ranks
                if place < tokens:
                    longest, last = max(longest, tile - last), tile
    return longest


@lru_cache(maxsize=1024)
def default_config(problem: Problem, target: Target) -> Config | None:
    """Ranks of about 1024 elements (n = 4); None where two launches are faster or it cannot run."""
    n, C = problem.n, problem.channels
    width = max(32, 1024 // n // ceil_div(logits_per_token(n), 24))
    ranks = ceil_div(C, width)
    messages = ranks * ceil_div(logits_per_token(n) + 1, WARP)  # that a lane adds: registers
    enough = ranks >= MINIMUM_RANKS or (n == 4 and C >= MINIMUM_CHANNELS)
    if not enough or ranks > target.multiprocessors or messages > 48:
        return None
    # of fewer than 8 ranks each reduces several tokens of a tile; one alone, all of them
    reducers, registers = (11 if ranks == 1 else 7, 48) if ranks < 8 else (3, 80)
    steps = 4 if n <= 4 else 1
    groups = target.multiprocessors // ranks
    config = Config(ranks, groups, steps, owners=reducers, registers=registers)
    return config if config.launches(n, C, target.arch) else None


def candidates(problem: Problem, target: Target) -> Iterator[Config]:
    """Every configuration worth timing that can launch."""
    n, C = problem.n, problem.channels
    for ranks in sorted({ceil_div(C, width) for width in (192, 224, 256)}):
        if ranks <= target.multiprocessors:
            groups = target.multiprocessors // ranks
            for ahead, lag in ((1, 4), (2, 3), (2, 4)):
                for applying, owners, registers in ROLES:
                    knobs = {"ahead": ahead, "lag": lag, "apply_warps": applying}
                    config = Config(ranks, groups, owners=owners, registers=registers, **knobs)
                    if config.launches(n, C, target.arch):
                        yield config


@program(WARP_ROLE_CONFIGS)
def persistent_program(
    n: int, C: int, dtype: str, config: Config, constants: Constants, reallocate: bool
) -> Any:
    """All of `pre`: a CTA is a rank of a group, its warps have the roles of roles.py."""
    plan = config.plan(n, C, dtype, constants, reallocate)
    tokens, segment, G = plan.tokens, plan.segment, plan.tile
    apply_first, receive_first, threads = plan.first_threads

    @T.prim_func
    def mhc_pre_persistent(
        x: T.Tensor((tokens, n, C), dtype),
        phi: T.Tensor((segment.rows, n, C), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((segment.rows,), F32),
        gather_mailbox: T.Tensor(plan.mailbox_shapes[0], "int32"),
        apply_mailbox: T.Tensor(plan.mailbox_shapes[1], "int32"),
        layer_input: T.Tensor((tokens, C), dtype),
        h_post: T.Tensor((tokens, n), F32),
        h_res: T.Tensor((tokens, n * n), F32),
        projection: T.Tensor((tokens, segment.rows), F32),
        inv_rms: T.Tensor((tokens,), F32),
    ):
        with T.Kernel(plan.ranks, plan.groups, threads=threads) as (rank, group):
            tx = T.get_thread_binding()
            x_tile = T.alloc_shared((plan.num_stages, G, segment.row), dtype)
            sums = T.alloc_shared((1, segment.warps, G, segment.sums_row), F32)
            weights = T.alloc_shared((2, G, n), F32)  # h_pre
            # variables, not expressions: the simplifier would expand them into every use
            tiles = T.ceildiv(tokens, G)
            iterations = T.alloc_var("int32", (tiles + plan.groups - 1 - group) // plan.groups)
            last = T.alloc_var("int32", tiles - 1 - group)
            cta = Cta(group, rank, iterations, last)
            empty_mailboxes(plan, cta, gather_mailbox, apply_mailbox, tx)
            if tx < apply_first:
                project_warps(plan, cta, phi, x_tile, sums, gather_mailbox, tx)
            elif tx < receive_first:
                apply_warps(plan, cta, x, x_tile, weights, layer_input, tx - apply_first)
            else:
                reduced = Reduced(
                    gather_mailbox, apply_mailbox, alpha, bias, h_post, h_res, projection, inv_rms
                )
                receive_and_reduce_warps(plan, cta, weights, reduced, tx)

    return mhc_pre_persistent


def launch(
    config: Config,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    outputs: tuple[Tensor, ...],
    constants: Constants,
) -> None:
    """Launch the persistent kernel on T >= 1 tokens, bf16 or fp16.

    `outputs`, which are written: layer_input [T, C], h_post [T, n], h_res [T, n*n], projection
    [T, n*n + 2n], inv_rms [T].
    """
    _, n, C = x.shape
    arch, available = architecture(x.device), count_multiprocessors(x.device)
    check_launch("pre", config, n, C, arch, available)
    kernel = persistent_program(arch, n, C, dtype_name(x), config, constants, overlaps(arch))
    phi = phi.view(logits_per_token(n), n, C)
    kernel(x, phi, alpha, bias, *mailboxes(config, n, x.device), *outputs)


def check_launch(op: str, config: Config, n: int, C: int, arch: str, available: int) -> None:
    """Reject what does not launch on a GPU of so many multiprocessors."""
    if config.members * config.teams > available or not config.launches(n, C, arch):
        raise ValueError(
            f"{op}: config must launch for n {n}, C {C} on the {available} multiprocessors "
            f"of this {arch} GPU, got {config}"
        )


def mailboxes(config: Config, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The gather and the apply mailbox."""
    shapes = config.mailbox_shapes(n)
    sums, h_pre = map(math.prod, shapes)
    workspace = torch.empty(sums + h_pre, dtype=torch.int32, device=device)
    return workspace[:sums].view(shapes[0]), workspace[sums:].view(shapes[1])
