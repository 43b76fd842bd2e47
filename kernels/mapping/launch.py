"""The mapping: one pass over x for the projection and the sum of squares, then the maps.

    inv_rms    = 1 / sqrt(mean over n * C of x^2 + norm_eps), 0 where the mean is 0
    projection = (vec(x) @ phi^T) * inv_rms
    logits     = projection * [alpha_pre | alpha_post | alpha_res] + bias
    h_pre      = sigmoid(logits_pre) + pre_eps
    h_post     = post_scale * sigmoid(logits_post)

`project` reads n C elements a token, and phi once a block; it writes n*n + 2n + 1 floats a token
and segment of nC, which `finish` adds in the order of the segments. Segments follow from C alone,
so a token's bits never depend on its neighbours. Squares and their sums are fp32, subnormal numbers
included: a token counts as zero where they vanish, as in the reference. docs/kernels/mapping.md
draws the pipeline.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ..common.architectures import shared_limit
from ..common.knobs import check, knob
from ..common.phi import load_phi, scale_phi
from ..common.problem import Problem, Target
from ..common.programs import (
    F32,
    ITEM_BYTES,
    architecture,
    ceil_div,
    dtype_name,
    logits_per_token,
    macro,
    program,
)
from ..common.projection import (
    WARP,
    WARP_ROLE_CONFIGS,
    Segment,
    add,
    fetch,
    inverse_rms,
    project_tile,
    segment_width,
)
from ..common.sinkhorn_on_chip import sigmoid
from . import simt


@dataclass(frozen=True)
class Config:
    """Launch knobs of both programs; docs/kernels/mapping.md has a table."""

    members: int = knob(reduction_order=True)  # blocks that share nC
    blocks: int  # that share the tokens, at most
    steps: int = knob(4, reduction_order=True)  # pieces of 32 elements that a warp holds
    group: int = knob(16, reduction_order=True)  # tokens of a tile
    ahead: int = 3  # tiles in flight from memory
    warps: int = 4  # of a block of `finish`

    def __post_init__(self) -> None:
        """Reject what cannot launch on any GPU."""
        group, warps = self.group > 0 and self.group % 8 == 0, 1 <= self.warps <= 32
        rules = {"group": (group, "a multiple of 8"), "warps": (warps, "1 to 32")}
        check("mapping", self, "members", "blocks", "steps", "ahead", **rules)

    def segment(self, n: int, C: int) -> Segment:
        """The share of a member."""
        width = segment_width(C, self.members)
        return Segment(n, C, logits_per_token(n), width, self.steps, self.group)

    def launches(self, n: int, C: int, arch: str) -> bool:
        """Whether shared memory and threads allow `project`."""
        segment = self.segment(n, C)
        shared = segment.shared_bytes(self.ahead + 1)
        return shared <= shared_limit(arch) and segment.threads <= 1024


@lru_cache(maxsize=1024)
def default_config(
    problem: Problem, target: Target, *, batch_invariant: bool = False
) -> Config | simt.Config:
    """Segments of about 1024 elements (n = 4), as many tiles in flight as shared memory allows.

    256 channels of every stream at n = 4 are 96 registers a thread for phi. RuntimeError where the
    GPU has too little shared memory for any configuration.
    """
    if not problem.fits_tensor_cores:
        return simt.default_config(problem, target)
    n, C = problem.n, problem.channels
    width = max(32, 1024 // n // ceil_div(logits_per_token(n), 24))
    members = ceil_div(C, width)
    blocks = max(1, target.multiprocessors // members)
    steps = 4 if n <= 4 else 1
    for group in (16, 8):
        # one tile a block: none comes after it
        for ahead in (3, 2, 1) if problem.tokens > group * blocks else (1,):
            config = Config(members, blocks, steps, group, ahead)
            if config.launches(n, C, target.arch):
                return config
    raise RuntimeError(
        f"mapping: the GPU must have more shared memory for n {n}, C {C}, got {target.arch} "
        f"with {shared_limit(target.arch)} bytes a block; run the reference on it"
    )


def candidates(problem: Problem, target: Target) -> Iterator[Config | simt.Config]:
    """Every configuration worth timing that can launch."""
    n, C = problem.n, problem.channels
    default = default_config(problem, target)
    yield default
    if isinstance(default, simt.Config):
        return
    smallest = ceil_div(C, 512)
    counts = {ceil_div(C, width) for width in (192, 224, 256, 320, 512)}
    for members in sorted(counts | {default.members} if n == 4 else {default.members, smallest}):
        for blocks in sorted({max(1, k * target.multiprocessors // members) for k in (1, 2)}):
            for ahead in (1, 2, 3):
                config = Config(members, blocks, default.steps, default.group, ahead)
                if config != default and config.launches(n, C, target.arch):
                    yield config


@program(WARP_ROLE_CONFIGS)
def project_program(
    n: int, C: int, dtype: str, members: int, most_blocks: int, steps: int, group: int, ahead: int
) -> Any:
    """partials[member, token] = [sum x^2, sum phi[r] * x] over the member's segment of nC."""
    G = group
    rows = logits_per_token(n)
    segment = Segment(n, C, rows, segment_width(C, members), steps, G)
    columns, warps, threads = segment.columns, segment.warps, segment.threads
    tokens = T.dynamic("tokens")
    blocks = T.min(most_blocks, T.ceildiv(tokens, G))

    @T.prim_func
    def mhc_project(
        x: T.Tensor((tokens, n, C), dtype),
        phi: T.Tensor((rows, n, C), F32),
        partials: T.Tensor((members, tokens, columns), F32),
    ):
        with T.Kernel(members, blocks, threads=threads) as (member, block):
            tx = T.get_thread_binding()
            x_tile = T.alloc_shared((ahead + 1, G, segment.row), dtype)
            sums = T.alloc_shared((2, warps, G, segment.sums_row), F32)
            fragments = T.alloc_local(*segment.fragments(dtype))
            unscales = T.alloc_local((segment.phi_tiles,), F32)
            total = T.alloc_var(F32, 0.0)
            iterations = T.alloc_var(
                "int32", (T.ceildiv(tokens, G) + most_blocks - 1 - block) // most_blocks
            )

            # x_tile[j] = x[tile j, :, segment]
            for j in T.serial(ahead):
                first = T.cast(j * most_blocks + block, "int64") * G
                fetch(segment, x_tile, j, x, first, member, tx, threads)
                T.ptx_commit_group()
            load_phi(segment, dtype, fragments, phi, member, tx)
            scale_phi(segment, dtype, fragments, unscales)

            # partials[member, token] = [sum x^2, sum phi[r] * x]: sums of a warp of tile j, then
            # those of all warps of tile j - 1
            for j in T.serial(iterations + 1):
                T.ptx_wait_group(ahead - 1)
                T.sync_threads()
                if j + ahead < iterations:
                    first = T.cast((j + ahead) * most_blocks + block, "int64") * G
                    slot = (j + ahead) % (ahead + 1)
                    fetch(segment, x_tile, slot, x, first, member, tx, threads)
                T.ptx_commit_group()
                if j < iterations:
                    slot = j % (ahead + 1)
                    project_tile(segment, dtype, sums, j % 2, fragments, unscales, x_tile, slot, tx)
                if j >= 1:
                    for p in T.serial(ceil_div(G * columns, threads)):
                        entry = p * threads + tx
                        row = entry // columns
                        token = T.cast((j - 1) * most_blocks + block, "int64") * G + row
                        if (entry < G * columns) and (token < tokens):
                            total = sums[(j - 1) % 2, 0, row, entry % columns]
                            for w in T.unroll(1, warps):
                                total = add(total, sums[(j - 1) % 2, w, row, entry % columns])
                            partials[member, token, entry % columns] = total

    return mhc_project


@macro
def gather(totals, scale: T.Ref, partials, token, lane, elements, norm_eps):
    """Scale = inv_rms of a token, totals[q] = its projection[q * 32 + lane - 1]."""
    members, columns = int(partials.shape[0]), int(partials.shape[2])
    # [sum x^2, sum phi[r] * x] = sum over members, in order, a column a lane
    for q in T.unroll(ceil_div(columns, WARP)):
        totals[q] = 0.0
        if q * WARP + lane < columns:
            for m in T.unroll(members):
                totals[q] = add(totals[q], partials[m, token, q * WARP + lane])
    # inv_rms = 1 / sqrt(mean of x^2 + norm_eps)
    scale = T.shfl_sync(totals[0], 0)
    inverse_rms(scale, elements, norm_eps)
    # projection = (vec(x) @ phi^T) * inv_rms
    for q in T.unroll(ceil_div(columns, WARP)):
        totals[q] = totals[q] * scale


@macro
def logit(value: T.Ref, projection, alpha, bias, r, n):
    """Value = projection * [alpha_pre | alpha_post | alpha_res][r] + bias[r]."""
    value = alpha[2]
    if r < 2 * n:
        value = alpha[1]
    if r < n:
        value = alpha[0]
    value = projection * value + bias[r]


@program(WARP_ROLE_CONFIGS)
def finish_program(
    n: int, C: int, members: int, warps: int, norm_eps: float, pre_eps: float, post_scale: float
) -> Any:
    """From the members' partials to the maps, one warp a token."""
    rows = logits_per_token(n)
    lanes = ceil_div(rows + 1, WARP)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def mhc_mapping_finish(
        partials: T.Tensor((members, tokens, rows + 1), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((rows,), F32),
        h_pre: T.Tensor((tokens, n), F32),
        h_post: T.Tensor((tokens, n), F32),
        h_res_logits: T.Tensor((tokens, n * n), F32),
        projection: T.Tensor((tokens, rows), F32),
        inv_rms: T.Tensor((tokens,), F32),
    ):
        with T.Kernel(T.ceildiv(tokens, warps), threads=warps * WARP) as block:
            tx = T.get_thread_binding()
            lane = tx % WARP
            token = T.cast(block, "int64") * warps + tx // WARP
            totals = T.alloc_local((lanes,), F32)
            scale = T.alloc_var(F32, 0.0)
            value = T.alloc_var(F32, 0.0)

            if token < tokens:
                gather(totals, scale, partials, token, lane, n * C, norm_eps)
                if lane == 0:
                    inv_rms[token] = scale
                # logits = projection * [alpha_pre | alpha_post | alpha_res] + bias
                for q in T.unroll(lanes):
                    r = q * WARP + lane - 1
                    if (r >= 0) and (r < rows):
                        projection[token, r] = totals[q]
                        logit(value, totals[q], alpha, bias, r, n)
                        if r >= 2 * n:
                            h_res_logits[token, r - 2 * n] = value
                        value = sigmoid(value)
                        # h_pre = sigmoid(logits_pre) + pre_eps
                        if r < n:
                            h_pre[token, r] = value + pre_eps
                        # h_post = post_scale * sigmoid(logits_post)
                        if (r >= n) and (r < 2 * n):
                            h_post[token, r - n] = value * post_scale

    return mhc_mapping_finish


def project(x: Tensor, phi: Tensor, config: Config) -> Tensor:
    """Launch `project_program` on T >= 1 tokens: partials [members, T, 1 + n*n + 2n], fp32."""
    tokens, n, C = x.shape
    rows = logits_per_token(n)
    assert C % 8 == 0
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert phi.shape == (rows, n * C)
    partials = x.new_empty(config.members, tokens, rows + 1, dtype=torch.float32)
    knobs = config.members, config.blocks, config.steps, config.group, config.ahead
    kernel = project_program(architecture(x.device), n, C, dtype_name(x), *knobs)
    kernel(x, phi.view(rows, n, C), partials)
    return partials


def forward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    norm_eps: float,
    pre_eps: float,
    post_scale: float,
    config: Config | simt.Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the streams to h_pre, h_post and the logits of h_res (eqs. 14-18).

    Args:
        x: [T, n, C], bf16, fp16 or fp32, as all tensors starting at 16 bytes. Residual streams.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        norm_eps: added to the mean of squares, at least 0.
        pre_eps: added to h_pre.
        post_scale: factor of h_post.
        config: launch knobs, which choose the projection's form.

    Returns:
        h_pre [T, n], h_post [T, n], h_res_logits [T, n, n], projection [T, n*n + 2n], inv_rms [T],
        all fp32.
    """
    tokens, n, C = x.shape
    rows = logits_per_token(n)
    h_pre, h_post, h_res_logits, projection = (
        x.new_empty(tokens, columns, dtype=torch.float32) for columns in (n, n, n * n, rows)
    )
    inv_rms = x.new_empty(tokens, dtype=torch.float32)
    if tokens:
        arch = architecture(x.device)
        if isinstance(config, simt.Config):
            partials, warps = simt.project(x, phi, config), config.finish_warps
        else:
            partials, warps = project(x, phi, config), config.warps
        constants = float(norm_eps), float(pre_eps), float(post_scale)
        kernel = finish_program(arch, n, C, partials.shape[0], warps, *constants)
        kernel(partials, alpha, bias, h_pre, h_post, h_res_logits, projection, inv_rms)
    return h_pre, h_post, h_res_logits.view(tokens, n, n), projection, inv_rms


def traffic(problem: Problem) -> int:
    """Bytes that must move forward: x and phi once, the maps."""
    n, C = problem.n, problem.channels
    rows = logits_per_token(n)
    per_token = n * C * ITEM_BYTES[problem.dtype] + 4 * (2 * rows + 1)
    return problem.tokens * per_token + 4 * rows * n * C
