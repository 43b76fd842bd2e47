"""`merge`: write a layer's output into the streams and mix them, in one op."""

from torch import Tensor

from .. import _checks, gradients, reference
from ._definition import Op


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
    return MERGE.call(x, layer_output, h_post, h_res)


def check_merge(op: str, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> None:
    """The checks that `merge` shares with `boundary`."""
    num_streams, hidden_size = _checks.streams(op, x)
    tokens = x.shape[:-2]
    _checks.map_of(op, "layer_output", layer_output, (*tokens, hidden_size), x, x.dtype)
    _checks.map_of(op, "h_post", h_post, (*tokens, num_streams), x)
    _checks.map_of(op, "h_res", h_res, (*tokens, num_streams, num_streams), x)


MERGE = Op(
    "merge", ("x", "layer_output", "h_post", "h_res"), ("x_next",),
    reference.merge, gradients.merge_backward,
    kernel="merge", gradient_kernel="merge_backward",
)  # fmt: skip
# Its backward without grad_x, which the backward of `pre` forms.
MERGE_BACKWARD_MAPS = Op(
    "_merge_backward_maps",
    ("grad_x_next", "x", "layer_output", "h_post"),
    ("grad_layer_output", "grad_h_post", "grad_h_res"),
    gradients.merge_backward_maps,
    kernel="merge_backward_maps",
)
