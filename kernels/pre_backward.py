"""pre, backward: from the cotangents of layer_input, h_post and h_res to x, phi, alpha and bias.

    grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]
    grad_h_res_logits = Sinkhorn's gradient, then all of mapping's: see `mapping_backward`
    grad_x[i, c]  = h_pre[i] * grad_layer_input[c] + grad_x_part[i, c]
                    + sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]

`gradients.pre_backward` states the same. grad_x_part is what merge's backward left of grad_x at a
boundary, so grad_x is written once, complete. grad_x needs grad_h_pre, a sum over the whole token,
so x is needed twice. Four launches: the dot products ((n + 1) C elements a token read), the tokens'
records, the columns ((2n + 1) C read, n C written) and the ordered sum of grad_phi's parts: 18 C at
n = 4, where 13 C is the floor. One pass that keeps x on chip reached 13 C of device memory traffic
and was slower: 234 us against 211 (8192 x 2560, H200, 2026-11-22).
"""

import tilelang.language as T
import torch
from torch import Tensor

from ._mapping_columns import Config, candidates, default_config, gradients_from_records
from ._programs import F32, architecture, dtype_name, logits_per_token, program
from .mapping_backward import token_records

__all__ = ["Config", "backward", "candidates", "default_config", "traffic"]

VECTOR = 8  # channels a thread loads at once


@program()
def dots_program(channels, n, dtype, threads):
    """One token a block; its n sums stay in per-lane registers over the whole row."""
    tokens = T.dynamic("tokens")
    tile = threads * VECTOR

    @T.prim_func
    def pre_backward_dots(
        grad_layer_input: T.Tensor((tokens, channels), dtype),
        x: T.Tensor((tokens, n, channels), dtype),
        grad_h_pre: T.Tensor((tokens, n), F32),
    ):
        with T.Kernel(tokens, threads=threads) as token:
            grad = T.alloc_fragment((tile,), dtype)
            streams = T.alloc_fragment((n, tile), dtype)
            totals = T.alloc_fragment((n,), F32)
            dots = T.alloc_reducer((n,), F32, op="sum")
            T.reducer_init(dots)
            for step in T.serial(T.ceildiv(channels, tile)):
                first = step * tile
                T.copy(grad_layer_input[token, first : first + tile], grad)
                T.copy(x[token, 0:n, first : first + tile], streams)
                # grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]
                for i, c in T.Parallel(n, tile):
                    T.reducer_update(dots[i], T.cast(grad[c], F32) * T.cast(streams[i, c], F32))
            T.finalize_reducer(dots, totals)
            T.copy(totals, grad_h_pre[token, 0:n])

    return pre_backward_dots


def _dots(grad_layer_input: Tensor, x: Tensor) -> Tensor:
    """grad_h_pre [T, n], fp32. One warp a token; few tokens: several warps share a row."""
    tokens, n, channels = x.shape
    threads = 32 if tokens >= 1024 else 256
    grad_h_pre = torch.empty(tokens, n, dtype=torch.float32, device=x.device)
    kernel = dots_program(architecture(x.device), channels, n, dtype_name(x), threads)
    kernel(grad_layer_input, x, grad_h_pre)
    return grad_h_pre


def backward(
    grad_layer_input: Tensor,
    grad_h_post: Tensor,
    grad_h_res: Tensor,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    grad_x_part: Tensor | None = None,
    *,
    pre_eps: float,
    post_scale: float,
    iters: int,
    sinkhorn_eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `reference.pre`; see the module's docstring for the equations.

    Args:
        grad_layer_input: [T, C] in x's dtype. Cotangent of what the layer read.
        grad_h_post: [T, n], fp32. Cotangent of the write-in weights.
        grad_h_res: [T, n, n], fp32. Cotangent of the residual mixing, [out, in].
        x: [T, n, C], bf16 or fp16, C a multiple of 8. The residual streams.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        projection: [T, n*n + 2n], fp32. As the forward saved it.
        inv_rms: [T], fp32. As the forward saved it.
        grad_x_part: [T, n, C] in x's dtype, added to grad_x if given.
        pre_eps: added to the sigmoids of h_pre.
        post_scale: factor of the sigmoids of h_post.
        iters: of Sinkhorn, at least 1.
        sinkhorn_eps: see `reference.sinkhorn`.
        config: launch knobs of the columns; `default_config` if None.

    Returns:
        grad_x in x's dtype; grad_phi, grad_alpha, grad_bias, fp32.

    Raises:
        RuntimeError: The sums of so many iterations do not fit this GPU's shared memory.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x), *(torch.zeros_like(value) for value in (phi, alpha, bias))
    grad_maps = (_dots(grad_layer_input, x), grad_h_post, grad_h_res)
    records, block_sums = token_records(
        *grad_maps, projection, inv_rms, alpha, bias,
        channels=x.shape[2], pre_eps=pre_eps, post_scale=post_scale,
        iters=iters, sinkhorn_eps=sinkhorn_eps,
    )  # fmt: skip
    return gradients_from_records(
        records, block_sums, x, phi, grad_layer_input, grad_x_part, config
    )


def traffic(
    tokens: int, channels: int, n: int, item_bytes: int = 2, *, with_part: bool = False
) -> dict[str, tuple[int, int]]:
    """Bytes that must move if x is read once, and floating-point operations.

    Returns:
        {"backward": (bytes, flops)}.
    """
    logits = logits_per_token(n)
    per_token = (2 * n + 1 + n * int(with_part)) * channels * item_bytes
    per_token += (2 * logits - n + 1) * 4
    moved = tokens * per_token + 2 * logits * n * channels * 4
    return {"backward": (moved, tokens * n * channels * (4 * logits + 10))}
