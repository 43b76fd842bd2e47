"""Latent attention against an explicit softmax in float64; causality, positions, padding."""

import pytest
import torch
from torch import Tensor

from compare import compare
from mhc_tile.models import MLAConfig, ModelConfig, mla
from mhc_tile.models.layers import Rotary
from mhc_tile.models.mla import LatentAttention, attend

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    head_size=8,
    ffn_size=40,
    context_length=32,
    mla=MLAConfig(kv_rank=12, rope_size=4),
)
# Roundings of float32 in four products with sums over 8 to 24 channels and a softmax.
K_MLA = 32


def attention(query_rank: int | None = None, dtype: torch.dtype = torch.float64) -> LatentAttention:
    torch.manual_seed(0)
    module = LatentAttention(TINY.replace(mla={"query_rank": query_rank}))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return module.to(dtype)


def hidden_states(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def rotated(values: Tensor, position: int) -> Tensor:
    """[4], by complex numbers."""
    angles = position * 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)
    turned = torch.complex(values[:2], values[2:]) * torch.polar(torch.ones(2).double(), angles)
    return torch.cat([turned.real, turned.imag])


def normalised(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden * (hidden.square().mean() + 1e-6) ** -0.5 * weight


def naive(module: LatentAttention, hidden: Tensor) -> Tensor:
    """Token after token, head after head, of one sequence [S, 24]."""
    keys, values, outs = [], [], []
    queries, latent_rank = module.widths[0], module.widths[1]
    for position, token in enumerate(hidden):
        down = module.project_in.weight @ normalised(token, module.norm.weight)
        query, latent = down[:queries], down[queries : queries + latent_rank]
        if not isinstance(module.project_query, torch.nn.Identity):
            norm, linear = module.project_query
            query = linear.weight @ normalised(query, norm.weight)
        up = module.project_latent.weight @ normalised(latent, module.latent_norm.weight)
        shared = rotated(down[queries + latent_rank :], position)
        query, up = query.view(3, 12), up.view(3, 16)
        keys.append([torch.cat([up[head, :8], shared]) for head in range(3)])
        values.append([up[head, 8:] for head in range(3)])
        heads = []
        for head in range(3):
            asked = torch.cat([query[head, :8], rotated(query[head, 8:], position)])
            scores = torch.stack([asked @ key[head] for key in keys]) / 12**0.5
            seen = torch.stack([value[head] for value in values])
            heads.append(torch.softmax(scores, 0) @ seen)
        outs.append(module.project_out.weight @ torch.cat(heads))
    return torch.stack(outs)


@pytest.mark.parametrize("query_rank", [None, 10])
def test_matches_an_explicit_softmax(query_rank):
    module = attention(query_rank)
    # the tables of angles are made in float32
    angles = torch.outer(torch.arange(32.0).double(), 10000.0 ** -(torch.arange(2.0).double() / 2))
    module.rotary.cos_SD, module.rotary.sin_SD = angles.cos(), angles.sin()
    hidden = hidden_states(2, 7).requires_grad_()
    out = module(hidden)
    expected = torch.stack([naive(module, sequence) for sequence in hidden])
    compare(out, expected, k=K_MLA)
    leaves = [hidden, *module.parameters()]
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, cotangent)
    truth = torch.autograd.grad(expected, leaves, cotangent)
    for grad, value in zip(grads, truth, strict=True):
        compare(grad, value, k=K_MLA)


def test_the_future_does_not_reach_the_past():
    module = attention()
    before = hidden_states(2, 9)
    after = before.clone()
    after[:, 5] += 1
    assert torch.equal(module(before)[:, :5], module(after)[:, :5])
    assert (module(before) - module(after))[:, 5:].abs().amax((0, 2)).min() > 1e-3


def test_only_distances_matter():
    """Products of rotated vectors depend on the distance of their positions."""
    rotary = Rotary(4, TINY).double()
    query, key = torch.randn(2, 4, dtype=torch.float64)
    queries = rotary(query.expand(1, 20, 1, 4))[0, :, 0]
    keys = rotary(key.expand(1, 20, 1, 4))[0, :, 0]
    products = queries @ keys.T
    for distance in range(-10, 10):
        assert products.diagonal(distance).std() < 1e-6  # the tables are float32
    assert products[0].std() > 0.1
    assert torch.equal(queries[0], query)


def test_positions_reach_the_output():
    module = attention()
    hidden = hidden_states(1, 4)
    swapped = hidden[:, [1, 0, 2, 3]]
    assert (module(hidden)[:, 3] - module(swapped)[:, 3]).abs().max() > 1e-3


def test_rotation_keeps_the_dtype():
    rotary = Rotary(8, TINY)
    heads = torch.randn(2, 5, 3, 8)
    assert rotary(heads.bfloat16()).dtype == torch.bfloat16
    error = rotary(heads.bfloat16()).float() - rotary(heads)
    assert error.norm() < 2**-7 * heads.norm()


def test_padding_the_values_changes_nothing():
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 9, 3, 12, dtype=torch.float64)
    value = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    plain = attend(query, key, value, pad=False)
    assert plain.shape == value.shape
    compare(attend(query, key, value, pad=True), plain, k=4)


@pytest.mark.parametrize(
    ("major", "version", "fuses"),
    [
        (8, 91900, False),
        (9, 91400, False),
        (9, None, False),
        (9, 91501, True),
        (10, 91000, True),
        (12, 91900, False),
    ],
)
def test_where_values_stay_narrow(monkeypatch, major, version, fuses):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (major, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert mla._fuses_unequal_heads(0) is fuses


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_whole(backend):
    device = "cuda" if backend == "inductor" else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    module = attention(dtype=dtype).to(device)
    hidden = hidden_states(2, 16, dtype=dtype).to(device).requires_grad_()
    torch._dynamo.reset()
    out = torch.compile(module, fullgraph=True, backend=backend)(hidden)
    expected = module(hidden)
    assert (out - expected).float().norm() <= 8 * torch.finfo(dtype).eps * expected.float().norm()
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.gpu
def test_bf16_on_the_gpu_takes_a_fused_kernel():
    """The paper's head sizes, with the kernel that keeps the scores in memory forbidden."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.use_deterministic_algorithms(False)
    config = TINY.replace(head_size=128, mla=MLAConfig(kv_rank=64), context_length=512)
    module = LatentAttention(config)
    module.initialise(0.1)
    exact = LatentAttention(config).double()
    module.cuda().bfloat16()
    exact.load_state_dict(module.state_dict())
    hidden = hidden_states(2, 512, dtype=torch.bfloat16)
    leaf, truth = hidden.cuda().requires_grad_(), hidden.double().requires_grad_()
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(fused):
        out = module(leaf)
        out.square().sum().backward()
    expected = exact(truth)
    expected.square().sum().backward()
    assert (out.cpu().double() - expected).norm() < 0.02 * expected.norm()
    assert (leaf.grad.cpu().double() - truth.grad).norm() < 0.04 * truth.grad.norm()


def test_a_config_without_latent_attention_is_refused():
    with pytest.raises(ValueError, match=r"LatentAttention: config.mla must be an MLAConfig"):
        LatentAttention(TINY.replace(mla=None))
