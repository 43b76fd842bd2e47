"""Grouped products against a loop in float64; permutations and their gradients."""

import pytest
import torch
from torch import Tensor

from compare import compare
from mhc_tile.models.grouped import gather, grouped_linear, spread

ENDS = {
    "ordinary": [3, 10, 12, 20],
    "empty groups": [0, 9, 9, 20],
    "one group": [0, 0, 20, 20],
    "no rows": [0, 0, 0, 0],
}


def operands(case: str, dtype: torch.dtype, device: str, transposed: bool) -> list[Tensor]:
    torch.manual_seed(0)
    ends = ENDS[case]
    shape = (4, 16, 24) if transposed else (4, 24, 16)
    rows = torch.randn(ends[-1], 16, dtype=dtype, device=device)
    weights = torch.randn(shape, dtype=dtype, device=device)
    return [rows, weights, torch.tensor(ends, dtype=torch.int32, device=device)]


def truth(rows: Tensor, weights: Tensor, ends: list[int], transposed: bool) -> Tensor:
    out = rows.new_zeros(len(rows), 24)
    for row in range(len(rows)):
        group = next(index for index, end in enumerate(ends) if row < end)
        matrix = weights[group].T if transposed else weights[group]
        out[row] = matrix @ rows[row]
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ENDS)
def test_products_and_gradients_match_float64(case, dtype, transposed, device):
    rows, weights, ends = operands(case, dtype, device, transposed)
    leaves = [rows.requires_grad_(), weights.requires_grad_()]
    out = grouped_linear(rows, weights, ends, transposed)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, cotangent)
    wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected = truth(*wide, ENDS[case], transposed)
    assert out.dtype == dtype
    if not len(rows):
        assert not any(grad.any() for grad in grads)
        return
    compare(out.cpu(), expected, k=4)
    expected = torch.autograd.grad(expected, wide, cotangent.cpu().double())
    for grad, value in zip(grads, expected, strict=True):
        compare(grad.cpu(), value, k=4)
    assert not grads[1][torch.diff(ends, prepend=ends[:1] * 0) == 0].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_and_gradgradcheck(transposed):
    rows, weights, ends = operands("empty groups", torch.float64, "cpu", transposed)
    inputs = (rows.requires_grad_(), weights.requires_grad_(), ends, transposed)
    assert torch.autograd.gradcheck(grouped_linear, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(grouped_linear, inputs, fast_mode=True)


@pytest.mark.parametrize("case", ["ordinary", "no rows"])
def test_opcheck(case, device):
    rows, weights, ends = operands(case, torch.float32, device, False)
    leaves = (rows.requires_grad_(), weights.requires_grad_())
    torch.library.opcheck(torch.ops.mhc_tile._grouped_linear.default, (*leaves, ends, False))
    left = torch.randn(len(rows), 24, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.mhc_tile._grouped_outer.default, (left, rows, ends))


def permutation(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Twelve rows of six tokens, and where each token's two rows are."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(device)
    return order // 2, order.argsort().view(6, 2)


def test_spread_and_gather_are_transposes():
    source, slots = permutation()
    values, rows = torch.randn(6, 5), torch.randn(12, 5)
    assert torch.equal(spread(values, source, slots), values[source])
    by_hand = torch.stack([rows[source == token].sum(0) for token in range(6)])
    assert (gather(rows, source, slots) - by_hand).abs().max() < 1e-6
    left = (spread(values, source, slots) * rows).sum()
    assert abs(left - (values * gather(rows, source, slots)).sum()) < 1e-5


@pytest.mark.parametrize("function", [spread, gather])
def test_gradients_of_permutations(function):
    source, slots = permutation()
    count = 6 if function is spread else 12
    value = torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (value, source, slots))
    assert torch.autograd.gradgradcheck(function, (value, source, slots))


@pytest.mark.gpu
def test_bf16_products_wait_for_nothing():
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("torch's grouped matmul waits for the ends before compute capability 9.0")
    rows, weights, ends = operands("empty groups", torch.bfloat16, "cuda", False)
    leaves = [rows.requires_grad_(), weights.requires_grad_()]
    torch.autograd.grad(grouped_linear(*leaves, ends).sum(), leaves)  # loads what is loaded once
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = torch.autograd.grad(grouped_linear(*leaves, ends).sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(grad.any() for grad in grads)
