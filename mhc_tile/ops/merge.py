"""`merge`: write a layer's output into the streams and mix them, in one op."""

from typing import Any

from torch import Tensor

from .. import _checks, gradients, reference
from .._library import define, derive, rounded
from ._dispatch import backward_config, flat, leading, on_cuda, tuned


def merge(x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The streams after a sublayer (eq. 7): post-apply fused with the residual merge.

    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]`

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        layer_output: [..., C], dtype of x.
        h_post: [..., n], fp32 (fp64 where x is).
        h_res: [..., n, n], dtype of h_post, [out, in].

    Returns:
        x_next: [..., n, C], dtype of x, rounded once.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype or device is off; the message names it.

    Example:
        >>> x, layer_output = torch.randn(5, 4, 64), torch.randn(5, 64)
        >>> plain_residual = merge(x, layer_output, torch.ones(5, 4), torch.eye(4).expand(5, 4, 4))
        >>> torch.equal(plain_residual, x + layer_output.unsqueeze(-2))
        True
    """
    check_merge("merge", x, layer_output, h_post, h_res)
    return merge_op(x, layer_output, h_post, h_res)


def check_merge(op: str, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> None:
    """The checks that `merge` shares with `boundary`."""
    num_streams, width = _checks.streams(op, x)
    tokens = x.shape[:-2]
    _checks.like(op, "layer_output", layer_output, (*tokens, width), x)
    _checks.map_of(op, "h_post", h_post, (*tokens, num_streams), x)
    _checks.map_of(op, "h_res", h_res, (*tokens, num_streams, num_streams), x)


def _streams(x: Tensor, *_: Tensor) -> tuple[Tensor, int]:
    return x, x.shape[-2]


def merge_kernel(x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """`reference.merge` by a kernel."""
    from ..kernels import merge as kernel

    inputs = (flat(x, 2), flat(layer_output, 1), flat(h_post, 1), flat(h_res, 2))
    x_next = tuned(
        "merge", x, inputs[0].shape, lambda config: kernel.forward(*inputs, config=config)
    )
    return leading(x_next, x.shape[:-2])


def _fake(x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_x_next: Tensor) -> tuple[Tensor, ...]:
    return _merge_backward(grad_x_next, *ctx.saved_tensors)


def _backward_cpu(grad_x_next: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return rounded(gradients.merge_backward(grad_x_next, *inputs), *inputs)


def merge_backward_kernel(
    grad_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor | None
) -> tuple[Tensor, ...]:
    """`gradients.merge_backward` by a kernel, in the dtypes of the inputs."""
    from ..kernels import merge as kernel

    tokens = x.shape[:-2]
    tensors = (flat(x, 2), flat(layer_output, 1), flat(h_post, 1))
    mixing = None if h_res is None else flat(h_res, 2)
    grad = flat(grad_x_next, 2)

    def launch(config: Any) -> Any:
        config = config or backward_config(kernel, x)
        return kernel.backward(grad, *tensors, mixing, config=config)

    name = "merge_backward_maps" if h_res is None else "merge_backward"
    grads = tuned(name, x, tensors[0].shape, launch)
    grads = grads[1:] if h_res is None else grads
    return tuple(leading(value, tokens) for value in grads)


def _maps_kernel(
    grad_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor
) -> tuple[Tensor, ...]:
    return merge_backward_kernel(grad_x_next, x, layer_output, h_post, None)


def _maps_cpu(grad_x_next: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    grads = gradients.merge_backward_maps(grad_x_next, *inputs)
    return rounded(grads, *inputs[1:], inputs[2])


def _maps_fake(
    grad_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor
) -> tuple[Tensor, ...]:
    square = h_post.new_empty((*h_post.shape, h_post.shape[-1]))
    return layer_output.new_empty(layer_output.shape), h_post.new_empty(h_post.shape), square


def _backward_fake(grad_x_next: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in inputs)


_merge_backward = define(
    "merge_backward(Tensor grad_x_next, Tensor x, Tensor layer_output, Tensor h_post, "
    "Tensor h_res) "
    "-> (Tensor grad_x, Tensor grad_layer_output, Tensor grad_h_post, Tensor grad_h_res)",
    cpu=_backward_cpu,
    cuda=on_cuda("merge_backward", merge_backward_kernel, _backward_cpu, streams=_streams),
    fake=_backward_fake,
    **derive(_backward_cpu),
)
merge_backward_maps = define(
    "_merge_backward_maps(Tensor grad_x_next, Tensor x, Tensor layer_output, Tensor h_post) "
    "-> (Tensor grad_layer_output, Tensor grad_h_post, Tensor grad_h_res)",
    cpu=_maps_cpu,
    cuda=on_cuda("merge_backward_maps", _maps_kernel, _maps_cpu, streams=_streams),
    fake=_maps_fake,
    **derive(_maps_cpu),
)
merge_op = define(
    "merge(Tensor x, Tensor layer_output, Tensor h_post, Tensor h_res) -> Tensor x_next",
    cpu=reference.merge,
    cuda=on_cuda("merge", merge_kernel, reference.merge, streams=_streams),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
