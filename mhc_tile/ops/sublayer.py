"""A whole sublayer around a layer, or its steps, with one gradient of x for `pre` and `merge`.

`pre` and `merge` of a sublayer read the same x. Called apart, each has a gradient of x that its
backward writes, and autograd adds the two. Here the backward of `merge` passes its cotangent to
`pre` through `x_for_merge`, and the backward of `pre` multiplies it by h_res where it writes the
one grad_x. docs/concepts/gradient_of_x.md draws the edges. Only these functions see x_for_merge:
the gradient that it carries is grad_x_next, none of x. They all multiply by the h_res of the state,
so that a state may be closed several times: the cotangents add up. Without grad mode, under
forward-mode AD and under `torch.func` a state has no x_for_merge, and the steps are the plain ops.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .._library import under_transforms
from ..config import CONSTANTS
from . import _native
from ._definition import fill_missing_grads, save_output_shapes
from .boundary import BOUNDARY
from .merge import MERGE, MERGE_BACKWARD_MAPS, check_merge
from .pre import PRE, check_pre


def sublayer(
    x: Tensor, layer: Callable[[Tensor], Tensor], phi: Tensor, alpha: Tensor, bias: Tensor,
    *, norm_eps: float, pre_eps: float = 0.0, post_scale: float = 2.0, iters: int = 20,
    sinkhorn_eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The streams after a sublayer: `pre`, a layer and `merge` (eqs. 7 and 14-19).

    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer(sum_i h_pre[i] * x[i])[c]`

    The result is that of the three one after the other; the backward moves fewer bytes.

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
    state = _open(x, phi, alpha, bias, constants)
    layer_output = layer(state.layer_input)
    if autocast_dtype(x.device.type) is not None and isinstance(layer_output, Tensor):
        layer_output = layer_output.to(x.dtype)
    return _close("sublayer", state, layer_output)


class OpenSublayer:
    """A sublayer between its `pre` and its `merge`: what `open_sublayer` returns.

    Every attribute is a tensor with a true gradient, for any reader. None can be replaced: to merge
    by another h_res, call `merge(state.x, layer_output, state.h_post, other)`.
    After `next_sublayer` a hook on x, or `torch.autograd.grad` with respect to x, gets the
    gradients of the readers of `state.x` alone: the ops that merge and read x_next are inside.

    Attributes:
        layer_input: [..., C], dtype of x. What the layer reads.
        h_post: [..., n], fp32 (fp64 where x is).
        h_res: [..., n, n], [out, in], dtype of h_post.
        x: [..., n, C], the streams that enter the sublayer.
    """

    def __init__(
        self,
        maps: Sequence[Tensor],
        x: Tensor | None,
        x_for_merge: Tensor | None = None,
        previous: "tuple[OpenSublayer, Tensor] | None" = None,
    ) -> None:
        self._layer_input, self._h_post, self._h_res = maps
        self._x, self._x_for_merge, self._previous = x, x_for_merge, previous

    @property
    def layer_input(self) -> Tensor:
        """What the layer reads."""
        return self._layer_input

    @property
    def h_post(self) -> Tensor:
        """By what `merge` writes the layer's output into the streams."""
        return self._h_post

    @property
    def h_res(self) -> Tensor:
        """By what `merge` mixes the streams."""
        return self._h_res

    @property
    def x(self) -> Tensor:
        """The streams that enter. Compiled code after `next_sublayer` merges again for them."""
        return close_sublayer(*self._previous) if self._x is None else self._x  # type: ignore[misc]


def open_sublayer(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    *, norm_eps: float, pre_eps: float = 0.0, post_scale: float = 2.0, iters: int = 20,
    sinkhorn_eps: float = 0.0,
) -> OpenSublayer:  # fmt: skip
    """`pre` of a sublayer that `next_sublayer` or `close_sublayer` will merge.

    `layer_input, h_post, h_res = pre(x, phi, alpha, bias)`

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        phi: [n*n + 2n, n*C], as alpha [3] and bias [n*n + 2n]; see `pre`.
        alpha: see there.
        bias: see there.
        norm_eps: see there, as all that follow.
        pre_eps: added to h_pre.
        post_scale: the upper bound of h_post.
        iters: Sinkhorn iterations.
        sinkhorn_eps: the epsilon of `sinkhorn`.

    Returns:
        The open sublayer; its layer_input [..., C] is what the layer reads.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x, phi = torch.randn(7, 4, 64), torch.randn(24, 256)
        >>> state = open_sublayer(x, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6)
        >>> close_sublayer(state, torch.tanh(state.layer_input)).shape
        torch.Size([7, 4, 64])
    """
    given = phi, alpha, bias, norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    if found := _planned(x, (), given):
        return _opened(found, x)
    return _open(x, phi, alpha, bias, check_pre("open_sublayer", x, *given))


def next_sublayer(
    state: OpenSublayer, layer_output: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    *, norm_eps: float, pre_eps: float = 0.0, post_scale: float = 2.0, iters: int = 20,
    sinkhorn_eps: float = 0.0,
) -> OpenSublayer:  # fmt: skip
    """`merge` of an open sublayer and `pre` of the next, in the one op `boundary`.

    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]`
    `layer_input, h_post, h_res = pre(x_next, phi, alpha, bias)`

    Args:
        state: the open sublayer.
        layer_output: [..., C], dtype of state.x. What its layer returned.
        phi: [n*n + 2n, n*C], the NEXT sublayer's, as alpha [3] and bias [n*n + 2n]; see `pre`.
        alpha: see there.
        bias: see there.
        norm_eps: see there, as all that follow.
        pre_eps: added to h_pre.
        post_scale: the upper bound of h_post.
        iters: Sinkhorn iterations.
        sinkhorn_eps: the epsilon of `sinkhorn`.

    Returns:
        The next sublayer, open; its x is x_next.

    Raises:
        TypeError: state is no `OpenSublayer`, or another argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x, parameters = torch.randn(7, 4, 64), (torch.randn(24, 256), torch.ones(3))
        >>> parameters = (*parameters, torch.zeros(24))
        >>> state = open_sublayer(x, *parameters, norm_eps=1e-6)
        >>> for layer in (torch.tanh, torch.sin):
        ...     state = next_sublayer(state, layer(state.layer_input), *parameters, norm_eps=1e-6)
        >>> close_sublayer(state, torch.cos(state.layer_input)).shape
        torch.Size([7, 4, 64])
    """
    name = "next_sublayer"
    given = phi, alpha, bias, norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    if found := _planned_merge(state, layer_output, given):
        return _opened(found[:-1], found[-1])
    x = _check(name, state, layer_output)
    constants = check_pre(name, x, *given)
    tensors = (layer_output, state._h_post, state._h_res, phi, alpha, bias)
    if state._x_for_merge is None or not _fuses():
        x_next, *maps = BOUNDARY.call(state.x, *tensors, **constants)[:4]
        return OpenSublayer(maps, x_next)
    results = _fused_merge(x, _kept(state), *tensors, constants)
    if len(results) == 4:  # compiled
        return OpenSublayer(results[:3], None, results[3], (state, layer_output))
    return OpenSublayer(results[:3], results[4], results[3])


def close_sublayer(state: OpenSublayer, layer_output: Tensor) -> Tensor:
    """`merge` of an open sublayer.

    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]`

    Args:
        state: the open sublayer.
        layer_output: [..., C], dtype of state.x. What its layer returned.

    Returns:
        x_next: [..., n, C], dtype of x.

    Raises:
        TypeError: state is no `OpenSublayer`, or layer_output is not a tensor.
        ValueError: A shape, dtype or device is off; the message names it.

    Example:
        >>> x, phi = torch.randn(7, 4, 64), torch.randn(24, 256)
        >>> state = open_sublayer(x, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6)
        >>> x_next = close_sublayer(state, state.layer_input)
        >>> torch.equal(x_next, merge(x, state.layer_input, state.h_post, state.h_res))
        True
    """
    return _close("close_sublayer", state, layer_output)


def _open(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, constants: dict[str, Any]
) -> OpenSublayer:
    x = x.contiguous()  # once, not in each op that reads it
    if not _fuses():
        return OpenSublayer(PRE.call(x, phi, alpha, bias, **constants)[:3], x)
    merged = (None, None, None, None)
    *maps, x_for_merge = _fused_merge(x, *merged, phi, alpha, bias, constants)
    return OpenSublayer(maps, x, x_for_merge)


def _close(name: str, state: OpenSublayer, layer_output: Tensor) -> Tensor:
    if found := _planned_merge(state, layer_output, ()):
        return found[0]
    x = _check(name, state, layer_output)
    tensors = (layer_output, state._h_post, state._h_res)
    if state._x_for_merge is None or not _fuses():
        return MERGE.call(state.x, *tensors)
    return _fused_merge(x, _kept(state), *tensors, None, None, None, None)


def _check(name: str, state: OpenSublayer, layer_output: Tensor) -> Tensor:
    """The checks of a merge; returns x, without the gradient that it may have."""
    if not isinstance(state, OpenSublayer):
        raise TypeError(f"{name}: state must be an OpenSublayer, got {type(state).__name__}")
    x = state.x if state._x_for_merge is None else state._x_for_merge
    check_merge(name, x, layer_output, state._h_post, state._h_res)
    return x


def _fuses() -> bool:
    return torch.is_grad_enabled() and not under_transforms()


def _kept(state: OpenSublayer) -> tuple[Tensor] | None:
    """What to save of x for the backward, hidden from autograd, which has no gradient for it."""
    return None if state._x is None else (state._x,)


def _fused_merge(x_for_merge: Tensor, x: tuple[Tensor] | None, *rest: Any) -> Any:
    """`_FusedMerge.apply`, in C++ where that is loaded and nothing is traced."""
    if _native.library is None or torch.compiler.is_compiling():
        return _FusedMerge.apply(x_for_merge, x, *rest)
    *tensors, constants = rest
    values = map((constants or {}).get, CONSTANTS)
    call = torch.ops.mhc_tile_native.fused_merge.default
    results = call(x_for_merge, x and x[0], *tensors, *values, False)
    return results if constants else results[0]


def _opened(results: list[Tensor], x: Tensor) -> OpenSublayer:
    """A sublayer that C++ has opened: its maps and, in grad mode, x_for_merge."""
    return OpenSublayer(results[:3], x, results[3] if len(results) > 3 else None)


def _planned_merge(
    state: OpenSublayer, layer_output: Tensor, given: tuple[Any, ...]
) -> list[Tensor]:
    """`_planned` of a merge, and of the `pre` after it if its parameters are given."""
    if _native.library is None or not isinstance(state, OpenSublayer):
        return []
    x = state._x_for_merge if torch.is_grad_enabled() else state._x
    return _planned(x, (state._x, layer_output, state._h_post, state._h_res), given)


def _planned(x_for_merge: Any, merged: tuple[Any, ...], given: tuple[Any, ...]) -> list[Tensor]:
    """The results in C++ of a call that has a launch plan, as `_FusedMerge` lists them; else none.

    Such a call needs no checks: one of the same shapes, dtypes, device and constants has passed
    them. `given` are phi, alpha, bias and the constants.
    """
    if _native.library is None or torch.compiler.is_compiling():
        return []
    tensors = (x_for_merge, *merged[1:], *given[:3])
    if not all([isinstance(value, Tensor) for value in tensors]):
        return []
    if given and [type(value) for value in given[3:]] != _TYPES:
        return []
    call = torch.ops.mhc_tile_native.fused_merge.default
    return call(x_for_merge, *(merged or _NOTHING[:4]), *(given or _NOTHING), True)


_TYPES = [float, float, float, int, float]  # of CONSTANTS; others need a check
_NOTHING = (None,) * (3 + len(CONSTANTS))


class _FusedMerge(torch.autograd.Function):
    """The merge of one sublayer, if layer_output is given; the pre of the next, if phi is given.

    The context is an argument of forward because `apply` is slow with `setup_context`: it inspects
    a signature in every call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_for_merge: Tensor, x: tuple[Tensor] | None,
        layer_output: Tensor | None, h_post: Tensor | None, h_res: Tensor | None,
        phi: Tensor | None, alpha: Tensor | None, bias: Tensor | None,
        constants: dict[str, Any] | None,
    ) -> Any:  # fmt: skip
        """x_next alone; or the maps, x_for_merge of the next merge and x_next for other readers."""
        streams, parameters = (x_for_merge, layer_output, h_post, h_res), (phi, alpha, bias)
        merged: tuple[Any, ...] = (x_for_merge if x is None else x[0], layer_output, h_post)
        ctx.merges, ctx.constants = layer_output is not None, constants
        if constants is None:
            ctx.save_for_backward(*merged)
            return MERGE.call(*streams)
        # compiled code would fill a gradient of zeros for an output that nothing reads
        compiling = torch.compiler.is_compiling()
        x_next: tuple[Tensor, ...] = (x_for_merge,)
        if not ctx.merges:
            merged, results = (), PRE.call(x_for_merge, *parameters, **constants)
        else:
            first, *results = BOUNDARY.call(*streams, *parameters, **constants)
            x_next = (first,) if compiling else (first, first.view_as(first))
        *maps, projection, inv_rms = results
        ctx.save_for_backward(x_next[-1], *parameters, projection, inv_rms, maps[2], *merged)
        save_output_shapes(ctx, maps)
        if not compiling:  # Dynamo does not know the method
            ctx.set_materialize_grads(False)
        return *maps, *x_next

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of pre with merge's share of grad_x, then merge's without grad_x."""
        grad_x_next, merged = grads[0], ctx.saved_tensors
        grad_merged = grad_parameters = (None, None, None)
        if ctx.constants is not None:
            *read, h_res = merged[:7]
            grad_x_for_merge, grad_x = (*grads[3:], None)[:2]
            merged = merged[7:]
            tensors = (*fill_missing_grads(ctx, grads[:3]), *read, grad_x_for_merge)
            grad_x_next, *grad_parameters = PRE.backward.call(
                *tensors, None if grad_x_for_merge is None else h_res, **ctx.constants
            )
            grad_x_next = grad_x_next if grad_x is None else grad_x_next + grad_x
        if ctx.merges:
            grad_merged = MERGE_BACKWARD_MAPS.call(grad_x_next, *merged)
        return grad_x_next, None, *grad_merged, *grad_parameters, None
