"""`mapping`: from the residual streams to h_pre, h_post and the logits of h_res."""

from typing import Any

from torch import Tensor

from .. import _checks, gradients, reference
from ._definition import Op


def mapping(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    *, norm_eps: float, pre_eps: float = 0.0, post_scale: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
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
    _checks.number("mapping", "post_scale", post_scale, above=True)
    constants = {"norm_eps": norm_eps, "pre_eps": pre_eps, "post_scale": post_scale}
    return MAPPING.call(x, phi, alpha, bias, **constants)[:3]


def _with_projection(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, **constants: Any
) -> tuple[Tensor, ...]:
    """`reference.mapping`, and what the backward keeps."""
    projection, inv_rms = reference.normalised_projection(x, phi, norm_eps)
    maps = reference.maps(projection, alpha, bias, x.shape[-2], **constants)
    return (*maps, projection, inv_rms)


MAPPING = Op(
    "mapping", ("x", "phi", "alpha", "bias"), ("h_pre", "h_post", "h_res_logits"),
    _with_projection, gradients.mapping_backward,
    kernel="mapping", gradient_kernel="mapping_backward",
    kept=("projection", "inv_rms"),
    constants="float norm_eps, float pre_eps=0.0, float post_scale=2.0",
)  # fmt: skip
