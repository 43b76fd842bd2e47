"""The projection by fp32 multiply-adds, for x and C that do not fit the tensor cores.

    partials[member, token] = [sum x^2, sum phi[r] * x] over the member's segment of nC

It reads n C elements a token, and phi once a block: a block's share of phi stays in L1, and a warp
holds the sums of a few tokens, so that one load of phi serves them all. phi stays fp32: the only
errors are those of fp32 sums. Segments follow from nC, a token's bits from the token and nC.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ..common.knobs import knob
from ..common.problem import Problem, Target
from ..common.programs import (
    F32,
    UNGUARDED,
    architecture,
    ceil_div,
    dtype_name,
    logits_per_token,
    macro,
    program,
)

WARP = 32
MOST_ROWS = 24  # of phi in one warp


@dataclass(frozen=True)
class Config:
    """Launch knobs."""

    members: int = knob(reduction_order=True)  # segments of nC
    blocks: int  # that share the tokens, at most
    warps: int  # each takes one share of phi's rows and `group` tokens at a time
    group: int = knob(reduction_order=True)  # tokens of a warp
    finish_warps: int = 4  # of a block of `finish`


@lru_cache(maxsize=1024)
def default_config(problem: Problem, target: Target) -> Config:
    """Segments of at most 1024 elements (n = 4), one block a multiprocessor.

    A segment of phi is then at most 98 KB (n = 8: 512 elements, 164 KB), to stay in L1, and 12
    warps have 168 registers a thread, of which the sums of 4 tokens take 100.
    """
    n = problem.n
    members = ceil_div(n * problem.channels, 1024 if n <= 4 else 512)
    return Config(members, max(1, target.multiprocessors // members), 12, 4 if n >= 4 else 8)


@macro
def scatter_sums(values, lane, half):
    """Lane l is left with the sum over the warp of values[l], in values[0].

    Each step trades one half of what a lane holds for the other half of its partner's: 31 shuffles
    where 32 sums of their own would take 160.
    """
    upper = (lane // half) % 2 == 1
    for v in T.unroll(half):
        given = T.if_then_else(upper, values[v], values[half + v])
        kept = T.if_then_else(upper, values[half + v], values[v])
        values[v] = kept + T.shfl_xor(given, half)
    if half > 1:
        scatter_sums(values, lane, half // 2)


@program(UNGUARDED)
def project_program(
    n: int, C: int, dtype: str, members: int, most_blocks: int, warps: int, group: int
) -> Any:
    """One share of phi's rows and `group` tokens a warp; see the module's docstring."""
    elements, columns = n * C, logits_per_token(n) + 1
    shares = ceil_div(columns - 1, MOST_ROWS)
    rows = (columns - 1) // shares
    width = math.gcd(elements, 4)
    step_width = WARP * width
    steps = ceil_div(ceil_div(elements, members), step_width)
    tokens = T.dynamic("tokens")
    blocks = T.min(most_blocks, T.ceildiv(T.ceildiv(tokens, group) * shares, warps))

    @T.prim_func
    def mhc_project_simt(
        x: T.Tensor((tokens, elements), dtype),
        phi: T.Tensor((columns - 1, elements), F32),
        partials: T.Tensor((members, tokens, columns), F32),
    ):
        with T.Kernel(members, blocks, threads=warps * WARP) as (member, block):
            tx = T.get_thread_binding()
            lane = tx % WARP
            x_vector = T.alloc_local((group, width), dtype)
            phi_vector = T.alloc_local((width,), F32)
            sums = T.alloc_local((group, rows + 1), F32)
            column = T.alloc_local((WARP,), F32)
            iterations = T.alloc_var(
                "int32",
                (T.ceildiv(T.ceildiv(tokens, group) * shares, warps) + most_blocks - 1 - block)
                // most_blocks,
            )

            # partials[member, token] = [sum x^2, sum phi[r] * x], a warp `group` tokens
            for j in T.serial(iterations):
                task = T.cast(j * most_blocks + block, "int64") * warps + tx // WARP
                token = task // shares * group
                first_row = T.cast(task % shares, "int32") * rows
                if token < tokens:
                    for g in T.unroll(group):
                        for r in T.unroll(rows + 1):
                            sums[g, r] = 0.0
                    for step in T.serial(steps):
                        k = (member * steps + step) * step_width + lane * width
                        if k < elements:
                            # a tail repeats the last token, and does not store it
                            for g in T.unroll(group):
                                for v in T.vectorized(width):
                                    x_vector[g, v] = x[T.min(token + g, tokens - 1), k + v]
                            # sum x^2
                            for g in T.unroll(group):
                                for v in T.unroll(width):
                                    value = T.cast(x_vector[g, v], F32)
                                    sums[g, 0] += value * value
                            # sum phi[r] * x
                            for r in T.unroll(rows):
                                for v in T.vectorized(width):
                                    phi_vector[v] = phi[first_row + r, k + v]
                                for g in T.unroll(group):
                                    for v in T.unroll(width):
                                        sums[g, 1 + r] += (
                                            T.cast(x_vector[g, v], F32) * phi_vector[v]
                                        )
                    for g in T.unroll(group):
                        for r in T.unroll(WARP):
                            column[r] = sums[g, r] if r <= rows else 0.0
                        scatter_sums(column, lane, WARP // 2)
                        stored = (lane <= rows) and ((lane > 0) or (first_row == 0))
                        if stored and (token + g < tokens):
                            partials[member, token + g, first_row + lane] = column[0]

    return mhc_project_simt


def project(x: Tensor, phi: Tensor, config: Config) -> Tensor:
    """Launch `project_program` on T >= 1 tokens: partials [members, T, 1 + n*n + 2n], fp32."""
    tokens, n, C = x.shape
    rows = logits_per_token(n)
    assert phi.shape == (rows, n * C)
    partials = x.new_empty(config.members, tokens, rows + 1, dtype=torch.float32)
    knobs = config.members, config.blocks, config.warps, config.group
    kernel = project_program(architecture(x.device), n, C, dtype_name(x), *knobs)
    kernel(x.view(tokens, n * C), phi, partials)
    return partials
