"""The specification against loops written from the paper, and its defined corners."""

import math

import pytest
import torch

from cases import Shape, tensors
from compare import largest, relative_rms
from mhc_tile import reference

F64 = torch.float64


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def sinkhorn_loop(logits: list[list[float]], iters: int) -> list[list[float]]:
    """Eq. 9 as the paper writes it, on exponentials, in Python floats."""
    n = range(len(logits))
    m = [[math.exp(value) for value in row] for row in logits]
    for _ in range(iters):
        columns = [sum(m[o][i] for o in n) for i in n]
        m = [[m[o][i] / columns[i] for i in n] for o in n]
        rows = [sum(m[o]) for o in n]
        m = [[m[o][i] / rows[o] for i in n] for o in n]
    return m


def test_sublayer_matches_loops_over_scalars():
    n, width, eps = 3, 5, 1e-6
    x, phi, layer_output = random(n, width), random(15, 15, seed=1), random(width, seed=2)
    alpha, bias = random(3, seed=3), random(15, seed=4)

    flat = [x[i, c].item() for i in range(n) for c in range(width)]
    inv_rms = 1 / math.sqrt(sum(v * v for v in flat) / len(flat) + eps)
    gates = [alpha[0]] * n + [alpha[1]] * n + [alpha[2]] * n * n
    logits = [
        (sum(flat[j] * phi[k, j] for j in range(len(flat))) * inv_rms * gates[k] + bias[k]).item()
        for k in range(15)
    ]
    h_pre = [sigmoid(value) for value in logits[:n]]
    h_post = [2 * sigmoid(value) for value in logits[n : 2 * n]]
    h_res = sinkhorn_loop([logits[2 * n + o * n : 2 * n + o * n + n] for o in range(n)], 20)
    layer_input = [sum(h_pre[i] * x[i, c] for i in range(n)) for c in range(width)]
    x_next = [
        [
            sum(h_res[o][i] * x[i, c] for i in range(n)) + h_post[o] * layer_output[c]
            for c in range(width)
        ]
        for o in range(n)
    ]

    actual_input, actual_post, actual_res = reference.pre(x, phi, alpha, bias, norm_eps=eps)
    assert largest(actual_input, torch.tensor(layer_input, dtype=F64)) < 1e-13
    assert largest(actual_post, torch.tensor(h_post, dtype=F64)) < 1e-13
    assert largest(actual_res, torch.tensor(h_res, dtype=F64)) < 1e-13
    merged = reference.merge(x, layer_output, actual_post, actual_res)
    assert largest(merged, torch.tensor(x_next, dtype=F64)) < 1e-13


def deepseek_v4_comb(logits_in_out: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    """The algorithm in DeepSeek-V4's convention, [in, out]."""
    comb = torch.softmax(logits_in_out, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_sinkhorn_is_deepseek_v4s_transposed(eps):
    logits = random(2000, 4, 4) * 3
    comb = deepseek_v4_comb(logits.mT, eps, 20)
    assert largest(reference.sinkhorn(logits, 20, eps), comb.mT) < 1e-14


def test_sinkhorn_ends_on_rows_and_epsilon_matters():
    logits = random(2000, 4, 4) * 3
    h_res = reference.sinkhorn(logits)
    assert (h_res.sum(-1) - 1).abs().max() < 1e-14
    assert (h_res.sum(-2) - 1).abs().max() > 1e-6  # columns are what has not converged
    assert largest(reference.sinkhorn(logits, 500), reference.sinkhorn(logits, 1000)) < 1e-3
    assert largest(h_res, reference.sinkhorn(logits, 20, 1e-6)) > 1e-3


def test_a_permutation_lands_where_the_specification_says():
    # h_res[o, i] = 1 for o = i + 1: stream 0 must land in stream 1, not in the last one.
    logits = torch.full((4, 4), -60.0, dtype=F64)
    for i in range(4):
        logits[(i + 1) % 4, i] = 60.0
    h_res = reference.sinkhorn(logits)
    x = random(4, 8)
    x_next = reference.merge(x, torch.zeros(8, dtype=F64), torch.zeros(4, dtype=F64), h_res)
    assert torch.equal(x_next[1], x[0])
    assert torch.equal(x_next[0], x[3])


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_logits_of_scale_100_stay_finite_and_keep_their_rows(dtype):
    logits = (random(4000, 4, 4) * 100).to(dtype).requires_grad_()
    h_res = reference.sinkhorn(logits)
    assert torch.isfinite(h_res).all()
    assert (h_res.sum(-1) - 1).abs().max() < 10 * torch.finfo(dtype).eps
    (grad,) = torch.autograd.grad(h_res, logits, random(4000, 4, 4, seed=1).to(dtype))
    assert torch.isfinite(grad).all()
    # A row 200 below the others in every column: exp alone would make it 0/0 in float32.
    low = torch.tensor([[100.0, 100.0], [-100.0, -100.0]], dtype=dtype)
    assert largest(reference.sinkhorn(low), torch.full((2, 2), 0.5, dtype=F64)) < 1e-6


def test_float32_agrees_with_float64_at_scale_100():
    logits = (random(4000, 4, 4) * 100).float()
    truth = reference.sinkhorn(logits.double())
    assert relative_rms(reference.sinkhorn(logits), truth) < 1e-4


@pytest.mark.parametrize("norm_eps", [0.0, 1e-20, 1e-6])
def test_a_token_of_zeros_reads_the_bias_and_has_no_gradient_through_the_map(norm_eps):
    values = tensors(Shape("zero", tokens=(3,)))
    x = values["x"].clone()
    x[1] = 0
    x.requires_grad_()
    parameters = [values[name] for name in ("phi", "alpha", "bias")]
    h_pre, h_post, logits = reference.mapping(x, *parameters, norm_eps=norm_eps)
    assert torch.equal(h_pre[1], torch.sigmoid(values["bias"][:4]))
    assert torch.equal(logits[1].flatten(), values["bias"][8:])
    (grad,) = torch.autograd.grad(h_pre.sum() + (h_post * logits.sum(-1)).sum(), x)
    assert torch.isfinite(grad).all()
    assert not grad[1].any()
    assert grad[0].any()
    assert grad[2].any()


def test_one_stream_with_unit_maps_is_the_plain_residual():
    x, layer_output = random(7, 1, 16), random(7, 16, seed=1)
    h_res = reference.sinkhorn(random(7, 1, 1))
    assert torch.equal(h_res, torch.ones(7, 1, 1, dtype=F64))
    x_next = reference.merge(x, layer_output, torch.ones(7, 1, dtype=F64), h_res)
    assert torch.equal(x_next[:, 0], x[:, 0] + layer_output)
    assert torch.equal(reference.pre_apply(x, torch.ones(7, 1, dtype=F64)), x[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
def test_collapse_undoes_expand(dtype):
    hidden = random(3, 5, 16).to(dtype)
    for n in (1, 2, 4, 8):
        x = reference.expand(hidden, n)
        assert x.shape == (3, 5, n, 16)
        mean = reference.collapse(x, "mean")
        if dtype in (torch.bfloat16, torch.float16):  # whose multiples are exact in float32
            assert torch.equal(mean, hidden)
        assert relative_rms(mean, hidden) < torch.finfo(dtype).eps / 2
    summed = reference.collapse(reference.expand(hidden, 4), "sum")
    assert relative_rms(summed, hidden * 4) < torch.finfo(dtype).eps / 2


def test_head_weighs_the_streams():
    x, phi, bias = random(6, 4, 8), random(4, 32, seed=1), random(4, seed=2)
    inv_rms = (x.flatten(-2).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    weights = torch.sigmoid(0.7 * (x.flatten(-2) @ phi.t()) * inv_rms + bias) + 1e-3
    truth = torch.einsum("ti,tic->tc", weights, x)
    alpha = torch.tensor([0.7], dtype=F64)
    actual = reference.head(x, phi, alpha, bias, norm_eps=1e-6, pre_eps=1e-3)
    assert largest(actual, truth) < 1e-14


def test_hc_mapping_matches_loops_over_scalars():
    n, width, eps = 3, 5, 1e-6
    x, theta = random(n, width), random(2 + n, width, seed=1)
    alpha, bias = random(3, seed=2), random(15, seed=3)

    def response(row: int, stream: int) -> float:
        mean_square = sum(x[stream, c].item() ** 2 for c in range(width)) / width
        dot = sum((x[stream, c] * theta[row, c]).item() for c in range(width))
        return math.tanh(dot / math.sqrt(mean_square + eps))

    h_pre, h_post, h_res = reference.hc_mapping(x, theta, alpha, bias, norm_eps=eps)
    for i in range(n):
        assert abs(h_pre[i] - (alpha[0] * response(0, i) + bias[i])) < 1e-14
        assert abs(h_post[i] - (alpha[1] * response(1, i) + bias[n + i])) < 1e-14
        for o in range(n):
            truth = alpha[2] * response(2 + o, i) + bias[2 * n + o * n + i]
            assert abs(h_res[o, i] - truth) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_dtypes_and_shapes(dtype):
    for tokens in ((), (0,), (2, 0, 3), (2, 3, 5)):
        values = tensors(Shape("dtypes", tokens=tokens, n=2, width=6), dtype)
        x, wide = values["x"], torch.promote_types(dtype, torch.float32)
        parameters = [values[name] for name in ("phi", "alpha", "bias")]
        layer_input, h_post, h_res = reference.pre(x, *parameters, norm_eps=1e-6)
        assert (layer_input.shape, layer_input.dtype) == ((*tokens, 6), dtype)
        assert (h_post.shape, h_post.dtype) == ((*tokens, 2), wide)
        assert (h_res.shape, h_res.dtype) == ((*tokens, 2, 2), wide)
        outputs = reference.boundary(x, layer_input, h_post, h_res, *parameters, norm_eps=1e-6)
        assert [value.dtype for value in outputs] == [dtype, dtype, wide, wide]
        assert outputs[0].shape == x.shape
