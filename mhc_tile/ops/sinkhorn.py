"""`sinkhorn`: from logits to a doubly stochastic matrix."""

from torch import Tensor

from .. import _checks, gradients, reference
from ._definition import Op


def sinkhorn(logits: Tensor, *, iters: int = 20, eps: float = 0.0) -> Tensor:
    """Normalise exp(logits) over columns, then rows, `iters` times (eqs. 9 and 19).

    `M = exp(logits)`; `iters` times `M[o, i] /= sum_o M[o, i]`, `M[o, i] /= sum_i M[o, i]`

    The iteration ends on rows: without eps they sum to 1 exactly (forward gain 1), and how far the
    column sums are from 1 tells how far it has converged. Logits of any size below 1.7e38 are
    safe. With eps (DeepSeek-V4's convention), eps is added to the entries after the first column
    normalisation and to every later denominator.

    Args:
        logits: [..., n, n], fp32 or fp64, [out, in].
        iters: at least 1.
        eps: at least 0.

    Returns:
        h_res: [..., n, n], dtype of logits, [out, in].

    Raises:
        TypeError: logits is not a tensor.
        ValueError: A shape, dtype or constant is off; the message names it.

    Example:
        >>> h_res = sinkhorn(torch.randn(10, 4, 4))
        >>> bool((h_res.sum(-1) - 1).abs().max() < 1e-6)
        True
    """
    _checks.square("sinkhorn", "logits", logits)
    _checks.count("sinkhorn", iters=iters)
    _checks.at_least("sinkhorn", 0, eps=eps)
    return SINKHORN.call(logits, iters=iters, eps=eps)


SINKHORN = Op(
    "sinkhorn", ("logits",), ("h_res",),
    reference.sinkhorn, gradients.sinkhorn_backward,
    kernel="sinkhorn", gradient_kernel="sinkhorn_backward",
    constants="int iters=20, float eps=0.0",
)  # fmt: skip
