"""`expand`, `collapse` and `head`: entering and leaving the residual streams."""

from typing import Any

import torch
from torch import Tensor

from .. import _checks, gradients, reference
from .._library import define, derive, rounded
from ._dispatch import flat, leading, on_cuda, tuned
from ._saved import given, keep_projection

MODES = ("sum", "mean")


def expand(hidden: Tensor, num_streams: int) -> Tensor:
    """Copy the hidden state into every stream: `x[i, c] = hidden[c]`.

    Args:
        hidden: [..., C], bf16, fp16, fp32 or fp64.
        num_streams: n, at least 1.

    Returns:
        x: [..., n, C], dtype of hidden.

    Raises:
        TypeError: hidden is not a tensor.
        ValueError: A shape, dtype or num_streams is off; the message names it.

    Example:
        >>> expand(torch.randn(2, 5, 64), 4).shape
        torch.Size([2, 5, 4, 64])
    """
    _checks.hidden("expand", "hidden", hidden)
    _checks.count("expand", num_streams=num_streams)
    return _expand(hidden, num_streams)


def collapse(x: Tensor, mode: str = "sum") -> Tensor:
    """Sum or mean of the streams: `hidden[c] = sum_i x[i, c]`, over n where mode is "mean".

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        mode: "sum" or "mean".

    Returns:
        hidden: [..., C], dtype of x, rounded once.

    Raises:
        TypeError: x is not a tensor.
        ValueError: A shape, dtype or mode is off; the message names it.

    Example:
        >>> hidden = torch.randn(2, 5, 64)
        >>> torch.equal(collapse(expand(hidden, 4), "mean"), hidden)
        True
    """
    _checks.streams("collapse", x)
    if mode not in MODES:
        raise ValueError(f"collapse: mode must be one of {list(MODES)}, got {mode!r}")
    return _collapse(x, mode)


def head(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, pre_eps: float = 0.0
) -> Tensor:
    """The learned exit of DeepSeek-V4: a sum of the streams, weighted by the streams.

    `weights[i] = sigmoid(alpha * projection[i] + bias[i]) + pre_eps`, projection as in `mapping`
    `hidden[c] = sum_i weights[i] * x[i, c]`

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        phi: [n, n*C], fp32 (fp64 where x is).
        alpha: [1], dtype of phi.
        bias: [n], dtype of phi.
        norm_eps: added to the mean of squares; at least 0.
        pre_eps: added to the weights; at least 0.

    Returns:
        hidden: [..., C], dtype of x.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x, phi = torch.randn(7, 4, 64), torch.randn(4, 256)
        >>> head(x, phi, torch.ones(1), torch.zeros(4), norm_eps=1e-6).shape
        torch.Size([7, 64])
    """
    num_streams, width = _checks.streams("head", x)
    _checks.map_of("head", "phi", phi, (num_streams, num_streams * width), x)
    _checks.map_of("head", "alpha", alpha, (1,), x)
    _checks.map_of("head", "bias", bias, (num_streams,), x)
    _checks.at_least("head", 0, norm_eps=norm_eps, pre_eps=pre_eps)
    return _head(x, phi, alpha, bias, norm_eps=norm_eps, pre_eps=pre_eps)[0]


def _expand_cuda(hidden: Tensor, num_streams: int) -> Tensor:
    from ..kernels import streams as kernel

    tokens = flat(hidden, 1)
    sizes = (tokens.shape[0], num_streams, tokens.shape[1])
    x = tuned(
        "expand", hidden, sizes, lambda config: kernel.expand(tokens, num_streams, config=config)
    )
    return leading(x, hidden.shape[:-1])


def _collapse_cuda(x: Tensor, mode: str) -> Tensor:
    from ..kernels import streams as kernel

    tokens = flat(x, 2)
    hidden = tuned(
        "collapse",
        x,
        tokens.shape,
        lambda config: kernel.collapse(tokens, mean=mode == "mean", config=config),
    )
    return leading(hidden, x.shape[:-2])


def _expand_backward_cuda(grad_x: Tensor) -> Tensor:
    return _collapse_cuda(grad_x, "sum")


def _collapse_backward_cuda(grad_hidden: Tensor, num_streams: int, mode: str) -> Tensor:
    from ..kernels import streams as kernel

    tokens = flat(grad_hidden, 1)
    sizes = (tokens.shape[0], num_streams, tokens.shape[1])
    grad_x = tuned(
        "expand",
        grad_hidden,
        sizes,
        lambda config: kernel.collapse_backward(
            tokens, num_streams, mean=mode == "mean", config=config
        ),
    )
    return leading(grad_x, grad_hidden.shape[:-1])


def _of_streams(x: Tensor, *_: Any) -> tuple[Tensor, int]:
    return x, x.shape[-2]


def _of_hidden(hidden: Tensor, num_streams: int, *_: Any) -> tuple[Tensor, int]:
    return hidden, num_streams


def _expand_fake(hidden: Tensor, num_streams: int) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], num_streams, hidden.shape[-1]))


def _expand_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Nothing to keep: the gradient of a copy is a sum."""


def _expand_backward_of(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None]:
    return _expand_backward(grad_x), None


def _expand_backward_cpu(grad_x: Tensor) -> Tensor:
    return gradients.expand_backward(grad_x).to(grad_x.dtype)


def _expand_backward_fake(grad_x: Tensor) -> Tensor:
    return grad_x.new_empty((*grad_x.shape[:-2], grad_x.shape[-1]))


def _collapse_fake(x: Tensor, mode: str) -> Tensor:
    return _expand_backward_fake(x)


def _collapse_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, ctx.mode = inputs
    ctx.num_streams = x.shape[-2]


def _collapse_backward_of(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, None]:
    return _collapse_backward(grad_hidden, ctx.num_streams, ctx.mode), None


def _collapse_backward_cpu(grad_hidden: Tensor, num_streams: int, mode: str) -> Tensor:
    return gradients.collapse_backward(grad_hidden, num_streams, mode).to(grad_hidden.dtype)


def _collapse_backward_fake(grad_hidden: Tensor, num_streams: int, mode: str) -> Tensor:
    return _expand_fake(grad_hidden, num_streams)


def _head_cpu(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, pre_eps: float
) -> tuple[Tensor, ...]:
    projection, inv_rms = reference.normalised_projection(x, phi, norm_eps)
    weights = torch.sigmoid(projection * alpha + bias) + pre_eps
    return reference.pre_apply(x, weights), projection, inv_rms


def _head_fake(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **_: Any) -> tuple[Tensor, ...]:
    tokens = x.shape[:-2]
    shapes = ((*tokens, phi.shape[0]), tokens)
    return (x.new_empty((*tokens, x.shape[-1])), *(phi.new_empty(shape) for shape in shapes))


def _head_backward_of(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    return _head_backward(*given(ctx, grads[:1]), *ctx.saved_tensors, **ctx.constants)


def _head_backward_cpu(*tensors: Tensor, norm_eps: float, pre_eps: float) -> tuple[Tensor, ...]:
    return rounded(gradients.head_backward(*tensors, pre_eps=pre_eps), *tensors[1:5])


def _head_backward_fake(*tensors: Tensor, **_: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in tensors[1:5])


def _head_backward_derived(*tensors: Tensor, norm_eps: float, pre_eps: float) -> tuple[Tensor, ...]:
    tensors = tensors[:-2]
    saved = reference.normalised_projection(tensors[1], tensors[2], norm_eps)
    return _head_backward_cpu(*tensors, *saved, norm_eps=norm_eps, pre_eps=pre_eps)


_expand_backward = define(
    "expand_backward(Tensor grad_x) -> Tensor grad_hidden",
    cpu=_expand_backward_cpu,
    cuda=on_cuda(
        "expand_backward", _expand_backward_cuda, _expand_backward_cpu, streams=_of_streams
    ),
    fake=_expand_backward_fake,
    **derive(_expand_backward_cpu),
)
_expand = define(
    "expand(Tensor hidden, SymInt num_streams) -> Tensor x",
    cpu=reference.expand,
    cuda=on_cuda("expand", _expand_cuda, reference.expand, streams=_of_hidden, dims=1),
    fake=_expand_fake,
    setup_context=_expand_setup_context,
    backward=_expand_backward_of,
)
_collapse_backward = define(
    "collapse_backward(Tensor grad_hidden, SymInt num_streams, str mode) -> Tensor grad_x",
    cpu=_collapse_backward_cpu,
    cuda=on_cuda(
        "collapse_backward",
        _collapse_backward_cuda,
        _collapse_backward_cpu,
        streams=_of_hidden,
        dims=1,
    ),
    fake=_collapse_backward_fake,
    **derive(_collapse_backward_cpu),
)
_collapse = define(
    'collapse(Tensor x, str mode="sum") -> Tensor hidden',
    cpu=reference.collapse,
    cuda=on_cuda("collapse", _collapse_cuda, reference.collapse, streams=_of_streams),
    fake=_collapse_fake,
    setup_context=_collapse_setup_context,
    backward=_collapse_backward_of,
)
_head_backward = define(
    "head_backward(Tensor grad_hidden, Tensor x, Tensor phi, Tensor alpha, Tensor bias, "
    "Tensor projection, Tensor inv_rms, *, float norm_eps, float pre_eps) "
    "-> (Tensor grad_x, Tensor grad_phi, Tensor grad_alpha, Tensor grad_bias)",
    cpu=_head_backward_cpu,
    fake=_head_backward_fake,
    **derive(_head_backward_derived),
)
_head = define(
    "head(Tensor x, Tensor phi, Tensor alpha, Tensor bias, *, float norm_eps, float pre_eps=0.0) "
    "-> (Tensor hidden, Tensor projection, Tensor inv_rms)",
    cpu=_head_cpu,
    fake=_head_fake,
    setup_context=keep_projection,
    backward=_head_backward_of,
)
