"""pre, backward: from the cotangents of layer_input, h_post and h_res to x, phi, alpha and bias.

    grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]
    grad_h_res_logits = Sinkhorn's gradient, then all of mapping's: see mapping/backward.py
    grad_x[i, c]  = h_pre[i] * grad_layer_input[c] + grad_x_part[i, c]
                    + sum_k grad_raw[k] * phi[k, i*C + c] + radial * x[i, c]

grad_x_part is what merge's backward computed of grad_x. With h_res it is merge's own cotangent,
grad_x_next, and sum_o h_res[o, i] * grad_x_part[o, c] is added. Many tokens take one persistent
launch, which reads x once: 13 C elements a token move at n = 4. Two passes take the dot products,
dots.py, and then the grad_x / grad_phi pass of mapping: 18 C. docs/kernels/pre_backward.md says
when, and in which order they are launched.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.constants import Constants
from ..common.problem import Problem, Target
from ..common.programs import ITEM_BYTES, logits_per_token, multiprocessors
from ..mapping import grad_x_pass
from ..mapping.backward import add_partials, gradients_from_states
from ..mapping.grad_x_pass import Config
from ..mapping.token_state import token_states
from . import dots, persistent

__all__ = ["Config", "backward", "candidates", "default_config", "traffic"]

# Iterations of the persistent loop from which on one pass is faster than two.
MANY_ITERATIONS = 16


def default_config(
    problem: Problem, target: Target, *, batch_invariant: bool = False
) -> Config | persistent.Config:
    """One persistent launch for many tokens where the GPU can run it, else two passes over x.

    They add the dot products in another order. `batch_invariant` gives every number of tokens the
    form of many.
    """
    if problem.dtype == "bfloat16":
        one = persistent.default_config(problem.at(1), target)
        if one and (batch_invariant or problem.tokens >= MANY_ITERATIONS * one.group * one.teams):
            return one
    return grad_x_pass.default_config(problem, target)


def candidates(problem: Problem, target: Target) -> Iterator[Config | persistent.Config]:
    """Configurations worth measuring."""
    yield from grad_x_pass.candidates(problem, target)
    if problem.dtype == "bfloat16":
        yield from persistent.candidates(problem, target)


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
    h_res: Tensor | None = None,
    *,
    config: Config | persistent.Config,
    **constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `reference.pre`; see the module's docstring for the equations.

    Args:
        grad_layer_input: [T, C] in x's dtype. Cotangent of what the layer read.
        grad_h_post: [T, n], fp32. Cotangent of the write-in weights.
        grad_h_res: [T, n, n], fp32. Cotangent of the residual mixing, [out, in].
        x: [T, n, C], bf16, fp16 or fp32. The residual streams.
        phi: [n*n + 2n, n*C], fp32.
        alpha: [3], fp32.
        bias: [n*n + 2n], fp32.
        projection: [T, n*n + 2n], fp32. As the forward saved it.
        inv_rms: [T], fp32. As the forward saved it.
        grad_x_part: [T, n, C] in x's dtype, added to grad_x if given.
        h_res: [T, n, n], fp32, [out, in], with which grad_x_part is mixed first; only with it.
        config: launch knobs of the grad_x pass or of the persistent launch.
        **constants: those of `reference.pre`, all but norm_eps; see `Constants.of`.

    Returns:
        grad_x in x's dtype; grad_phi, grad_alpha, grad_bias, fp32.

    Raises:
        RuntimeError: The sums of so many iterations do not fit this GPU's shared memory.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x), *(torch.zeros_like(value) for value in (phi, alpha, bias))
    compiled = Constants.of(**constants)
    one_launch = isinstance(config, persistent.Config)
    if one_launch:
        extra_sums, mailbox = config.sums, config.mailbox(x.device)
    else:
        extra_sums = min(len(x), multiprocessors(x.device) * dots.resident_blocks(x))
        mailbox = None
    unfinished_state, block_sums = token_states(
        None, grad_h_post, grad_h_res, projection, inv_rms, alpha, bias,
        C=x.shape[2], pre_eps=compiled.pre_eps, post_scale=compiled.post_scale,
        manifold=compiled.manifold, extra_sums=extra_sums, mailbox=mailbox,
    )  # fmt: skip
    saved = projection, inv_rms, alpha, unfinished_state
    own_sums = block_sums[-extra_sums:]
    if one_launch:
        grad_x, partials = persistent.launch(
            config, grad_layer_input, x, phi, *saved, grad_x_part, h_res, mailbox, own_sums
        )
        return grad_x, *add_partials(partials, block_sums, phi)
    state = dots.complete_state(grad_layer_input, x, *saved, own_sums)
    return gradients_from_states(
        state, block_sums, x, phi, grad_layer_input, grad_x_part, h_res, config=config
    )


def traffic(problem: Problem) -> int:
    """Bytes that must move if x is read once, with merge's share of its gradient."""
    n, C = problem.n, problem.channels
    logits = logits_per_token(n)
    per_token = (3 * n + 1) * C * ITEM_BYTES[problem.dtype] + (2 * logits - n + 1) * 4
    return problem.tokens * per_token + 2 * logits * n * C * 4
