"""Matrix products by groups of rows, and the permutations that make and undo the groups.

`grouped_linear` multiplies rows [R, K], sorted by group, by one matrix per group. For operands that
torch's grouped matmul accepts (bf16 on CUDA, widths that are multiples of 8) it is one launch that
reads the groups' ends on the device. From compute capability 9.0 on this needs no host sync, and
CUDA graphs may capture it. Elsewhere it is a loop over the groups, which waits for the ends. Both
are inside a torch op, so `torch.compile(fullgraph=True)` does not trace them. The gradients are the
same ops, to any order.

Axes: R rows, G groups, K and N widths, T tokens of which each has M rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import define, under_transforms


def grouped_linear(
    rows_RK: Tensor, weights_GNK: Tensor, ends_G: Tensor, transposed: bool = False
) -> Tensor:
    """`out[r] = weights[g(r)] @ rows[r]` [R, N], or with the transposed matrices.

    Args:
        rows_RK: [R, K], sorted by group.
        weights_GNK: [G, N, K], or [G, K, N] if transposed; dtype of rows.
        ends_G: [G], int32, ascending: group g is the rows ends[g - 1] (0 for the first) to
            ends[g]; the last is R.
        transposed: multiply by the transposes of weights.

    Example:
        >>> weights = torch.stack([torch.eye(2), 3 * torch.eye(2)])
        >>> grouped_linear(torch.ones(3, 2), weights, torch.tensor([1, 3], dtype=torch.int32))
        tensor([[1., 1.],
                [3., 3.],
                [3., 3.]])
    """
    return _linear(rows_RK, weights_GNK, ends_G, transposed)


def spread(values: Tensor, source_R: Tensor, slots_TM: Tensor) -> Tensor:
    """`out[r] = values[source[r]]`: [T, ...] to [R, ...].

    Slot [t, m], int64, is the m-th r whose source is t. `spread` and `gather` are each other's
    gradient. Both only read by index, without atomics: gradients have the same bits every time.
    """
    return _by_index(values, source_R, slots_TM, False)


def gather(rows: Tensor, source_R: Tensor, slots_TM: Tensor) -> Tensor:
    """`out[t] = sum_m rows[slots[t, m]]`, summed in at least fp32: the transpose of `spread`."""
    return _by_index(rows, source_R, slots_TM, True)


def _by_index(*arguments: Any) -> Tensor:
    return (_ByIndex.forward if under_transforms() else _ByIndex.apply)(*arguments)


class _ByIndex(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, source_R: Tensor, slots_TM: Tensor, gathers: bool) -> Tensor:
        if gathers:  # autocast on CUDA would return fp32
            return values[slots_TM].sum(1, dtype=values.dtype)
        return values[source_R]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.gathers = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _by_index(grad, *ctx.saved_tensors, not ctx.gathers), None, None, None


def _fits(rows: Tensor, other: Tensor, *widths: int) -> bool:
    """Whether torch's grouped matmul accepts them: bf16, strides of whole 16 bytes, not empty."""
    bf16 = rows.dtype == other.dtype == torch.bfloat16
    return bf16 and rows.shape[0] > 0 and all(width % 8 == 0 for width in widths)


def _sizes(ends_G: Tensor) -> list[int]:
    try:
        ends = ends_G.tolist()
    except RuntimeError as error:
        raise RuntimeError(
            "experts: the rows of each expert must be known on the host, got a batch of them: "
            "torch.func.vmap cannot go around another transform of a mixture of experts"
        ) from error
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _linear_loop(rows_RK: Tensor, weights_GNK: Tensor, ends_G: Tensor, transposed: bool) -> Tensor:
    matrices = weights_GNK if transposed else weights_GNK.mT
    parts = rows_RK.split(_sizes(ends_G))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def _linear_cuda(rows_RK: Tensor, weights_GNK: Tensor, ends_G: Tensor, transposed: bool) -> Tensor:
    if not _fits(rows_RK, weights_GNK, *weights_GNK.shape[1:]):
        return _linear_loop(rows_RK, weights_GNK, ends_G, transposed)
    return F.grouped_mm(rows_RK, weights_GNK if transposed else weights_GNK.mT, offs=ends_G)


def _linear_fake(rows_RK: Tensor, weights_GNK: Tensor, ends_G: Tensor, transposed: bool) -> Tensor:
    return rows_RK.new_empty((rows_RK.shape[0], weights_GNK.shape[-1 if transposed else -2]))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.transposed = inputs[3:] == (True,)


def _linear_backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
    rows_RK, weights_GNK, ends_G = ctx.saved_tensors
    grad_rows = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_rows = _linear(grad_RN, weights_GNK, ends_G, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        pair = (rows_RK, grad_RN) if ctx.transposed else (grad_RN, rows_RK)
        grad_weights = _outer(*pair, ends_G)
    return grad_rows, grad_weights, None, None


def _outer_loop(left_RN: Tensor, right_RK: Tensor, ends_G: Tensor) -> Tensor:
    sizes = _sizes(ends_G)
    pairs = zip(left_RN.split(sizes), right_RK.split(sizes), strict=True)
    return torch.stack([left.mT @ right for left, right in pairs])


def _outer_cuda(left_RN: Tensor, right_RK: Tensor, ends_G: Tensor) -> Tensor:
    if not _fits(left_RN, right_RK, left_RN.shape[1], right_RK.shape[1]):
        return _outer_loop(left_RN, right_RK, ends_G)
    return F.grouped_mm(left_RN.mT, right_RK, offs=ends_G)


def _outer_fake(left_RN: Tensor, right_RK: Tensor, ends_G: Tensor) -> Tensor:
    return left_RN.new_empty((ends_G.shape[0], left_RN.shape[-1], right_RK.shape[-1]))


def _outer_backward(ctx: Any, grad_GNK: Tensor) -> tuple[Tensor | None, ...]:
    left_RN, right_RK, ends_G = ctx.saved_tensors
    grad_left = grad_right = None
    if ctx.needs_input_grad[0]:
        grad_left = _linear(right_RK, grad_GNK, ends_G, False)
    if ctx.needs_input_grad[1]:
        grad_right = _linear(left_RN, grad_GNK, ends_G, True)
    return grad_left, grad_right, None


_outer = define(
    "_grouped_outer(Tensor left, Tensor right, Tensor ends) -> Tensor",
    cpu=_outer_loop, cuda=_outer_cuda, fake=_outer_fake,
    setup_context=_save, backward=_outer_backward,
)  # fmt: skip
_linear = define(
    "_grouped_linear(Tensor rows, Tensor weights, Tensor ends, bool transposed) -> Tensor",
    cpu=_linear_loop, cuda=_linear_cuda, fake=_linear_fake,
    setup_context=_save, backward=_linear_backward,
)  # fmt: skip
