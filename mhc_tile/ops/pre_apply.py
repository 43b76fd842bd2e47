"""`pre_apply`: what the layer reads from the streams."""

from typing import Any

from torch import Tensor

from .. import _checks, gradients, reference
from .._library import define, derive, rounded
from ._dispatch import backward_config, flat, leading, on_cuda, tuned


def pre_apply(x: Tensor, h_pre: Tensor) -> Tensor:
    """Weighted sum of the streams: `layer_input[c] = sum_i h_pre[i] * x[i, c]` (eq. 7).

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        h_pre: [..., n], fp32 (fp64 where x is).

    Returns:
        layer_input: [..., C], dtype of x, summed in the dtype of h_pre.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype or device is off; the message names it.

    Example:
        >>> pre_apply(torch.ones(3, 4, 8), torch.full((3, 4), 0.25)).sum()
        tensor(24.)
    """
    _checks.streams("pre_apply", x)
    _checks.map_of("pre_apply", "h_pre", h_pre, x.shape[:-1], x)
    return _pre_apply(x, h_pre)


def _cuda(x: Tensor, h_pre: Tensor) -> Tensor:
    from ..kernels import pre_apply as kernel

    inputs = (flat(x, 2), flat(h_pre, 1))
    layer_input = tuned(
        "pre_apply", x, inputs[0].shape, lambda config: kernel.forward(*inputs, config=config)
    )
    return leading(layer_input, x.shape[:-2])


def _fake(x: Tensor, h_pre: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-2], x.shape[-1]))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_layer_input: Tensor) -> tuple[Tensor, ...]:
    return _pre_apply_backward(grad_layer_input, *ctx.saved_tensors)


def _backward_cpu(grad_layer_input: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return rounded(gradients.pre_apply_backward(grad_layer_input, *inputs), *inputs)


def _backward_cuda(grad_layer_input: Tensor, x: Tensor, h_pre: Tensor) -> tuple[Tensor, ...]:
    from ..kernels import pre_apply as kernel

    tensors = (flat(grad_layer_input, 1), flat(x, 2), flat(h_pre, 1))

    def launch(config: Any) -> tuple[Tensor, ...]:
        return kernel.backward(*tensors, config=config or backward_config(kernel, x))

    grads = tuned("pre_apply_backward", x, tensors[1].shape, launch)
    tokens = x.shape[:-2]
    return leading(grads[0], tokens), leading(grads[1], tokens)


def _backward_fake(grad_layer_input: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in inputs)


_pre_apply_backward = define(
    "pre_apply_backward(Tensor grad_layer_input, Tensor x, Tensor h_pre) "
    "-> (Tensor grad_x, Tensor grad_h_pre)",
    cpu=_backward_cpu,
    cuda=on_cuda(
        "pre_apply_backward",
        _backward_cuda,
        _backward_cpu,
        streams=lambda _, x, h_pre: (x, x.shape[-2]),
    ),
    fake=_backward_fake,
    **derive(_backward_cpu),
)
_pre_apply = define(
    "pre_apply(Tensor x, Tensor h_pre) -> Tensor layer_input",
    cpu=reference.pre_apply,
    cuda=on_cuda(
        "pre_apply", _cuda, reference.pre_apply, streams=lambda x, h_pre: (x, x.shape[-2])
    ),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
