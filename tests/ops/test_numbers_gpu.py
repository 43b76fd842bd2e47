"""What kernels/test_numbers.py shows in the emulator, through the public ops on a GPU."""

import pytest
import torch
from torch import Tensor

from cases import Shape, call, cotangents
from compare import relative_rms
from mhc_tile import mapping, pre, reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COUNTS = (7, 64, 4096)  # in as many forms


def inputs_of(dtype: torch.dtype, tokens: int, width: int = 128) -> list[Tensor]:
    return list(call("pre", Shape("gpu", (tokens,), width=width), dtype, "cuda").inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", COUNTS)
def test_a_nan_of_a_cotangent_shows_in_grad_phi(dtype, tokens):
    leaves = [value.requires_grad_() for value in inputs_of(dtype, tokens)]
    found = []
    for function in (pre, reference.pre):
        results = function(*leaves, norm_eps=1e-6)
        grads = list(cotangents(results))
        grads[1][2, 1] = float("nan")  # of h_post
        found.append(torch.autograd.grad(results, leaves, grads)[1].isfinite())
    assert (~found[0]).sum() == 512
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("norm_eps", [0.0, 1e-6])
def test_streams_whose_mean_square_is_subnormal(dtype, tokens, norm_eps):
    x, phi, alpha, bias = inputs_of(dtype, tokens)
    x.fill_(5e-20)
    x[1] = 0
    bias.zero_()
    inputs = [value.requires_grad_() for value in (x, phi, alpha, bias)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    for function, formula in ((mapping, reference.mapping), (pre, reference.pre)):
        results, truth = function(*inputs, norm_eps=norm_eps), formula(*wide, norm_eps=norm_eps)
        grads = cotangents(results)
        actual = (*results, *torch.autograd.grad(results, inputs, grads))
        truth = (*truth, *torch.autograd.grad(truth, wide, [grad.double() for grad in grads]))
        for value, expected in zip(actual, truth, strict=True):
            assert relative_rms(value, expected) < 1e-2


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6, 1e6])
@pytest.mark.parametrize("tokens", COUNTS)
def test_phi_of_any_magnitude_in_float16(tokens, scale):
    x, phi, alpha, bias = inputs_of(torch.float16, tokens)
    inputs = (x, phi * scale, alpha / scale, bias.zero_())
    results = mapping(*inputs, norm_eps=1e-6)
    truth = reference.mapping(*(value.double() for value in inputs), norm_eps=1e-6)
    for value, expected in zip(results, truth, strict=True):
        assert relative_rms(value, expected) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", COUNTS)
def test_an_infinity_in_phi_reaches_its_row_only(dtype, tokens):
    x, phi, *others = inputs_of(dtype, tokens)
    broken = phi.clone()
    broken[5, 40] = float("inf")  # of h_post
    finite = mapping(x, phi, *others, norm_eps=1e-6)
    results = mapping(x, broken, *others, norm_eps=1e-6)
    truth = reference.mapping(x, broken, *others, norm_eps=1e-6)
    assert torch.equal(results[0], finite[0])
    assert torch.equal(results[2], finite[2])
    rows = [0, 2, 3]
    assert torch.equal(results[1][:, rows], finite[1][:, rows])
    actual, expected = (value[1][:, 1].nan_to_num(7.0) for value in (results, truth))
    assert torch.equal(actual, expected)  # 0, 2 or NaN
