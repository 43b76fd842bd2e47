"""`pre`, backward, in one persistent launch: x is read once. Equations as in launch.py.

A token moves (3n + 1) * C elements (13 C at n = 4) with merge's part of grad_x. All CTAs must be
resident, so the launch is cooperative. docs/kernels/pre_backward.md draws the pipeline.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ..common.architectures import overlaps, shared_limit
from ..common.knobs import check, knob
from ..common.problem import Problem, Target
from ..common.programs import F32, architecture, ceil_div, logits_per_token, program
from ..common.programs import multiprocessors as count_multiprocessors
from ..common.projection import WARP_ROLE_CONFIGS
from ..mapping.grad_x_pass import ADDED, MIXED
from ..mapping.token_state import state_size, sums_width
from .grad_phi import grad_phi_warps
from .grad_x import grad_x_warps
from .plan import (
    BF16,
    CHUNK,
    F16,
    GRAD_PHI_WARPS,
    PRODUCERS,
    ROW_TILES,
    STREAMS,
    TILE,
    WARP,
    WARP_CHANNELS,
    Cta,
    Plan,
    Shared,
)
from .producer import producer_warps

WARPGROUP = 4 * WARP
WIDEST = 256  # channels of a rank: a producer lane has 8
MOST_RANKS = 32  # half of them are registers of a producer
LINE = 64  # channels of 128 bytes
FLUSH = 512  # iterations after which the sums of grad_phi go to memory


@dataclass(frozen=True)
class Config:
    """Launch knobs of the persistent kernel.

    Tuned tables store these names. `Plan` and docs/kernels/pre_backward.md have those of the field.
    """

    members: int = knob(reduction_order=True)  # ranks of a group
    teams: int  # CTA groups; members * teams CTAs must be resident together
    lag: int = 2  # pipeline distance
    registers: int = 80  # of a producer thread; 16 fewer with h_res, for at most 16 ranks

    def __post_init__(self) -> None:
        """Reject what cannot launch on any GPU."""
        registers = self.registers % 8 == 0 and 40 <= self.registers <= 168
        rules = {name: (getattr(self, name) >= 2, "at least 2") for name in ("members", "lag")}
        rules["registers"] = registers, "a multiple of 8 from 40 to 168"
        check("pre_backward", self, "teams", **rules)

    @property
    def group(self) -> int:
        """Tokens of a tile."""
        return TILE

    @property
    def sums(self) -> int:
        """Rows of block_sums that the producer warps write."""
        return self.teams * PRODUCERS

    @property
    def mailbox_shape(self) -> tuple[int, ...]:
        """Of the messages between ranks: group, stage, rank, token and stream.

        The stages are a power of two, at least 2 * lag: docs/kernels/pre_backward.md says why.
        """
        stages = 1 << (2 * self.lag - 1).bit_length()
        return self.teams, stages, self.members, TILE * STREAMS

    def mailbox(self, device: torch.device) -> Tensor:
        """Room for the messages, which `token_states` empties."""
        return torch.empty(self.mailbox_shape, dtype=torch.int32, device=device)

    def width(self, C: int) -> int:
        """Channels of a rank."""
        return ceil_div(ceil_div(C, self.members), LINE) * LINE

    def first_threads(self, C: int) -> tuple[int, int, int]:
        """First thread of the grad_phi warps and of the producer warps, and one past the last."""
        threads = self.width(C) // WARP_CHANNELS * WARP
        grad_x = ceil_div(threads, WARPGROUP) * WARPGROUP
        producers = grad_x + GRAD_PHI_WARPS * WARP
        return grad_x, producers, producers + PRODUCERS * WARP

    def registers_of_roles(self, C: int, merge_grad: str = ADDED) -> tuple[int, ...]:
        """Registers of a thread at first, then of grad_x, grad_phi and producer warps."""
        grad_x, _, threads = self.first_threads(C)
        width = self.width(C)
        before = 65536 // threads // 8 * 8
        others = max(24, min(32, 112 - self.registers)) if width > 192 else 48
        grad_phi = width // 16 * ROW_TILES * 4 + others
        # 112 are left to grad_x warps that mix, which is what they take, instead of 104
        fewer = 16 if merge_grad == MIXED and self.members <= 16 else 0
        producing = self.registers - fewer
        left = before * threads - (producing + grad_phi) * WARPGROUP
        return before, min(240, left // grad_x // 8 * 8), grad_phi, producing

    def shared_bytes(self, C: int) -> int:
        """Shared memory of a CTA."""
        tiles = (self.lag + 2) * (STREAMS + 1) + 2 * STREAMS
        rest = WARP * 24 * 2 + 2 * WARP * 8 * 2 + TILE * 8 * 4
        return TILE * tiles * self.width(C) * 2 + rest

    @lru_cache(maxsize=1024)  # noqa: B019 - few configurations, asked for at every launch
    def launches(self, C: int, arch: str) -> bool:
        """Whether shared memory and registers allow the kernel."""
        fits = self.shared_bytes(C) <= shared_limit(arch) and self.width(C) <= WIDEST
        fits = fits and overlaps(arch)  # else no register reallocation
        return fits and self.registers_of_roles(C)[1] >= 96 and self.members <= MOST_RANKS

    def plan(self, C: int, merge_grad: str) -> Plan:
        """The constants of a program."""
        before, *registers = self.registers_of_roles(C, merge_grad)
        return Plan(
            C, self.width(C), self.members, self.teams, self.lag,
            self.mailbox_shape[1], merge_grad, self.first_threads(C), tuple(registers),
            before, T.dynamic("tokens"),
        )  # fmt: skip


@lru_cache(maxsize=1024)
def default_config(problem: Problem, target: Target) -> Config | None:
    """The first of `candidates`; None where it cannot run."""
    return next(candidates(problem, target), None)


def candidates(problem: Problem, target: Target) -> Iterator[Config]:
    """Every configuration worth timing that can launch."""
    C = problem.channels
    if problem.n != STREAMS or C % CHUNK:
        return
    # on sm_100a, where nothing is measured, more than 128 channels spill a word or some
    for width in (256, 192, 128) if target.arch == "sm_90a" else (128, 192, 256):
        ranks = ceil_div(C, width)
        if 2 <= ranks <= target.multiprocessors:
            config = Config(ranks, target.multiprocessors // ranks)
            if config.launches(C, target.arch):
                yield config


@program(WARP_ROLE_CONFIGS)
def persistent_program(C: int, merge_grad_is: str, config: Config, reallocate: bool) -> Any:
    """All of `pre`'s backward from the unfinished state on; the warps of a CTA have roles."""
    plan = config.plan(C, merge_grad_is)
    n, width, tokens, groups = STREAMS, plan.width, plan.tokens, plan.groups
    logits, sums_row, flush_every = logits_per_token(n), sums_width(n), FLUSH
    grad_phi_first, producers_first, threads = plan.first_threads

    @T.prim_func
    def mhc_pre_backward_persistent(
        # first, so that the number of tokens is read from it: products below may wrap at 2^31
        projection: T.Tensor((tokens, logits), F32),
        inv_rms: T.Tensor((tokens,), F32),
        unfinished_state: T.Tensor((tokens, state_size(n)), F32),
        grad_layer_input: T.Tensor((tokens * C,), BF16),
        x: T.Tensor((tokens * (n * C),), BF16),
        merge_grad: T.Tensor((tokens * (n * C),), BF16),
        h_res: T.Tensor((tokens, n * n), F32),
        phi: T.Tensor((logits, n, C), F32),
        alpha: T.Tensor((3,), F32),
        dots_mailbox: T.Tensor(config.mailbox_shape, "int32"),
        grad_x: T.Tensor((tokens * (n * C),), BF16),
        grad_phi_partials: T.Tensor((groups * logits * n * C,), F32),
        block_sums: T.Tensor((groups * PRODUCERS, sums_row), F32),
    ):
        with T.Kernel(plan.ranks, groups, threads=threads) as (rank, group):
            tx = T.get_thread_binding()
            tiles = T.alloc_shared((plan.num_stages, TILE, n + 1, width), BF16)
            staged = T.alloc_shared((2, TILE, n, width), BF16)
            high_low = T.alloc_shared((WARP, ROW_TILES * 8), BF16)
            scaled = T.alloc_shared((2, WARP, 8), F16)
            weights = T.alloc_shared((TILE, 8), F32)
            # a variable, not an expression: the simplifier would expand it into every use
            own = T.alloc_var("int32", (T.ceildiv(tokens, TILE) + groups - 1 - group) // groups)
            iterations = T.alloc_var("int32", T.max(own, 1))  # without tokens sums are zeros
            shared = Shared(tiles, staged, high_low, scaled, weights)
            cta = Cta(group, rank, own, iterations)

            if tx == 0:
                weights[0, n] = 0.0  # see `opaque`
            T.sync_threads()
            if iterations == 0:  # never: that it is here makes the launch cooperative
                T.sync_grid()
            if tx < grad_phi_first:
                grad_x_warps(plan, cta, phi, grad_x, shared, reallocate, tx)
            elif tx < producers_first:
                grad_phi_warps(
                    plan, cta, merge_grad, h_res, grad_phi_partials, shared, flush_every,
                    reallocate, tx,
                )  # fmt: skip
            else:
                saved = (unfinished_state, projection, inv_rms)
                producer_warps(
                    plan, cta, x, grad_layer_input, saved, alpha, dots_mailbox, block_sums, shared,
                    reallocate, tx,
                )  # fmt: skip

    return mhc_pre_backward_persistent


def launch(
    config: Config,
    grad_layer_input: Tensor,
    x: Tensor,
    phi: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    alpha: Tensor,
    unfinished_state: Tensor,
    grad_x_part: Tensor | None,
    h_res: Tensor | None,
    mailbox: Tensor,
    block_sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch the persistent kernel on T >= 1 tokens, bf16.

    `token_states` without grad_h_pre has made `unfinished_state` and emptied `mailbox`.
    `block_sums` [config.sums, sums_width(n)] is written.

    Returns:
        grad_x [T, n, C], bf16, and split-K partials of grad_phi [groups, n*n + 2n, n, C], fp32.
    """
    _, n, C = x.shape
    arch, available = architecture(x.device), count_multiprocessors(x.device)
    fits = n == STREAMS and x.dtype == torch.bfloat16 and config.launches(C, arch)
    if config.members * config.teams > available or not fits:
        raise ValueError(
            f"pre_backward: config must launch for {x.dtype}, n {n}, C {C} on the "
            f"{available} multiprocessors of this {arch} GPU, got {config}"
        )
    grad_x = torch.empty_like(x)
    partials = phi.new_empty(config.teams, phi.shape[0], n, C)
    merge_grad_is = "" if grad_x_part is None else ADDED if h_res is None else MIXED
    kernel = persistent_program(arch, C, merge_grad_is, config, overlaps(arch))
    # what a program leaves unread still has its shape
    merge_grad = x if grad_x_part is None else grad_x_part
    mixing = projection.view(-1)[: len(x) * n * n] if h_res is None else h_res
    kernel(
        projection, inv_rms, unfinished_state, grad_layer_input.view(-1), x.view(-1),
        merge_grad.view(-1), mixing.view(len(x), n * n), phi.view(partials.shape[1:]), alpha,
        mailbox, grad_x.view(-1), partials.view(-1), block_sums,
    )  # fmt: skip
    return grad_x, partials
