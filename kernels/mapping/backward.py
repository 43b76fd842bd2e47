"""mapping, backward: from the cotangents of the three maps to those of x, phi, alpha and bias.

    logits[k]      = alpha[gate of k] * projection[k] + bias[k]
    grad_logits    = [grad_h_pre * s' | post_scale * grad_h_post * s' | grad_h_res_logits],
                     s' = sigmoid(logits) * (1 - sigmoid(logits))
    grad_alpha[g]  = sum_t sum_{k of g} grad_logits[t, k] * projection[t, k]
    grad_bias[k]   = sum_t grad_logits[t, k]
    grad_raw[k]    = alpha[gate of k] * grad_logits[k] * inv_rms
    radial         = -inv_rms^2 / (n*C) * sum_k alpha[gate of k] * grad_logits[k] * projection[k]
    grad_x[i, c]   = sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]
    grad_phi[k, i*C + c] = sum_t grad_raw[t, k] * x[t, i, c]

Three launches: `token_state_program` turns the maps' cotangents into one state a token,
`grad_x_program` forms grad_x and split-K partials of grad_phi from it, and `add_partials_program`
adds those, and what blocks of tokens summed for alpha and bias, in a fixed order. Per token 2 n C
elements and about 3 (n*n + 2n) floats cross device memory, and phi and grad_phi once. A token of
zeros has inv_rms = 0 and so no gradient through the projection. `radial` is fp32: where norm_eps is
0 and |x| below 1e-20, it leaves the range for gradients of size 1, and grad_x is not finite.
"""

from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from ..common.architectures import overlaps
from ..common.problem import Problem
from ..common.programs import (
    F32,
    ITEM_BYTES,
    architecture,
    dtype_name,
    logits_per_token,
    program,
)
from .grad_x_pass import (
    ADDED,
    MIXED,
    Config,
    candidates,
    default_config,
    grad_x_program,
)
from .token_state import sums_width, token_states

__all__ = ["Config", "backward", "candidates", "default_config", "traffic"]


@program()
def add_partials_program(size: int, n: int, groups: int, overlap: bool) -> Any:
    """Add the groups' partials of grad_phi and, in one more block, the tokens' sums, in order."""
    blocks = T.dynamic("blocks")
    logits, lanes, threads = logits_per_token(n), sums_width(n), 256
    quads = lanes // 4  # threads that share a row of the sums
    rows, ahead = threads // quads, 8
    tile = threads * 4

    @T.prim_func
    def mapping_backward_add_partials(
        grad_phi_partials: T.Tensor((groups, size), F32),
        block_sums: T.Tensor((blocks, lanes), F32),
        grad_phi: T.Tensor((size,), F32),
        grad_bias: T.Tensor((logits,), F32),
        grad_alpha: T.Tensor((3,), F32),
    ):
        with T.Kernel(T.ceildiv(size, tile) + 1, threads=threads) as block:
            total = T.alloc_fragment((tile,), F32)
            partial = T.alloc_fragment((tile,), F32)
            column_sums = T.alloc_shared((rows, lanes), F32)
            quad = T.alloc_local((4,), F32)
            value = T.alloc_var(F32)
            thread = T.get_thread_binding()
            if overlap:
                T.pdl_sync()
            if block > 0:
                # grad_phi[k, i*C + c] = sum over groups of their partials
                T.clear(total)
                for g in T.unroll(groups):
                    T.copy(grad_phi_partials[g, (block - 1) * tile : block * tile], partial)
                    for c in T.Parallel(tile):
                        total[c] += partial[c]
                T.copy(total, grad_phi[(block - 1) * tile : block * tile])
            else:
                # grad_bias, grad_alpha = sum over blocks of tokens of their sums
                for v in T.unroll(4):
                    quad[v] = 0.0
                if thread < rows * quads:
                    for b in T.serial(T.ceildiv(blocks, rows * ahead)):
                        for a in T.unroll(ahead):
                            row = (b * ahead + a) * rows + thread // quads
                            if row < blocks:
                                for v in T.vectorized(4):
                                    quad[v] += block_sums[row, thread % quads * 4 + v]
                    for v in T.vectorized(4):
                        column_sums[thread // quads, thread % quads * 4 + v] = quad[v]
                T.sync_threads()
                if thread < logits + 3:
                    value = 0.0
                    for row in T.serial(rows):
                        value += column_sums[row, thread]
                    if thread < logits:
                        grad_bias[thread] = value
                    else:
                        grad_alpha[thread - logits] = value

    return mapping_backward_add_partials


def gradients_from_states(
    states: Tensor,
    block_sums: Tensor,
    x: Tensor,
    phi: Tensor,
    grad_layer_input: Tensor | None = None,
    grad_x_part: Tensor | None = None,
    h_res: Tensor | None = None,
    *,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `grad_x_program` and `add_partials_program` on T >= 1 tokens.

    `states` and `block_sums` are those of `token_states`, for `pre` completed. A term whose tensor
    is None is left out. With h_res `sum_o h_res[o, i] * grad_x_part[o, c]` replaces grad_x_part.

    Returns:
        grad_x [T, n, C] in x's dtype; grad_phi, grad_alpha [3], grad_bias [n*n + 2n], fp32.
    """
    tokens, n, C = x.shape
    logits = phi.shape[0]
    grad_x = torch.empty_like(x)
    partials = phi.new_empty(config.groups, logits, n, C)
    part = "" if grad_x_part is None else ADDED if h_res is None else MIXED
    terms = (grad_layer_input is not None, part)
    # what a program does not read still has its shape
    if grad_layer_input is None:
        grad_layer_input = x.view(-1)[: tokens * C].view(tokens, C)
    if h_res is None:
        h_res = states.view(-1)[: tokens * n * n].view(tokens, n, n)
    arch = architecture(x.device)
    kernel = grad_x_program(arch, C, n, dtype_name(x), *terms, overlaps(arch), config)
    part_of_x = x if grad_x_part is None else grad_x_part
    inputs = (x, grad_layer_input, part_of_x, h_res, states, phi.view(logits, n, C))
    kernel(*inputs, grad_x, partials)
    return grad_x, *add_partials(partials, block_sums, phi)


def add_partials(
    partials: Tensor, block_sums: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `add_partials_program`: grad_phi, grad_alpha [3], grad_bias [n*n + 2n], fp32.

    `partials` of grad_phi are [groups, n*n + 2n, n, C]; of phi only the shape counts.
    """
    groups, logits, n, _ = partials.shape
    arch = architecture(phi.device)
    grad_phi = torch.empty_like(phi)
    grad_alpha, grad_bias = phi.new_empty(3), phi.new_empty(logits)
    kernel = add_partials_program(arch, phi.numel(), n, groups, overlaps(arch))
    kernel(partials.view(groups, -1), block_sums, grad_phi.view(-1), grad_bias, grad_alpha)
    return grad_phi, grad_alpha, grad_bias


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
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `reference.mapping`; see the module's docstring for the equations.

    Args:
        grad_h_pre: [T, n], fp32. Cotangent of the read-out weights.
        grad_h_post: [T, n], fp32. Cotangent of the write-in weights.
        grad_h_res_logits: [T, n, n], fp32. Cotangent of the logits of h_res, [out, in].
        x: [T, n, C], bf16, fp16 or fp32. The residual streams.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        projection: [T, n*n + 2n], fp32. As the forward saved it.
        inv_rms: [T], fp32. As the forward saved it.
        pre_eps: added to the sigmoids of h_pre.
        post_scale: factor of the sigmoids of h_post.
        config: launch knobs.

    Returns:
        grad_x in x's dtype; grad_phi, grad_alpha, grad_bias, fp32.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x), *(torch.zeros_like(value) for value in (phi, alpha, bias))
    states, block_sums = token_states(
        grad_h_pre, grad_h_post, grad_h_res_logits, projection, inv_rms, alpha, bias,
        C=x.shape[2], pre_eps=pre_eps, post_scale=post_scale,
    )  # fmt: skip
    return gradients_from_states(states, block_sums, x, phi, config=config)


def traffic(problem: Problem) -> int:
    """Bytes that must move."""
    n, C = problem.n, problem.channels
    logits = logits_per_token(n)
    per_token = 2 * n * C * ITEM_BYTES[problem.dtype] + (2 * logits + 1) * 4
    return problem.tokens * per_token + 2 * logits * n * C * 4
