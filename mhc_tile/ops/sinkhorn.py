"""`sinkhorn`: from logits to a doubly stochastic matrix."""

from typing import Any

from torch import Tensor

from .. import _checks, gradients, reference
from .._library import define, derive
from ._dispatch import flat, leading, on_cuda, tuned


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
    return _sinkhorn(logits, iters=iters, eps=eps)


def _streams(logits: Tensor, *_: Tensor) -> tuple[Tensor, int]:
    return logits, logits.shape[-1]


def _cuda(logits: Tensor, *, iters: int, eps: float) -> Tensor:
    from ..kernels import sinkhorn as kernel

    tokens = flat(logits, 2)
    sizes = (tokens.shape[0], tokens.shape[1], 0)
    h_res = tuned(
        "sinkhorn",
        logits,
        sizes,
        lambda config: kernel.forward(tokens, iters=iters, eps=eps, config=config),
    )
    return leading(h_res, logits.shape[:-2])


def _fake(logits: Tensor, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.constants = keyword_only_inputs


def _backward(ctx: Any, grad_h_res: Tensor) -> Tensor:
    return _sinkhorn_backward(grad_h_res, *ctx.saved_tensors, **ctx.constants)


def _backward_cuda(grad_h_res: Tensor, logits: Tensor, *, iters: int, eps: float) -> Tensor:
    from ..kernels import sinkhorn as kernel

    tensors = (flat(grad_h_res, 2), flat(logits, 2))
    sizes = (tensors[1].shape[0], tensors[1].shape[1], 0)
    grad_logits = tuned(
        "sinkhorn_backward",
        logits,
        sizes,
        lambda config: kernel.backward(
            *tensors, iters=iters, eps=eps, config=kernel.fitting(config, tensors[1], iters)
        ),
    )
    return leading(grad_logits, logits.shape[:-2])


def _backward_fake(grad_h_res: Tensor, logits: Tensor, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_sinkhorn_backward = define(
    "sinkhorn_backward(Tensor grad_h_res, Tensor logits, *, int iters, float eps) "
    "-> Tensor grad_logits",
    cpu=gradients.sinkhorn_backward,
    cuda=on_cuda(
        "sinkhorn_backward", _backward_cuda, gradients.sinkhorn_backward, streams=_streams
    ),
    fake=_backward_fake,
    **derive(gradients.sinkhorn_backward),
)
_sinkhorn = define(
    "sinkhorn(Tensor logits, *, int iters=20, float eps=0.0) -> Tensor h_res",
    cpu=reference.sinkhorn,
    cuda=on_cuda("sinkhorn", _cuda, reference.sinkhorn, streams=_streams),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
