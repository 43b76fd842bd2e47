"""`pre`: everything before the layer, in one op: mapping, sinkhorn and pre_apply."""

import warnings
from typing import Any

from torch import Tensor

from .. import _checks, gradients, reference
from .._library import while_tracing
from ._definition import Op
from .mapping import MAPPING
from .pre_apply import PRE_APPLY
from .sinkhorn import SINKHORN


def pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    *, norm_eps: float, pre_eps: float = 0.0, post_scale: float = 2.0, iters: int = 20,
    sinkhorn_eps: float = 0.0, h_pre: Tensor | None = None, return_h_pre: bool = False,
    return_x: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Read the layer's input from the streams, and the maps that `merge` will need (eqs. 14-19).

    `h_pre, h_post, h_res_logits = mapping(x, phi, alpha, bias)`,
    `h_res = sinkhorn(h_res_logits)`, `layer_input[c] = sum_i h_pre[i] * x[i, c]`, where a given
    h_pre takes the place of the mapping's

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
        h_pre: [..., n], dtype of phi. What the layer's input is read with instead of the h_pre of
            this x, such as the h_pre that the sublayer before returned (DeepSeek-V4.1).
        return_h_pre: also return the h_pre of this x, differentiable.
        return_x: deprecated; also return x. Use `open_sublayer` and `close_sublayer`, or give
            `merge` the x that `pre` was given.

    With `h_pre` or `return_h_pre` the three ops above run instead of one kernel. What a backward
    pass that recomputes needs of them is small: `pre_apply(x, h_pre)` alone gives layer_input back.

    Returns:
        layer_input [..., C], dtype of x; h_post [..., n] and h_res [..., n, n] ([out, in]), dtype
        of phi; with return_h_pre also h_pre [..., n], dtype of phi; with return_x last x itself.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x, phi = torch.randn(7, 4, 64), torch.randn(24, 256)
        >>> layer_input, h_post, h_res = pre(x, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6)
        >>> layer_input.shape, h_post.shape, h_res.shape
        (torch.Size([7, 64]), torch.Size([7, 4]), torch.Size([7, 4, 4]))
        >>> *_, h_pre = pre(
        ...     x, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6, return_h_pre=True)
        >>> torch.equal(pre_apply(x, h_pre), layer_input)
        True
    """
    constants = check_pre(
        "pre", x, phi, alpha, bias, norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    )
    _checks.flag("pre", return_h_pre=return_h_pre, return_x=return_x)
    if h_pre is None and not return_h_pre:
        results = PRE.call(x, phi, alpha, bias, **constants)[:3]
    else:
        results = _with_h_pre(h_pre, x, phi, alpha, bias, **constants)[: 3 + return_h_pre]
    if return_x:
        _warn_of_return_x()
        return (*results, x)
    return results


def _with_h_pre(
    given: Tensor | None,
    x: Tensor,
    *parameters: Tensor,
    iters: int,
    sinkhorn_eps: float,
    **constants: Any,
) -> tuple[Tensor, ...]:
    """`pre` by its three ops: layer_input by the given h_pre, if any; h_post, h_res, own h_pre."""
    if given is not None:
        _checks.map_of("pre", "h_pre", given, x.shape[:-1], x)
    x = x.contiguous()  # once, not in each op that reads it
    h_pre, h_post, h_res_logits = MAPPING.call(x, *parameters, **constants)[:3]
    h_res = SINKHORN.call(h_res_logits, iters=iters, eps=sinkhorn_eps)
    return PRE_APPLY.call(x, h_pre if given is None else given), h_post, h_res, h_pre


@while_tracing
def _warn_of_return_x() -> None:
    warnings.warn(
        "pre: return_x is deprecated and returns x as it was given: open_sublayer and "
        "close_sublayer have one gradient of x for pre and merge",
        DeprecationWarning,
        stacklevel=3,
    )


def check_pre(
    op: str, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, norm_eps: float, pre_eps: float,
    post_scale: float, iters: int, sinkhorn_eps: float,
) -> dict[str, Any]:  # fmt: skip
    """Check what `pre`, `boundary` and the sublayers share; return the constants by name."""
    _checks.parameters(op, x, phi, alpha, bias)
    _checks.at_least(op, 0, norm_eps=norm_eps, pre_eps=pre_eps, sinkhorn_eps=sinkhorn_eps)
    _checks.number(op, "post_scale", post_scale, above=True)
    _checks.count(op, iters=iters)
    return {
        "norm_eps": norm_eps, "pre_eps": pre_eps, "post_scale": post_scale,
        "iters": iters, "sinkhorn_eps": sinkhorn_eps,
    }  # fmt: skip


CONSTANTS = f"{MAPPING.constants}, int iters=20, float sinkhorn_eps=0.0"


def with_projection(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, **constants: Any
) -> tuple[Tensor, ...]:
    """`reference.pre` and, after its results, what the backward keeps."""
    projection, inv_rms = reference.normalised_projection(x, phi, norm_eps)
    results = reference.pre_from_projection(x, projection, alpha, bias, **constants)
    return (*results, projection, inv_rms)


PRE = Op(
    "pre", ("x", "phi", "alpha", "bias"), ("layer_input", "h_post", "h_res"),
    with_projection, gradients.pre_backward,
    kernel="pre", gradient_kernel="pre_backward",
    kept=("projection", "inv_rms"), gradient_optional=("grad_x_part", "h_res"),
    constants=CONSTANTS,
)  # fmt: skip
