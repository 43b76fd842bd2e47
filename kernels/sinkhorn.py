"""Sinkhorn normalisation of the residual mixing logits (eqs. 9 and 19), and its gradient.

    forward:   M = exp(logits); iters times: M[o, i] /= sum_o M[o, i], M[o, i] /= sum_i M[o, i]
    backward:  each step `after = before / sum`, last to first:
               grad_before = (grad_after - sum over the axis of grad_after * after) / sum

`reference.sinkhorn` says where eps enters. One thread keeps one token's matrix in registers for all
iterations. The backward keeps the sums of the steps, 8 n iters bytes a token, in shared memory and
rebuilds the matrices from them: docs/kernels/sinkhorn.md.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from .common.architectures import LEAST_SHARED_BYTES, shared_limit
from .common.knobs import check
from .common.problem import Problem, Target
from .common.programs import F32, UNGUARDED, architecture, program
from .common.sinkhorn_on_chip import (
    sinkhorn_registers,
    sinkhorn_replay,
    sinkhorn_reverse,
    softmax_out_back,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch knobs, of the forward and of the backward; a thread handles one token."""

    threads: int = 32

    def __post_init__(self):
        check("sinkhorn", self, threads=(self.threads in (32, 64, 128), "32, 64 or 128"))


ITERS = 20  # that candidates have to fit


def default_config(problem: Problem, target: Target, *, batch_invariant: bool = False) -> Config:
    """One warp a block: few tokens, too, spread over many multiprocessors."""
    return Config()


def candidates(problem: Problem, target: Target) -> Iterator[Config]:
    """Configurations worth measuring."""
    for threads in (32, 64, 128):
        backward = problem.kernel == "sinkhorn_backward"
        if not backward or shared_bytes(problem.n, ITERS, threads) <= LEAST_SHARED_BYTES:
            yield Config(threads)


def shared_bytes(n: int, iters: int, threads: int) -> int:
    """Shared memory of a block of the backward: every step's sums."""
    return 4 * 2 * iters * n * threads


@program(UNGUARDED)
def forward_program(n: int, iters: int, eps: float, threads: int) -> Any:
    """One token a thread; see the module's docstring."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def sinkhorn_forward(
        logits: T.Tensor((tokens, n * n), F32), h_res: T.Tensor((tokens, n * n), F32)
    ):
        with T.Kernel(T.ceildiv(tokens, threads), threads=threads) as block:
            token = T.cast(block, "int64") * threads + T.get_thread_binding()
            matrix = T.alloc_local((n * n,), F32)
            if token < tokens:
                for v in T.vectorized(n * n):
                    matrix[v] = logits[token, v]
                # h_res = sinkhorn(logits)
                sinkhorn_registers(matrix, n, iters, eps)
                for v in T.vectorized(n * n):
                    h_res[token, v] = matrix[v]

    return sinkhorn_forward


@program()
def backward_program(n: int, iters: int, eps: float, threads: int) -> Any:
    """One token a thread; see the module's docstring."""
    tokens = T.dynamic("tokens")

    @T.prim_func
    def sinkhorn_backward(
        grad_h_res: T.Tensor((tokens, n, n), F32),
        logits: T.Tensor((tokens, n, n), F32),
        grad_logits: T.Tensor((tokens, n, n), F32),
    ):
        with T.Kernel(T.ceildiv(tokens, threads), threads=threads) as block:
            lane = T.get_thread_binding()
            token = T.cast(block, "int64") * threads + lane
            matrix = T.alloc_local((n, n), F32)
            grad = T.alloc_local((n, n), F32)
            sums = T.alloc_shared((2 * iters, n, threads), F32)
            if token < tokens:
                for o in T.unroll(n):
                    for i in T.vectorized(n):
                        matrix[o, i] = logits[token, o, i]
                    for i in T.vectorized(n):
                        grad[o, i] = grad_h_res[token, o, i]
                # h_res = sinkhorn(logits), then its steps from the last to the first
                sinkhorn_replay(matrix, sums, lane, n, iters, eps)
                sinkhorn_reverse(matrix, grad, sums, lane, n, iters, eps)
                if eps > 0:
                    for o in T.unroll(n):
                        for i in T.vectorized(n):
                            matrix[o, i] = logits[token, o, i]
                    softmax_out_back(matrix, grad, n)
                for o in T.unroll(n):
                    for i in T.vectorized(n):
                        grad_logits[token, o, i] = grad[o, i]

    return sinkhorn_backward


def forward(logits: Tensor, *, iters: int, eps: float, config: Config) -> Tensor:
    """Doubly stochastic matrix by `iters` normalisations of columns, then rows (eqs. 9 and 19).

    `M = exp(logits)`, then `iters` times: `M[o, i] /= sum_o M[o, i]`, `M[o, i] /= sum_i M[o, i]`.

    Args:
        logits: [T, n, n], fp32, contiguous, [out, in].
        iters: at least 1.
        eps: at least 0; added as `reference.sinkhorn` says.
        config: launch knobs.

    Returns:
        h_res: [T, n, n], fp32, [out, in].
    """
    tokens, n, _ = logits.shape
    h_res = torch.empty_like(logits)
    if tokens:
        kernel = forward_program(architecture(logits.device), n, iters, float(eps), config.threads)
        kernel(logits.view(tokens, n * n), h_res.view(tokens, n * n))
    return h_res


def fitting(config: Config, logits: Tensor, iters: int) -> Config:
    """A table's configuration where so many iterations of the backward fit it, else the default."""
    limit = shared_limit(architecture(logits.device))
    return config if shared_bytes(logits.shape[1], iters, config.threads) <= limit else Config()


def backward(
    grad_h_res: Tensor, logits: Tensor, *, iters: int, eps: float, config: Config
) -> Tensor:
    """Gradient of `forward`: the iteration again, then its reverse pass.

    Args:
        grad_h_res: [T, n, n], fp32, contiguous.
        logits: [T, n, n], fp32. What `forward` read.
        iters: as in `forward`.
        eps: as in `forward`.
        config: launch knobs.

    Returns:
        grad_logits: [T, n, n], fp32.

    Raises:
        RuntimeError: The sums of so many iterations do not fit this GPU's shared memory.
    """
    tokens, n, _ = logits.shape
    grad_logits = torch.empty_like(logits)
    if tokens:
        arch = architecture(logits.device)
        limit = shared_limit(arch)
        if shared_bytes(n, iters, config.threads) > limit:
            most = limit // shared_bytes(n, 1, config.threads)
            raise RuntimeError(
                f"sinkhorn: iters must be at most {most} for the backward of {n} streams with "
                f"{config.threads} threads on this GPU, got {iters}"
            )
        kernel = backward_program(arch, n, iters, float(eps), config.threads)
        kernel(grad_h_res, logits, grad_logits)
    return grad_logits


def traffic(problem: Problem) -> int:
    """Bytes that must move, forward or backward."""
    matrices = 2 if problem.kernel == "sinkhorn" else 3
    return problem.tokens * matrices * 4 * problem.n * problem.n
