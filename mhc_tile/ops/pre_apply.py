"""`pre_apply`: what the layer reads from the streams."""

from torch import Tensor

from .. import _checks, gradients, reference
from ._definition import Op


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
    return PRE_APPLY.call(x, h_pre)


PRE_APPLY = Op(
    "pre_apply", ("x", "h_pre"), ("layer_input",),
    reference.pre_apply, gradients.pre_apply_backward,
    kernel="pre_apply", gradient_kernel="pre_apply_backward",
)  # fmt: skip
