"""`expand`, `collapse` and `head`: entering and leaving the residual streams."""

import torch
from torch import Tensor

from .. import _checks, gradients, reference
from ._definition import Op

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
    return EXPAND.call(hidden, num_streams)


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
    return COLLAPSE.call(x, _checks.one_of("collapse", "mode", mode, MODES))


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
    num_streams, hidden_size = _checks.streams("head", x)
    _checks.map_of("head", "phi", phi, (num_streams, num_streams * hidden_size), x)
    _checks.map_of("head", "alpha", alpha, (1,), x)
    _checks.map_of("head", "bias", bias, (num_streams,), x)
    _checks.at_least("head", 0, norm_eps=norm_eps, pre_eps=pre_eps)
    return HEAD.call(x, phi, alpha, bias, norm_eps=norm_eps, pre_eps=pre_eps)[0]


def _head(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, pre_eps: float
) -> tuple[Tensor, ...]:
    """`reference.head`, and what the backward keeps."""
    projection, inv_rms = reference.normalised_projection(x, phi, norm_eps)
    weights = torch.sigmoid(projection * alpha + bias) + pre_eps
    return reference.pre_apply(x, weights), projection, inv_rms


EXPAND = Op(
    "expand", ("hidden",), ("x",),
    reference.expand, gradients.expand_backward,
    kernel="expand", gradient_kernel="collapse",
    reads=("grad_x",),
    arguments={"num_streams": "SymInt num_streams"},
)  # fmt: skip
COLLAPSE = Op(
    "collapse", ("x",), ("hidden",),
    reference.collapse, gradients.collapse_backward,
    kernel="collapse", gradient_kernel="expand",
    reads=("grad_hidden",),
    arguments={"mode": 'str mode="sum"'},
    gradient_arguments={"num_streams": "SymInt num_streams", "mode": "str mode"},
)  # fmt: skip
HEAD = Op(
    "head", ("x", "phi", "alpha", "bias"), ("hidden",),
    _head, gradients.head_backward,
    kept=("projection", "inv_rms"),
    constants="float norm_eps, float pre_eps=0.0",
)  # fmt: skip
