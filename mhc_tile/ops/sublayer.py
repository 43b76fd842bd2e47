"""A whole sublayer around a layer: `pre`, the layer, `merge`, with one gradient of x for both.

`pre` and `merge` of one sublayer read the same x through the same h_res. Here merge's backward
leaves its share of grad_x, `sum_o h_res[o, i] * grad_x_next[o, c]`, to pre's backward, which reads
grad_x_next itself in place of that share: 4 C elements a token less to write at n = 4. So the x
that `begin` or `cross` hands on has a gradient only for the `cross` or `finish` that it is meant
for; no public function returns it. Forward-mode AD and `torch.func` take the plain ops, each with
its own gradient of x.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .._library import under_transforms
from ._saved import given, keep_shapes
from .boundary import BOUNDARY
from .merge import MERGE, MERGE_BACKWARD_MAPS, check_merge
from .pre import PRE, HandingOn, check_pre


def sublayer(
    x: Tensor,
    layer: Callable[[Tensor], Tensor],
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    norm_eps: float,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
    iters: int = 20,
    sinkhorn_eps: float = 0.0,
) -> Tensor:
    """The streams after a sublayer: `pre`, a layer and `merge` (eqs. 7 and 14-19).

    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer(sum_i h_pre[i] * x[i])[c]`

    The result is that of calling the three one after the other; the backward moves fewer bytes, as
    the share that merge has of x's gradient is formed where the gradient is written.

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        layer: from [..., C] in x's dtype to the same shape and dtype; under autocast the dtype may
            be another one and is brought back.
        phi: [n*n + 2n, n*C], as alpha [3] and bias [n*n + 2n]; see `pre`.
        alpha: see there.
        bias: see there.
        norm_eps: see there, as all that follow.
        pre_eps: added to h_pre.
        post_scale: the upper bound of h_post.
        iters: Sinkhorn iterations.
        sinkhorn_eps: the epsilon of `sinkhorn`.

    Returns:
        x_next: [..., n, C], dtype of x.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x, phi = torch.randn(7, 4, 64), torch.randn(24, 256)
        >>> sublayer(x, torch.tanh, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6).shape
        torch.Size([7, 4, 64])
    """
    constants = check_pre(
        "sublayer", x, phi, alpha, bias, norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    )
    opened = _open(x, phi, alpha, bias, constants)
    layer_output = layer(opened.layer_input)
    if autocast_dtype(x.device.type) is not None and isinstance(layer_output, Tensor):
        layer_output = layer_output.to(x.dtype)
    check_merge("sublayer", x, layer_output, opened.h_post, opened.h_res)
    return _finish(opened, layer_output)


class Open(NamedTuple):
    """A sublayer between its `pre` and its `merge`.

    Attributes:
        layer_input: [..., C].
        h_post: [..., n].
        h_res: [..., n, n].
        handed: [..., n, C], x for `cross` or `finish`: what has a gradient for it leaves that
            unmixed.
        x: the same with a gradient of its own, for second derivatives. Where torch compiles, which
            has none, it may be `handed`.
    """

    layer_input: Tensor
    h_post: Tensor
    h_res: Tensor
    handed: Tensor
    x: Tensor


def begin(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **constants: Any) -> Open:
    """`pre`, to be followed by `cross` or `finish`."""
    return _open(x, phi, alpha, bias, check_pre("pre", x, phi, alpha, bias, **constants))


def _open(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, constants: dict[str, Any]) -> Open:
    x = x.contiguous()  # once, not in each op that reads it
    if under_transforms():
        layer_input, h_post, h_res = PRE.call(x, phi, alpha, bias, **constants)[:3]
        return Open(layer_input, h_post, h_res, x, x)
    layer_input, h_post, h_res, handed = HandingOn.apply(x, phi, alpha, bias, constants, True)
    return Open(layer_input, h_post, h_res, handed, x)


def cross(
    opened: Open,
    layer_output: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    **constants: Any,
) -> Open:
    """`boundary`: the merge of a sublayer and the pre of the next, whose parameters these are."""
    _, h_post, h_res, handed, x = opened
    check_merge("boundary", x, layer_output, h_post, h_res)
    constants = check_pre("boundary", x, phi, alpha, bias, **constants)
    maps = (h_post, h_res, phi, alpha, bias)
    if under_transforms():
        x, layer_input, h_post, h_res = BOUNDARY.call(x, layer_output, *maps, **constants)[:4]
        return Open(layer_input, h_post, h_res, x, x)
    layer_input, h_post, h_res, handed, *own = _Crossing.apply(
        handed, _kept(opened), layer_output, *maps, constants
    )
    return Open(layer_input, h_post, h_res, handed, own[0] if own else handed)


def finish(opened: Open, layer_output: Tensor) -> Tensor:
    """`merge`."""
    check_merge("merge", opened.x, layer_output, opened.h_post, opened.h_res)
    return _finish(opened, layer_output)


def _finish(opened: Open, layer_output: Tensor) -> Tensor:
    maps = (opened.h_post, opened.h_res)
    if under_transforms():
        return MERGE.call(opened.x, layer_output, *maps)
    return _Finishing.apply(opened.handed, _kept(opened), layer_output, *maps)


def _kept(opened: Open) -> tuple[Tensor] | None:
    """What to save of x for the backward, hidden from autograd, which has no gradient for it."""
    return None if opened.x is opened.handed else (opened.x,)


class _Finishing(torch.autograd.Function):
    """`merge` of an x that was handed on: its cotangent goes back as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        handed: Tensor,
        x: tuple[Tensor] | None,
        layer_output: Tensor,
        h_post: Tensor,
        h_res: Tensor,
    ) -> Tensor:
        """The result of `merge`."""
        ctx.save_for_backward(handed if x is None else x[0], layer_output, h_post)
        return MERGE.call(handed, layer_output, h_post, h_res)

    @staticmethod
    def backward(ctx: Any, grad_x_next: Tensor) -> tuple[Tensor | None, ...]:
        """The cotangent in place of a gradient of x."""
        return grad_x_next, None, *MERGE_BACKWARD_MAPS.call(grad_x_next, *ctx.saved_tensors)


class _Crossing(torch.autograd.Function):
    """`boundary` of an x that was handed on, handing on x_next."""

    @staticmethod
    def forward(
        ctx: Any,
        handed: Tensor,
        x: tuple[Tensor] | None,
        layer_output: Tensor,
        h_post: Tensor,
        h_res: Tensor,
        phi: Tensor,
        alpha: Tensor,
        bias: Tensor,
        constants: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """What `Open` holds."""
        x_next, *output, projection, inv_rms = BOUNDARY.call(
            handed, layer_output, h_post, h_res, phi, alpha, bias, **constants
        )
        compiling = torch.compiler.is_compiling()  # then zeros are filled for what nothing reads
        handed_on = (x_next,) if compiling else (x_next, x_next.view_as(x_next))
        saved = (handed_on[-1], phi, alpha, bias, projection, inv_rms, output[2])
        ctx.save_for_backward(handed if x is None else x[0], layer_output, h_post, *saved)
        ctx.constants = constants
        keep_shapes(ctx, output)
        if not compiling:  # Dynamo does not know the method
            ctx.set_materialize_grads(False)
        return *output, *handed_on

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of the next `pre` with its share of merge's, then merge's without x's."""
        x, layer_output, h_post, *saved, h_res_next = ctx.saved_tensors
        grad_x_part, grad_x = (*grads[3:], None)[:2]
        mixing = None if grad_x_part is None else h_res_next
        tensors = (*given(ctx, grads[:3]), *saved, grad_x_part, mixing)
        grad_x_next, *grad_parameters = PRE.backward.call(*tensors, **ctx.constants)
        grad_x_next = grad_x_next if grad_x is None else grad_x_next + grad_x
        grad_merged = MERGE_BACKWARD_MAPS.call(grad_x_next, x, layer_output, h_post)
        return grad_x_next, None, *grad_merged, *grad_parameters, None
