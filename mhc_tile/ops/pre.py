"""`pre`: everything before the layer, in one op: mapping, sinkhorn and pre_apply."""

from typing import Any

import torch
from torch import Tensor

from .. import _checks, gradients, reference
from .._library import under_transforms
from ._definition import Op
from ._saved import given, keep_shapes


def pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    norm_eps: float,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
    iters: int = 20,
    sinkhorn_eps: float = 0.0,
    return_x: bool = False,
) -> tuple[Tensor, ...]:
    """Read the layer's input from the streams, and the maps that `merge` will need (eqs. 14-19).

    `h_pre, h_post, h_res_logits = mapping(x, phi, alpha, bias)`,
    `h_res = sinkhorn(h_res_logits)`, `layer_input[c] = sum_i h_pre[i] * x[i, c]`

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        phi: [n*n + 2n, n*C], fp32 (fp64 where x is), rows packed pre, post, res.
        alpha: [3], dtype of phi. Gates of pre, post and res.
        bias: [n*n + 2n], dtype of phi.
        norm_eps: added to the mean of squares; at least 0.
        pre_eps: added to h_pre; at least 0.
        post_scale: the upper bound of h_post; above 0.
        iters: Sinkhorn iterations; at least 1.
        sinkhorn_eps: the epsilon of `sinkhorn`; at least 0.
        return_x: also return x, for `merge` to read. The gradient that merge has for x then
            reaches the backward of `pre`, which adds it to its own as it writes it; of two
            gradients of one x autograd would read both and write the sum.

    Returns:
        layer_input [..., C], dtype of x; h_post [..., n] and h_res [..., n, n] ([out, in]), dtype
        of phi; with return_x, x as a fourth, the same storage.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x, phi = torch.randn(7, 4, 64), torch.randn(24, 256)
        >>> layer_input, h_post, h_res = pre(x, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6)
        >>> layer_input.shape, h_post.shape, h_res.shape
        (torch.Size([7, 64]), torch.Size([7, 4]), torch.Size([7, 4, 4]))
        >>> layer_input, h_post, h_res, x = pre(
        ...     x, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6, return_x=True)
        >>> x_next = merge(x, torch.tanh(layer_input), h_post, h_res)
    """
    constants = check_pre(
        "pre", x, phi, alpha, bias, norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    )
    _checks.flag("pre", return_x=return_x)
    if return_x and not under_transforms():
        return HandingOn.apply(x, phi, alpha, bias, constants, False)
    results = PRE.call(x, phi, alpha, bias, **constants)[:3]
    return (*results, x) if return_x else results


def check_pre(
    op: str,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    norm_eps: float,
    pre_eps: float,
    post_scale: float,
    iters: int,
    sinkhorn_eps: float,
) -> dict[str, Any]:
    """The checks that `pre` shares with `boundary`; returns the constants by name."""
    _checks.parameters(op, x, phi, alpha, bias)
    _checks.at_least(op, 0, norm_eps=norm_eps, pre_eps=pre_eps, sinkhorn_eps=sinkhorn_eps)
    _checks.positive(op, post_scale=post_scale)
    _checks.count(op, iters=iters)
    return {
        "norm_eps": norm_eps,
        "pre_eps": pre_eps,
        "post_scale": post_scale,
        "iters": iters,
        "sinkhorn_eps": sinkhorn_eps,
    }


CONSTANTS = "float norm_eps, float pre_eps=0.0, float post_scale=2.0, int iters=20, "
CONSTANTS += "float sinkhorn_eps=0.0"


def with_projection(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, **constants: Any
) -> tuple[Tensor, ...]:
    """`reference.pre` and, after its results, what the backward keeps."""
    projection, inv_rms = reference.normalised_projection(x, phi, norm_eps)
    results = reference.pre_from_projection(x, projection, alpha, bias, **constants)
    return (*results, projection, inv_rms)


def _gradient(*tensors: Tensor, norm_eps: float, **constants: Any) -> tuple[Tensor, ...]:
    return gradients.pre_backward(*tensors, **constants)


PRE = Op(
    "pre",
    ("x", "phi", "alpha", "bias"),
    ("layer_input", "h_post", "h_res"),
    with_projection,
    _gradient,
    kernel="pre",
    gradient_kernel="pre_backward",
    kept=("projection", "inv_rms"),
    gradient_optional=("grad_x_part", "h_res"),
    constants=CONSTANTS,
)


class HandingOn(torch.autograd.Function):
    """`pre` that returns x, too, which a torch op may not.

    With `mixed` the returned x is for one reader, `sublayer.finish` with the h_res of this `pre`:
    what comes back for it is the cotangent of x_next, which is mixed where grad_x is written.

    The context is an argument of forward because `apply` is slow with `setup_context`: it inspects
    a signature in every call, 26 us of host time instead of 6.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        phi: Tensor,
        alpha: Tensor,
        bias: Tensor,
        constants: dict[str, Any],
        mixed: bool,
    ) -> tuple[Tensor, ...]:
        """The results of `pre`, and x."""
        output = PRE.call(x, phi, alpha, bias, **constants)
        ctx.save_for_backward(x, phi, alpha, bias, *output[3:], output[2] if mixed else None)
        ctx.constants = constants
        keep_shapes(ctx, output[:3])
        if not torch.compiler.is_compiling():  # Dynamo does not know the method
            ctx.set_materialize_grads(False)
        return *output[:3], x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of `pre`, with what the readers of the returned x have for x."""
        *own, grad_x_part = grads
        *saved, h_res = ctx.saved_tensors
        if h_res is None and all(grad is None for grad in own):
            return grad_x_part, None, None, None, None, None
        mixing = None if grad_x_part is None else h_res
        tensors = (*given(ctx, own), *saved, grad_x_part, mixing)
        return *PRE.backward.call(*tensors, **ctx.constants), None, None
