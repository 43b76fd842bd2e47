"""`mapping`: from the residual streams to h_pre, h_post and the logits of h_res."""

from typing import Any

from torch import Tensor

from .. import _checks, gradients, reference
from .._library import define, derive, rounded
from ._dispatch import flat, leading, on_cuda, tuned
from ._saved import given, keep_projection


def mapping(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    norm_eps: float,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project the RMS-normalised streams to the maps of one sublayer (eqs. 14-18).

    `projection[k] = sum_{i,c} phi[k, i*C + c] * x[i, c] / sqrt(mean_{i,c} x[i, c]^2 + norm_eps)`
    `logits[k] = alpha[part of k] * projection[k] + bias[k]`, parts packed pre (n), post (n),
    res (n*n, row-major [out, in])
    `h_pre = sigmoid(logits_pre) + pre_eps`, `h_post = post_scale * sigmoid(logits_post)`

    A token of zeros has `projection = 0`, and no gradient reaches it through the projection.

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. The residual streams. A copy is made if it is not
            contiguous.
        phi: [n*n + 2n, n*C], fp32 (fp64 where x is). The projection.
        alpha: [3], dtype of phi. Gates of pre, post and res.
        bias: [n*n + 2n], dtype of phi.
        norm_eps: added to the mean of squares; at least 0.
        pre_eps: added to h_pre; at least 0.
        post_scale: the upper bound of h_post; above 0.

    Returns:
        h_pre [..., n], h_post [..., n] and h_res_logits [..., n, n] ([out, in]), in phi's dtype.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x = torch.randn(2, 5, 4, 64, dtype=torch.bfloat16)
        >>> phi, alpha, bias = torch.randn(24, 256), torch.full((3,), 0.01), torch.zeros(24)
        >>> h_pre, h_post, h_res_logits = mapping(x, phi, alpha, bias, norm_eps=1e-6)
        >>> h_pre.shape, h_post.shape, h_res_logits.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5, 4]), torch.Size([2, 5, 4, 4]))
    """
    _checks.parameters("mapping", x, phi, alpha, bias)
    _checks.at_least("mapping", 0, norm_eps=norm_eps, pre_eps=pre_eps)
    _checks.positive("mapping", post_scale=post_scale)
    constants = {"norm_eps": norm_eps, "pre_eps": pre_eps, "post_scale": post_scale}
    return _mapping(x, phi, alpha, bias, **constants)[:3]


def _cpu(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, **constants: Any
) -> tuple[Tensor, ...]:
    projection, inv_rms = reference.normalised_projection(x, phi, norm_eps)
    maps = reference.maps(projection, alpha, bias, x.shape[-2], **constants)
    return (*maps, projection, inv_rms)


def _streams(x: Tensor, *_: Tensor) -> tuple[Tensor, int]:
    return x, x.shape[-2]


def _cuda(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **constants: Any
) -> tuple[Tensor, ...]:
    from ..kernels import mapping as kernel

    inputs = (flat(x, 2), phi, alpha, bias)
    results = tuned(
        "mapping",
        x,
        inputs[0].shape,
        lambda config: kernel.forward(*inputs, **constants, config=config),
    )
    tokens = x.shape[:-2]
    return tuple(leading(value, tokens) for value in results)


def _fake(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **_: Any) -> tuple[Tensor, ...]:
    n, tokens = x.shape[-2], x.shape[:-2]
    shapes = ((*tokens, n), (*tokens, n), (*tokens, n, n), (*tokens, phi.shape[0]), tokens)
    return tuple(phi.new_empty(shape) for shape in shapes)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    return _mapping_backward(*given(ctx, grads[:3]), *ctx.saved_tensors, **ctx.constants)


def _backward_cpu(*tensors: Tensor, post_scale: float, **_: Any) -> tuple[Tensor, ...]:
    grads = gradients.mapping_backward(*tensors, post_scale=post_scale)
    return rounded(grads, *tensors[3:7])


def _backward_cuda(
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
    norm_eps: float,
    **constants: Any,
) -> tuple[Tensor, ...]:
    from ..kernels import mapping_backward as kernel

    grad_maps = (flat(grad_h_pre, 1), flat(grad_h_post, 1), flat(grad_h_res_logits, 2))
    saved = (flat(projection, 1), flat(inv_rms, 0))
    tensors = (*grad_maps, flat(x, 2), phi, alpha, bias, *saved)
    grad_x, *grads = tuned(
        "mapping_backward",
        x,
        tensors[3].shape,
        lambda config: kernel.backward(*tensors, **constants, config=config),
    )
    return leading(grad_x, x.shape[:-2]), *grads


def _backward_fake(*tensors: Tensor, **_: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in tensors[3:7])


def _backward_derived(*tensors: Tensor, norm_eps: float, **constants: Any) -> tuple[Tensor, ...]:
    tensors = tensors[:-2]
    saved = reference.normalised_projection(tensors[3], tensors[4], norm_eps)
    return _backward_cpu(*tensors, *saved, **constants)


_mapping_backward = define(
    "mapping_backward(Tensor grad_h_pre, Tensor grad_h_post, Tensor grad_h_res_logits, Tensor x, "
    "Tensor phi, Tensor alpha, Tensor bias, Tensor projection, Tensor inv_rms, *, float norm_eps, "
    "float pre_eps, float post_scale) "
    "-> (Tensor grad_x, Tensor grad_phi, Tensor grad_alpha, Tensor grad_bias)",
    cpu=_backward_cpu,
    cuda=on_cuda(
        "mapping_backward",
        _backward_cuda,
        _backward_cpu,
        streams=lambda *tensors: (tensors[3], tensors[3].shape[-2]),
    ),
    fake=_backward_fake,
    **derive(_backward_derived),
)
_mapping = define(
    "mapping(Tensor x, Tensor phi, Tensor alpha, Tensor bias, *, float norm_eps, "
    "float pre_eps=0.0, float post_scale=2.0) "
    "-> (Tensor h_pre, Tensor h_post, Tensor h_res_logits, Tensor projection, Tensor inv_rms)",
    cpu=_cpu,
    cuda=on_cuda("mapping", _cuda, _cpu, streams=_streams),
    fake=_fake,
    setup_context=keep_projection,
    backward=_backward,
)
