"""mapping, backward: from the cotangents of the three maps to those of x, phi, alpha and bias.

    logits[k]      = alpha[part of k] * projection[k] + bias[k]
    grad_logits    = [grad_h_pre * s' | post_scale * grad_h_post * s' | grad_h_res_logits],
                     s' = sigmoid(logits) * (1 - sigmoid(logits))
    grad_alpha[p]  = sum_t sum_{k in p} grad_logits[t, k] * projection[t, k]
    grad_bias[k]   = sum_t grad_logits[t, k]
    grad_raw[k]    = alpha[part of k] * grad_logits[k] * inv_rms
    radial         = -inv_rms^2 / (n*C) * sum_k alpha[part of k] * grad_logits[k] * projection[k]
    grad_x[i, c]   = sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]
    grad_phi[k, i*C + c] = sum_t grad_raw[t, k] * x[t, i, c]

`gradients.mapping_backward` states the same. Three launches. `tokens_program`, one thread a token,
turns the maps' cotangents into one record of floats a token: grad_raw, h_pre and radial (and, for
`pre`, walks back through Sinkhorn in registers). The programs of `_mapping_columns` form grad_x and
grad_phi from it and add what blocks of tokens summed for alpha and bias. Per token 2 n C elements
and about 3 (n*n + 2n) floats cross device memory, and phi and grad_phi once. A token of zeros has
inv_rms = 0 and so no gradient through the projection.
"""

import tilelang.language as T
import torch
from torch import Tensor

from ._mapping_columns import (
    Config,
    candidates,
    default_config,
    gradients_from_records,
    record_width,
    sums_width,
)
from ._programs import F32, architecture, ceil_div, logits_per_token, program
from ._projection import shared_limit
from ._sinkhorn_walk import sigmoid, sinkhorn_replay, sinkhorn_walk_back

__all__ = ["Config", "backward", "candidates", "default_config", "token_records", "traffic"]

TOKENS_PER_BLOCK = 32


@T.macro
def _maps_back(
    grad_pre, grad_post, grad_res, projection, gate, bias, record, gate_sums, n, constants
):
    """Turn cotangents of h_pre and h_post into those of logits; fill `record` except `radial`.

    The record's grad_raw still lacks the factor inv_rms. `constants`: pre_eps and post_scale.
    """
    value = T.alloc_var(F32)
    for part in T.unroll(3):
        gate_sums[part] = 0.0
    for i in T.unroll(n):
        # h_pre = sigmoid(logits_pre) + pre_eps ; grad_logits = grad_h_pre * s * (1 - s)
        value = sigmoid(projection[i] * gate[0] + bias[i])
        record[logits_per_token(n) + i] = value + constants[0]
        grad_pre[i] *= value * (1.0 - value)
        record[i] = grad_pre[i] * gate[0]
        gate_sums[0] += grad_pre[i] * projection[i]
        # h_post = post_scale * sigmoid(logits_post)
        value = sigmoid(projection[n + i] * gate[1] + bias[n + i])
        grad_post[i] *= constants[1] * value * (1.0 - value)
        record[n + i] = grad_post[i] * gate[1]
        gate_sums[1] += grad_post[i] * projection[n + i]
    for o in T.unroll(n):
        for i in T.unroll(n):
            record[2 * n + o * n + i] = grad_res[o, i] * gate[2]
            gate_sums[2] += grad_res[o, i] * projection[2 * n + o * n + i]


@program()
def tokens_program(channels, n, iters, eps, pre_eps, post_scale):
    """Per token: the maps' cotangents to the record that `_mapping_columns` reads.

    With iters = 0 grad_h_res is the cotangent of the logits already.
    """
    tokens = T.dynamic("tokens")
    logits = logits_per_token(n)
    lanes = TOKENS_PER_BLOCK
    width = record_width(n)
    load = T.unroll if n == 1 else T.vectorized  # 3 floats are no vector

    @T.prim_func
    def mapping_backward_tokens(
        grad_h_pre: T.Tensor((tokens, n), F32),
        grad_h_post: T.Tensor((tokens, n), F32),
        grad_h_res: T.Tensor((tokens, n, n), F32),
        projection: T.Tensor((tokens, logits), F32),
        inv_rms: T.Tensor((tokens,), F32),
        alpha: T.Tensor((3,), F32),
        bias: T.Tensor((logits,), F32),
        records: T.Tensor((tokens, width), F32),
        block_sums: T.Tensor((T.ceildiv(tokens, lanes), sums_width(n)), F32),
    ):
        with T.Kernel(T.ceildiv(tokens, lanes), threads=lanes) as block:
            lane = T.get_thread_binding()
            token = T.alloc_var("int64")
            products = T.alloc_local((logits,), F32)
            grad_pre = T.alloc_local((n,), F32)
            grad_post = T.alloc_local((n,), F32)
            grad_res = T.alloc_local((n, n), F32)
            matrix = T.alloc_local((n, n), F32)
            gate = T.alloc_local((3,), F32)
            gate_sums = T.alloc_local((3,), F32)
            record = T.alloc_local((width,), F32)
            sums = T.alloc_shared((2 * max(iters, 1), n, lanes), F32)
            scale = T.alloc_var(F32)
            present = T.alloc_var(F32)
            value = T.alloc_var(F32)
            token = T.min(block * lanes + lane, tokens - 1)
            scale = inv_rms[token]
            present = T.if_then_else(block * lanes + lane < tokens, 1.0, 0.0)
            for k in load(logits):
                products[k] = projection[token, k]
            for i in T.vectorized(n):
                grad_pre[i] = grad_h_pre[token, i]
            for i in T.vectorized(n):
                grad_post[i] = grad_h_post[token, i]
            for o in T.unroll(n):
                for i in T.vectorized(n):
                    grad_res[o, i] = grad_h_res[token, o, i]
            for part in T.unroll(3):
                gate[part] = alpha[part]
            if iters > 0:
                # logits_res[o, i] = alpha_res * projection[2n + o*n + i] + bias[2n + o*n + i]
                for o in T.unroll(n):
                    for i in T.unroll(n):
                        k = 2 * n + o * n + i
                        matrix[o, i] = products[k] * gate[2] + bias[k]
                sinkhorn_replay(matrix, sums, lane, n, iters, eps)
                sinkhorn_walk_back(matrix, grad_res, sums, lane, n, iters, eps)
            _maps_back(
                grad_pre, grad_post, grad_res, products, gate, bias, record, gate_sums, n,
                (pre_eps, post_scale),
            )  # fmt: skip
            # grad_raw[k] = alpha * grad_logits[k] * inv_rms
            for k in T.unroll(logits):
                record[k] *= scale
            # radial = -inv_rms^2 / (n*C) * sum_k alpha * grad_logits[k] * projection[k]
            value = gate_sums[0] * gate[0] + gate_sums[1] * gate[1] + gate_sums[2] * gate[2]
            record[logits + n] = value * (-1.0 / (n * channels)) * scale * scale
            for k in T.unroll(logits + n + 1, width):
                record[k] = 0.0
            if block * lanes + lane < tokens:
                for k in T.unroll(width // 4):
                    for v in T.vectorized(4):
                        records[token, k * 4 + v] = record[k * 4 + v]
            # grad_bias[k] = sum_t grad_logits[t, k]
            for i in T.unroll(n):
                value = T.warp_reduce_sum(grad_pre[i] * present)
                if lane == 0:
                    block_sums[block, i] = value
                value = T.warp_reduce_sum(grad_post[i] * present)
                if lane == 0:
                    block_sums[block, n + i] = value
                for o in T.unroll(n):
                    value = T.warp_reduce_sum(grad_res[i, o] * present)
                    if lane == 0:
                        block_sums[block, 2 * n + i * n + o] = value
            # grad_alpha[part] = sum_t sum_{k in part} grad_logits[t, k] * projection[t, k]
            for part in T.unroll(3):
                value = T.warp_reduce_sum(gate_sums[part] * present)
                if lane == 0:
                    block_sums[block, logits + part] = value

    return mapping_backward_tokens


def token_records(
    grad_h_pre: Tensor,
    grad_h_post: Tensor,
    grad_h_res: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    channels: int,
    pre_eps: float,
    post_scale: float,
    iters: int = 0,
    sinkhorn_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Launch `tokens_program`.

    Args:
        grad_h_pre: [T, n], fp32, T at least 1.
        grad_h_post: [T, n], fp32.
        grad_h_res: [T, n, n], fp32; the cotangent of the logits instead where iters is 0.
        projection: [T, n*n + 2n], fp32.
        inv_rms: [T], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        channels: C.
        pre_eps: added to the sigmoids of h_pre.
        post_scale: factor of the sigmoids of h_post.
        iters: of Sinkhorn, or 0.
        sinkhorn_eps: see `reference.sinkhorn`.

    Returns:
        records [T, record_width(n)] and, for blocks of tokens, sums [blocks, sums_width(n)], fp32.

    Raises:
        RuntimeError: The sums of so many iterations do not fit this GPU's shared memory.
    """
    tokens, n = grad_h_pre.shape
    arch = architecture(projection.device)
    most = shared_limit(arch) // (4 * 2 * n * TOKENS_PER_BLOCK)
    if iters > most:
        raise RuntimeError(
            f"pre_backward: iters must be at most {most} for {n} streams on this GPU, got {iters}"
        )
    records = projection.new_empty(tokens, record_width(n))
    block_sums = projection.new_empty(ceil_div(tokens, TOKENS_PER_BLOCK), sums_width(n))
    constants = (channels, n, iters, float(sinkhorn_eps), float(pre_eps), float(post_scale))
    kernel = tokens_program(arch, *constants)
    kernel(
        grad_h_pre, grad_h_post, grad_h_res, projection, inv_rms, alpha, bias, records, block_sums
    )
    return records, block_sums


def backward(
    grad_h_pre: Tensor,
    grad_h_post: Tensor,
    grad_h_res_logits: Tensor,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    *,
    pre_eps: float,
    post_scale: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `reference.mapping`; see the module's docstring for the equations.

    Args:
        grad_h_pre: [T, n], fp32. Cotangent of the read-out weights.
        grad_h_post: [T, n], fp32. Cotangent of the write-in weights.
        grad_h_res_logits: [T, n, n], fp32. Cotangent of the logits of h_res, [out, in].
        x: [T, n, C], bf16 or fp16, C a multiple of 8. The residual streams.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        projection: [T, n*n + 2n], fp32. As the forward saved it.
        inv_rms: [T], fp32. As the forward saved it.
        pre_eps: added to the sigmoids of h_pre.
        post_scale: factor of the sigmoids of h_post.
        config: launch knobs; `default_config` if None.

    Returns:
        grad_x in x's dtype; grad_phi, grad_alpha, grad_bias, fp32.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x), *(torch.zeros_like(value) for value in (phi, alpha, bias))
    records, block_sums = token_records(
        grad_h_pre, grad_h_post, grad_h_res_logits, projection, inv_rms, alpha, bias,
        channels=x.shape[2], pre_eps=pre_eps, post_scale=post_scale,
    )  # fmt: skip
    return gradients_from_records(records, block_sums, x, phi, config=config)


def traffic(tokens: int, channels: int, n: int, item_bytes: int = 2) -> dict[str, tuple[int, int]]:
    """Bytes that must move and floating-point operations.

    Returns:
        {"backward": (bytes, flops)}.
    """
    logits = logits_per_token(n)
    per_token = 2 * n * channels * item_bytes + (2 * logits + 1) * 4
    moved = tokens * per_token + 2 * logits * n * channels * 4
    return {"backward": (moved, tokens * n * channels * (4 * logits + 6))}
