"""The gradients of `reference.py`, written out: `<name>_backward` for every op.

These are the CPU implementations of the backward ops and what the backward kernels compute, line by
line; the tests compare them with autograd of the reference in float64. Names and shapes are those
of `reference.py`; `grad_<name>` is the cotangent of `<name>`. A function returns the gradients of
its forward's tensors, in their order and in at least float32: the ops round them to the dtypes of
the inputs. It ignores those constants of its forward that its formulas do not contain.

A forward op keeps for its backward two small tensors that would cost a pass over x to rebuild:
`projection` and `inv_rms`. Sinkhorn's iterates are recomputed.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import first_iteration, normalise, wide


def merge_backward(
    grad_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor
) -> tuple[Tensor, ...]:
    """Gradient of `reference.merge`.

    `grad_x[i, c] = sum_o h_res[o, i] * grad_x_next[o, c]`
    `grad_layer_output[c] = sum_o h_post[o] * grad_x_next[o, c]`
    `grad_h_post[o] = sum_c grad_x_next[o, c] * layer_output[c]`
    `grad_h_res[o, i] = sum_c grad_x_next[o, c] * x[i, c]`
    """
    grads = merge_backward_maps(grad_x_next, x, layer_output, h_post)
    return (h_res.mT @ wide(grad_x_next), *grads)


def merge_backward_maps(
    grad_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same without grad_x: grad_layer_output, grad_h_post, grad_h_res."""
    grad, x, layer_output = wide(grad_x_next), wide(x), wide(layer_output)
    return (
        (h_post.unsqueeze(-1) * grad).sum(-2),
        (grad * layer_output.unsqueeze(-2)).sum(-1),
        grad @ x.mT,
    )


def pre_apply_backward(grad_layer_input: Tensor, x: Tensor, h_pre: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `reference.pre_apply`.

    `grad_x[i, c] = h_pre[i] * grad_layer_input[c]`
    `grad_h_pre[i] = sum_c grad_layer_input[c] * x[i, c]`
    """
    grad = wide(grad_layer_input).unsqueeze(-2)
    return h_pre.unsqueeze(-1) * grad, (grad * wide(x)).sum(-1)


def _softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    return output * (grad - (grad * output).sum(dim, keepdim=True))


def _normalise_backward(grad: Tensor, output: Tensor, total: Tensor, dim: int) -> Tensor:
    """Gradient of `output = matrix / total`, `total = sum over dim of matrix + eps`."""
    return (grad - (grad * output).sum(dim, keepdim=True)) / total


def sinkhorn_backward(grad_h_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """Gradient of `reference.sinkhorn`: repeat the iteration, differentiate it in reverse."""
    first = h_res = first_iteration(logits, eps)
    steps = []
    for _ in range(iters - 1):
        for dim in (-2, -1):
            h_res, total = normalise(h_res, dim, eps)
            steps.append((h_res, total, dim))
    grad = grad_h_res
    for output, total, dim in reversed(steps):
        grad = _normalise_backward(grad, output, total, dim)
    columns = torch.softmax(logits, -2)
    if eps == 0:
        grad = _softmax_backward(grad, first, -1)
        return grad - columns * grad.sum(-2, keepdim=True)
    grad = _normalise_backward(grad, *normalise(columns + eps, -1, eps), -1)
    return _softmax_backward(grad, columns, -2)


def project_backward(
    grad_projection: Tensor, x: Tensor, phi: Tensor, projection: Tensor, inv_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of `reference.project` with `reference.inverse_rms`: grad_x and grad_phi.

    `grad_raw[k] = grad_projection[k] * inv_rms`
    `along = sum_k grad_projection[k] * projection[k] / (n*C)`
    `grad_x[i, c] = sum_k grad_raw[k] * phi[k, i*C + c] - along * inv_rms * (x[i, c] * inv_rms)`
    `grad_phi[k, i*C + c] = sum over tokens of grad_raw[k] * x[i, c]`

    A token of zeros has inv_rms 0 and so no gradient.
    """
    inv_rms = inv_rms.unsqueeze(-1)
    x = wide(x).flatten(-2)
    grad_raw = grad_projection * inv_rms
    along = (grad_projection * projection).sum(-1, keepdim=True) / x.shape[-1]
    grad_x = grad_raw @ phi - along * inv_rms * (x * inv_rms)
    grad_phi = grad_raw.reshape(-1, grad_raw.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return grad_x, grad_phi


def maps_backward(
    grad_h_pre: Tensor, grad_h_post: Tensor, grad_h_res_logits: Tensor,
    projection: Tensor, alpha: Tensor, bias: Tensor, *, post_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `reference.maps`.

    `grad_logits = [grad_h_pre * s' | post_scale * grad_h_post * s' | grad_h_res_logits]`, where
    `s' = sigmoid(logits) * (1 - sigmoid(logits))`
    `grad_projection[k] = alpha[part of k] * grad_logits[k]`
    `grad_alpha[p] = sum over tokens and k in p of grad_logits[k] * projection[k]`
    `grad_bias[k] = sum over tokens of grad_logits[k]`
    """
    n = grad_h_pre.shape[-1]
    gates = reference.spread(alpha, n)
    pre, post, _ = reference.split(torch.sigmoid(projection * gates + bias), n)
    grad_pre = grad_h_pre * pre * (1 - pre)
    grad_post = post_scale * grad_h_post * post * (1 - post)
    grad_logits = torch.cat([grad_pre, grad_post, grad_h_res_logits.flatten(-2)], -1)
    grad_gates = _sum_tokens(grad_logits * projection)
    grad_alpha = torch.stack([part.sum() for part in reference.split(grad_gates, n)])
    return grad_logits * gates, grad_alpha, _sum_tokens(grad_logits)


def _sum_tokens(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).sum(0)


def mapping_backward(
    grad_h_pre: Tensor, grad_h_post: Tensor, grad_h_res_logits: Tensor,
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, projection: Tensor, inv_rms: Tensor,
    *, post_scale: float, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradient of `reference.mapping`."""
    grad_maps = (grad_h_pre, grad_h_post, grad_h_res_logits)
    grad_projection, *grad_gates = maps_backward(
        *grad_maps, projection, alpha, bias, post_scale=post_scale
    )
    grad_x, grad_phi = project_backward(grad_projection, x, phi, projection, inv_rms)
    return grad_x.unflatten(-1, x.shape[-2:]), grad_phi, *grad_gates


def pre_backward(
    grad_layer_input: Tensor, grad_h_post: Tensor, grad_h_res: Tensor,
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, projection: Tensor, inv_rms: Tensor,
    grad_x_part: Tensor | None = None, h_res: Tensor | None = None,
    *, pre_eps: float, post_scale: float, iters: int, sinkhorn_eps: float, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradient of `reference.pre`, to whose grad_x another gradient of x may be added.

    Without h_res that is grad_x_part itself. With h_res, grad_x_part is the cotangent of `merge` on
    the same x, and what is added is the gradient that `merge` has:
    `grad_x[i, c] += sum_o h_res[o, i] * grad_x_part[o, c]`
    """
    h_pre, _, h_res_logits = reference.maps(
        projection, alpha, bias, x.shape[-2], pre_eps=pre_eps, post_scale=post_scale
    )
    grad_x_read, grad_h_pre = pre_apply_backward(grad_layer_input, x, h_pre)
    grad_h_res_logits = sinkhorn_backward(grad_h_res, h_res_logits, iters, sinkhorn_eps)
    grad_maps = (grad_h_pre, grad_h_post, grad_h_res_logits)
    grad_x, *grad_parameters = mapping_backward(
        *grad_maps, x, phi, alpha, bias, projection, inv_rms, post_scale=post_scale
    )
    grad_x = grad_x_read + grad_x
    if grad_x_part is not None:
        part = wide(grad_x_part)
        grad_x = grad_x + (part if h_res is None else h_res.mT @ part)
    return grad_x, *grad_parameters


def boundary_backward(
    grad_x_next: Tensor, grad_layer_input: Tensor,
    grad_h_post_next: Tensor, grad_h_res_next: Tensor,
    x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, projection: Tensor, inv_rms: Tensor, x_next: Tensor,
    **constants: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradient of `reference.boundary`."""
    grad_outputs = (grad_layer_input, grad_h_post_next, grad_h_res_next)
    saved = (x_next, phi, alpha, bias, projection, inv_rms)
    grad_x_next, *grad_parameters = pre_backward(*grad_outputs, *saved, grad_x_next, **constants)
    grads = merge_backward(grad_x_next, x, layer_output, h_post, h_res)
    return (*grads, *grad_parameters)


def expand_backward(grad_x: Tensor) -> Tensor:
    """Gradient of `reference.expand`: `grad_hidden[c] = sum_i grad_x[i, c]`."""
    return wide(grad_x).sum(-2)


def collapse_backward(grad_hidden: Tensor, num_streams: int, mode: str) -> Tensor:
    """Gradient of `reference.collapse`: `grad_x[i, c] = grad_hidden[c]`, over n for the mean."""
    scale = 1 / num_streams if mode == "mean" else 1.0
    return reference.expand(wide(grad_hidden) * scale, num_streams)


def head_backward(
    grad_hidden: Tensor, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    projection: Tensor, inv_rms: Tensor, *, pre_eps: float, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradient of `reference.head`."""
    weights = torch.sigmoid(projection * alpha + bias)
    grad_x_read, grad_weights = pre_apply_backward(grad_hidden, x, weights + pre_eps)
    grad_logits = grad_weights * weights * (1 - weights)
    grad_x, grad_phi = project_backward(grad_logits * alpha, x, phi, projection, inv_rms)
    grad_alpha = (grad_logits * projection).sum().reshape(1)
    grad_x = grad_x_read + grad_x.unflatten(-1, x.shape[-2:])
    return grad_x, grad_phi, grad_alpha, _sum_tokens(grad_logits)
