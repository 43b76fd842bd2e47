"""The manifold of h_res on chip: Sinkhorn in one thread's registers, forward and backward.

`sinkhorn_registers` is the forward; `sinkhorn_replay` keeps its sums, and `sinkhorn_reverse` goes
back along them. Of a program that calls them only this file reads the manifold's constants.

A token's iteration, for the residual map's logits as [out, in] (`reference.sinkhorn`):

    first iteration, eps > 0:  m = softmax_o(logits) + eps ;  m[o, i] /= sum_i m[o, i] + eps
    first iteration, eps = 0:  m = softmax_i(log_softmax_o(logits))
    iters - 1 times:           m[o, i] /= sum_o m[o, i] + eps ;  m[o, i] /= sum_i m[o, i] + eps

A step `after = before / sum` has `before = after * sum` and

    grad_before = (grad_after - sum_axis grad_after * after) / sum

so the reverse pass needs the sums alone: 2 * iters * n floats a token in shared memory. It
rebuilds the matrix, and where eps is 0 the first softmax with it: `softmax_o(logits)[o, i] =
m[o, i] * sum[o]` for the first iteration's m. Where eps is not 0 that would be `m[o, i] * sum[o] -
eps`, which has no correct digit for small entries, so the softmax is taken again.
"""

import math
from typing import Any

import tilelang.language as T

from .constants import Sinkhorn
from .programs import F32, macro


def reciprocal(value: Any) -> Any:
    """1 / value to 1 ulp in one instruction, 0 for infinity; `1 / value` would be a subroutine."""
    return T.call_extern(F32, "__fdividef", T.float32(1.0), value)


def sigmoid(value: Any) -> Any:
    """1 / (1 + exp(-value)); saturates to 0 and 1 without NaN."""
    return reciprocal(1.0 + T.exp(-value))


def sums_shape(sinkhorn: Sinkhorn | None, n: int, lanes: int) -> tuple[int, int, int]:
    """Shape of the shared memory, fp32, in which `lanes` threads keep their sums."""
    return 2 * sinkhorn.iters if sinkhorn else 2, n, lanes


def logits_again(sinkhorn: Sinkhorn) -> bool:
    """Whether `softmax_out_back`, with the logits, has to follow `sinkhorn_reverse`."""
    return sinkhorn.eps > 0


def sums_fit(sinkhorn: Sinkhorn, n: int, lanes: int, shared_bytes: int) -> bool:
    """Whether shared memory holds the sums of `lanes` threads."""
    return 4 * math.prod(sums_shape(sinkhorn, n, lanes)) <= shared_bytes


def check_sums(op: str, sinkhorn: Sinkhorn, n: int, lanes: int, shared_bytes: int) -> None:
    """Reject more iterations than shared memory holds the sums of."""
    if not sums_fit(sinkhorn, n, lanes, shared_bytes):
        most = shared_bytes // (4 * math.prod(sums_shape(Sinkhorn(1, 0.0), n, lanes)))
        raise RuntimeError(
            f"{op}: iters must be at most {most} for the backward of {n} streams with {lanes} "
            f"threads a block on this GPU, got {sinkhorn.iters}"
        )


@macro
def sinkhorn_registers(matrix, n, sinkhorn):
    """Turn the logits in `matrix[out * n + in]`, registers, into h_res; a thread, a token."""
    iters, eps = sinkhorn
    scale = T.alloc_var(F32, 0.0)
    total = T.alloc_var(F32, 0.0)
    if eps == 0:
        # M[o, i] = logits[o, i] - log sum_o exp(logits[o, i])
        for i in T.unroll(n):
            column_maximum(matrix, scale, n, i)
            total = 0.0
            for o in T.unroll(n):
                matrix[o * n + i] = matrix[o * n + i] - scale
                total = total + T.exp(matrix[o * n + i])
            total = T.log(total)
            for o in T.unroll(n):
                matrix[o * n + i] = matrix[o * n + i] - total
        # M[o, i] = exp(M[o, i] - max_i M[o, i]) ; M[o, i] /= sum_i M[o, i]
        for o in T.unroll(n):
            scale = matrix[o * n]
            for i in T.unroll(1, n):
                scale = T.max(scale, matrix[o * n + i])
            for i in T.unroll(n):
                matrix[o * n + i] = T.exp(matrix[o * n + i] - scale)
    else:
        # M = exp(logits - column maximum) ; M[o, i] = M[o, i] / sum_o M[o, i] + eps
        for i in T.unroll(n):
            column_maximum(matrix, scale, n, i)
            total = 0.0
            for o in T.unroll(n):
                matrix[o * n + i] = T.exp(matrix[o * n + i] - scale)
                total = total + matrix[o * n + i]
            total = reciprocal(total)
            for o in T.unroll(n):
                matrix[o * n + i] = matrix[o * n + i] * total + eps
    # M[o, i] /= sum_i M[o, i] + eps
    normalise(matrix, scale, n, n, 1, eps)
    for _ in T.serial(iters - 1):
        # M[o, i] /= sum_o M[o, i] + eps
        normalise(matrix, scale, n, 1, n, eps)
        # M[o, i] /= sum_i M[o, i] + eps
        normalise(matrix, scale, n, n, 1, eps)


@macro
def column_maximum(matrix, scale: T.Ref, n, i):
    """Scale = max_o M[o, i]."""
    scale = matrix[i]
    for o in T.unroll(1, n):
        scale = T.max(scale, matrix[o * n + i])


@macro
def normalise(matrix, scale: T.Ref, n, line_stride, item_stride, eps):
    """Divide every line (a row: strides n, 1; a column: strides 1, n) by its sum + eps."""
    for line in T.unroll(n):
        scale = matrix[line * line_stride] + eps
        for item in T.unroll(1, n):
            scale = scale + matrix[line * line_stride + item * item_stride]
        scale = reciprocal(scale)
        for item in T.unroll(n):
            index = line * line_stride + item * item_stride
            matrix[index] = matrix[index] * scale


@macro
def softmax_out(matrix, n):
    """Turn the logits in `matrix` [n, n], registers, into softmax_o(logits)."""
    peak = T.alloc_var(F32)
    total = T.alloc_var(F32)
    for i in T.unroll(n):
        peak = matrix[0, i]
        for o in T.unroll(1, n):
            peak = T.max(peak, matrix[o, i])
        total = 0.0
        for o in T.unroll(n):
            matrix[o, i] = T.exp(matrix[o, i] - peak)
            total += matrix[o, i]
        total = reciprocal(total)
        for o in T.unroll(n):
            matrix[o, i] *= total


@macro
def sinkhorn_replay(matrix, sums, lane, n, sinkhorn):
    """Turn the logits in `matrix` [n, n], registers, into h_res and keep every step's sums.

    In `sums` [2 * iters, n, lanes], shared memory, row 2 * step receives the sums over out, row
    2 * step + 1 those over in; row 0 is left alone.
    """
    iters, eps = sinkhorn
    peak = T.alloc_var(F32)
    total = T.alloc_var(F32)
    inverse = T.alloc_var(F32)
    # columns: m = softmax_o(logits) + eps, or log_softmax_o(logits) where eps is 0
    if eps == 0:
        for i in T.unroll(n):
            peak = matrix[0, i]
            for o in T.unroll(1, n):
                peak = T.max(peak, matrix[o, i])
            total = 0.0
            for o in T.unroll(n):
                matrix[o, i] = matrix[o, i] - peak
                total += T.exp(matrix[o, i])
            total = T.log(total)
            for o in T.unroll(n):
                matrix[o, i] = matrix[o, i] - total
    else:
        softmax_out(matrix, n)
        for o in T.unroll(n):
            for i in T.unroll(n):
                matrix[o, i] = matrix[o, i] + eps
    # rows: m[o, i] /= sum_i m[o, i] + eps, or softmax_i(m) where eps is 0
    for o in T.unroll(n):
        if eps == 0:
            peak = matrix[o, 0]
            for i in T.unroll(1, n):
                peak = T.max(peak, matrix[o, i])
            total = 0.0
            for i in T.unroll(n):
                matrix[o, i] = T.exp(matrix[o, i] - peak)
                total += matrix[o, i]
            sums[1, o, lane] = total * T.exp(peak)
        else:
            total = eps
            for i in T.unroll(n):
                total += matrix[o, i]
            sums[1, o, lane] = total
        inverse = reciprocal(total)
        for i in T.unroll(n):
            matrix[o, i] *= inverse
    # m[o, i] /= sum_o m[o, i] + eps ; m[o, i] /= sum_i m[o, i] + eps
    for step in T.serial(1, iters):
        for i in T.unroll(n):
            total = eps
            for o in T.unroll(n):
                total += matrix[o, i]
            sums[2 * step, i, lane] = total
            inverse = reciprocal(total)
            for o in T.unroll(n):
                matrix[o, i] *= inverse
        for o in T.unroll(n):
            total = eps
            for i in T.unroll(n):
                total += matrix[o, i]
            sums[2 * step + 1, o, lane] = total
            inverse = reciprocal(total)
            for i in T.unroll(n):
                matrix[o, i] *= inverse


@macro
def sinkhorn_reverse(matrix, grad, sums, lane, n, sinkhorn):
    """Turn the cotangent of h_res in `grad` [n, n], registers, into that of the logits.

    Where eps is not 0 it becomes that of softmax_o(logits): call `softmax_out_back` then. `matrix`
    and `sums` are as `sinkhorn_replay` left them; the steps in `matrix` are undone.
    """
    iters, eps = sinkhorn
    total = T.alloc_var(F32)
    dot = T.alloc_var(F32)
    inverse = T.alloc_var(F32)
    for back in T.serial(iters - 1):
        step = iters - 1 - back
        # rows: grad = (grad - sum_i grad * m) / sum ; m *= sum
        for o in T.unroll(n):
            total = sums[2 * step + 1, o, lane]
            inverse = reciprocal(total)
            dot = 0.0
            for i in T.unroll(n):
                dot += grad[o, i] * matrix[o, i]
            for i in T.unroll(n):
                grad[o, i] = (grad[o, i] - dot) * inverse
                matrix[o, i] *= total
        # columns: grad = (grad - sum_o grad * m) / sum ; m *= sum
        for i in T.unroll(n):
            total = sums[2 * step, i, lane]
            inverse = reciprocal(total)
            dot = 0.0
            for o in T.unroll(n):
                dot += grad[o, i] * matrix[o, i]
            for o in T.unroll(n):
                grad[o, i] = (grad[o, i] - dot) * inverse
                matrix[o, i] *= total
    # first rows: as above, or grad = m * (grad - sum_i grad * m) where eps is 0 ; m *= sum
    for o in T.unroll(n):
        total = sums[1, o, lane]
        inverse = reciprocal(total)
        dot = 0.0
        for i in T.unroll(n):
            dot += grad[o, i] * matrix[o, i]
        for i in T.unroll(n):
            if eps == 0:
                grad[o, i] = matrix[o, i] * (grad[o, i] - dot)
            else:
                grad[o, i] = (grad[o, i] - dot) * inverse
            matrix[o, i] *= total
    if eps == 0:
        # first columns: grad = grad - m * sum_o grad
        for i in T.unroll(n):
            dot = 0.0
            for o in T.unroll(n):
                dot += grad[o, i]
            for o in T.unroll(n):
                grad[o, i] = grad[o, i] - matrix[o, i] * dot


@macro
def softmax_out_back(matrix, grad, n):
    """Turn the cotangent of softmax_o(logits) in `grad` into that of the logits in `matrix`."""
    dot = T.alloc_var(F32)
    softmax_out(matrix, n)
    # grad = m * (grad - sum_o grad * m)
    for i in T.unroll(n):
        dot = 0.0
        for o in T.unroll(n):
            dot += grad[o, i] * matrix[o, i]
        for o in T.unroll(n):
            grad[o, i] = matrix[o, i] * (grad[o, i] - dot)
