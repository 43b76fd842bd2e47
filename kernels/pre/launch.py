"""Mapping, Sinkhorn and pre-apply: everything before the layer.

    inv_rms, projection, logits, h_pre, h_post: as in mapping/launch.py
    h_res          = sinkhorn(logits_res as [out, in])
    layer_input[c] = sum_i h_pre[i] * x[i, c]

Many tokens take one persistent launch, persistent.py, which reads x once: (n + 1) * C elements
move. Few tokens, and GPUs that cannot run it, take two launches, (2n + 1) * C elements:
`mapping.project`, then `finish`, which reads x again, the last tokens first: they are in L2. fp32,
and a C that is no multiple of 8, take a launch for each stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ..common.constants import Constants
from ..common.knobs import check, knobs_of
from ..common.problem import Problem, Target
from ..common.programs import (
    F32,
    ITEM_BYTES,
    architecture,
    ceil_div,
    dtype_name,
    logits_per_token,
    program,
)
from ..common.projection import WARP, WARP_ROLE_CONFIGS
from ..common.sinkhorn_on_chip import sigmoid, sinkhorn_registers
from ..mapping import launch as mapping
from . import persistent, simt

PIECE = WARP * 8  # channels that a warp reads at once
# Iterations of the persistent loop from which on one launch is faster than two.
MANY_ITERATIONS = 1.5


@dataclass(frozen=True)
class Config(mapping.Config):
    """Launch knobs of the two launches."""

    splits: int = 1  # warps that share a token's channels in `finish`

    def __post_init__(self) -> None:
        """Reject what cannot launch on any GPU."""
        super().__post_init__()
        check("pre", self, "splits")


@lru_cache(maxsize=1024)
def default_config(
    problem: Problem, target: Target, *, batch_invariant: bool = False
) -> "Config | persistent.Config | simt.Config":
    """One persistent launch for many tokens where the GPU can run it, else two launches.

    The two differ in the last bits of the maps. `batch_invariant` gives every number of tokens the
    form of many.
    """
    if not problem.fits_tensor_cores:
        return simt.default_config(problem, target)
    one = persistent.default_config(problem.at(1), target)
    if one and (batch_invariant or problem.tokens >= MANY_ITERATIONS * one.group * one.teams):
        return one
    # few tokens are split over warps until about 14 warps a multiprocessor run
    pieces = ceil_div(problem.channels, PIECE)
    wanted = 14 * target.multiprocessors // max(problem.tokens, 1)
    # a power of two or all: the number of tokens chooses among few programs
    splits = pieces if wanted >= pieces else 1 << max(0, wanted.bit_length() - 1)
    return _with_splits(mapping.default_config(problem, target), splits)


def _with_splits(base: mapping.Config, splits: int) -> Config:
    return Config(*knobs_of(base), splits=splits)


def candidates(
    problem: Problem, target: Target
) -> "Iterator[Config | persistent.Config | simt.Config]":
    """Every configuration worth timing that can launch."""
    default = default_config(problem, target)
    yield default
    if isinstance(default, simt.Config):
        return
    ahead = mapping.default_config(problem, target).ahead
    one_launch = persistent.default_config(problem.at(1), target) is not None
    splits = {1, 4, getattr(default, "splits", 1), ceil_div(problem.channels, PIECE)}
    for base in mapping.candidates(problem, target):
        if one_launch and base.ahead not in (1, ahead):
            continue  # only few tokens take two launches, and `ahead` hardly changes their time
        for split in sorted(splits):
            config = _with_splits(base, split)
            if config != default:
                yield config
    for config in persistent.candidates(problem, target):
        if config != default:
            yield config


@program(WARP_ROLE_CONFIGS)
def finish_program(
    n: int, C: int, dtype: str, members: int, warps: int, splits: int, constants: Constants
) -> Any:
    """From the split-K partials to the maps, h_res and layer_input, `splits` warps a token."""
    norm_eps, pre_eps, post_scale, manifold = constants
    rows = logits_per_token(n)
    lanes = ceil_div(rows + 1, WARP)
    pieces = ceil_div(ceil_div(C, PIECE), splits)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def mhc_pre_finish(
        x: T.Tensor((tokens, n, C), dtype),
        parts: T.Tensor((members, tokens, rows + 1), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((rows,), F32),
        layer_input: T.Tensor((tokens, C), dtype),
        h_post: T.Tensor((tokens, n), F32),
        h_res: T.Tensor((tokens, n * n), F32),
        projection: T.Tensor((tokens, rows), F32),
        inv_rms: T.Tensor((tokens,), F32),
    ):
        with T.Kernel(T.ceildiv(tokens * splits, warps), threads=warps * WARP) as block:
            tx = T.get_thread_binding()
            lane = tx % WARP
            # from the last token to the first: `project` left the last ones in L2
            order = T.cast(block, "int64") * warps + tx // WARP
            token = tokens - 1 - order // splits
            split = T.cast(order % splits, "int32")
            residual = T.alloc_shared((warps, n * n), F32)
            totals = T.alloc_local((lanes,), F32)
            weights = T.alloc_local((n,), F32)
            x_vector = T.alloc_local((n, 8), dtype)
            applied = T.alloc_local((8,), F32)
            matrix = T.alloc_local((n * n,), F32)
            scale = T.alloc_var(F32, 0.0)
            value = T.alloc_var(F32, 0.0)

            if token >= 0:
                mapping.gather(totals, scale, parts, token, lane, n * C, norm_eps)
                if (split == 0) and (lane == 0):
                    inv_rms[token] = scale
                # logits = projection * [alpha_pre | alpha_post | alpha_res] + bias
                for q in T.unroll(lanes):
                    r = q * WARP + lane - 1
                    if (r >= 0) and (r < rows):
                        if split == 0:
                            projection[token, r] = totals[q]
                        mapping.logit(value, totals[q], alpha, bias, r, n)
                        if (split == 0) and (r >= 2 * n):
                            residual[tx // WARP, r - 2 * n] = value
                        value = sigmoid(value)
                        # h_pre = sigmoid(logits_pre) + pre_eps
                        if r < n:
                            totals[q] = value + pre_eps
                        # h_post = post_scale * sigmoid(logits_post)
                        if (split == 0) and (r >= n) and (r < 2 * n):
                            h_post[token, r - n] = value * post_scale
                for i in T.unroll(n):
                    weights[i] = T.shfl_sync(totals[0], 1 + i)

                # layer_input[c] = sum_i h_pre[i] * x[i, c]
                for p in T.serial(pieces):
                    channel = (split * pieces + p) * PIECE + lane * 8
                    if channel < C:
                        for i in T.unroll(n):
                            for v in T.vectorized(8):
                                x_vector[i, v] = x[token, i, channel + v]
                        for v in T.unroll(8):
                            applied[v] = 0.0
                        for i in T.unroll(n):
                            for v in T.unroll(8):
                                applied[v] += weights[i] * T.cast(x_vector[i, v], F32)
                        for v in T.vectorized(8):
                            layer_input[token, channel + v] = T.cast(applied[v], dtype)

            # h_res = sinkhorn(logits_res): one thread for each token that this block mapped
            T.sync_threads()
            if tx < warps:
                owned = T.cast(block, "int64") * warps + tx
                if (owned % splits == 0) and (owned < T.cast(tokens, "int64") * splits):
                    for v in T.vectorized(n * n):
                        matrix[v] = residual[tx, v]
                    sinkhorn_registers(matrix, n, manifold)
                    for v in T.vectorized(n * n):
                        h_res[tokens - 1 - owned // splits, v] = matrix[v]

    return mhc_pre_finish


def forward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    config: "Config | persistent.Config | simt.Config",
    **constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything before the layer (eqs. 8, 9 and 14-19).

    Args:
        x: [T, n, C], bf16, fp16 or fp32, as all tensors starting at 16 bytes. Residual streams.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        config: launch knobs, whose type chooses the form.
        **constants: those of `reference.pre`, all of them; see `Constants.of`.

    Returns:
        layer_input [T, C] in x's dtype; h_post [T, n], h_res [T, n, n], projection [T, n*n + 2n],
        inv_rms [T], fp32.
    """
    if isinstance(config, simt.Config):
        return simt.forward(x, phi, alpha, bias, Constants.of(**constants), config)
    tokens, n, C = x.shape
    rows = logits_per_token(n)
    layer_input = x.new_empty(tokens, C)
    h_post, h_res, projection = (
        x.new_empty(tokens, columns, dtype=torch.float32) for columns in (n, n * n, rows)
    )
    inv_rms = x.new_empty(tokens, dtype=torch.float32)
    outputs = layer_input, h_post, h_res, projection, inv_rms
    compiled = Constants.of(**constants)
    if tokens:
        if isinstance(config, persistent.Config):
            persistent.launch(config, x, phi, alpha, bias, outputs, compiled)
        else:
            arch = architecture(x.device)
            partials = mapping.project(x, phi, config)
            knobs = config.members, config.warps, config.splits
            kernel = finish_program(arch, n, C, dtype_name(x), *knobs, compiled)
            kernel(x, partials, alpha, bias, *outputs)
    return layer_input, h_post, h_res.view(tokens, n, n), projection, inv_rms


def traffic(problem: Problem) -> int:
    """Bytes that must move forward: x once, phi once."""
    n, C = problem.n, problem.channels
    rows = logits_per_token(n)
    moved = (n + 1) * C * ITEM_BYTES[problem.dtype] + 4 * (n * n + n + rows + 1)
    return problem.tokens * moved + 4 * rows * n * C
