"""The modules: one sublayer by hand, stacks, initialisations, dtypes, hooks, DeepSeek-V4."""

import copy
import re

import pytest
import torch
from torch import nn

from compare import largest
from mhc_tile import MHCConfig, reference
from mhc_tile import nn as mhc_nn

WIDTH = 16
RESIDUAL = MHCConfig.paper(init="residual")


def layers(count: int, seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(count)]


def spoiled(module: nn.Module) -> nn.Module:
    """Random parameters everywhere, so that no map is special."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter) * 0.3)
    return module


def test_a_sublayer_is_pre_layer_merge():
    block = spoiled(mhc_nn.ManifoldHyperConnection(layers(1)[0], WIDTH))
    x = torch.randn(2, 3, 4, WIDTH)
    parameters = (block.phi, block.alpha, block.bias)
    layer_input, h_post, h_res = reference.pre(x, *parameters, norm_eps=1e-20)
    truth = reference.merge(x, block.layer(layer_input), h_post, h_res)
    assert torch.equal(block(x), truth)


def test_hc_sublayer_uses_the_maps_as_they_come():
    block = spoiled(mhc_nn.HyperConnection(layers(1)[0], WIDTH))
    x = torch.randn(2, 3, 4, WIDTH)
    maps = reference.hc_mapping(x, block.theta, block.alpha, block.bias, norm_eps=1e-20)
    layer_input = reference.pre_apply(x, maps[0])
    assert torch.equal(block(x), reference.merge(x, block.layer(layer_input), *maps[1:]))


def test_stack_gives_the_result_of_single_wraps():
    def connections():
        inner = layers(5)
        kinds = [mhc_nn.ManifoldHyperConnection] * 2 + [mhc_nn.HyperConnection]
        kinds += [mhc_nn.ManifoldHyperConnection] * 2
        torch.manual_seed(1)
        return [spoiled(kind(layer, WIDTH)) for kind, layer in zip(kinds, inner, strict=True)]

    fused = mhc_nn.HyperConnectedStack(connections())
    single = mhc_nn.HyperConnectedStack(connections(), fused=False)
    x = torch.randn(2, 3, 4, WIDTH)
    by_hand = x
    for connection in single.connections:
        by_hand = connection(by_hand)
    assert torch.equal(fused(x), by_hand)
    assert torch.equal(single(x), by_hand)
    for stack in (fused, single):
        stack(x).square().sum().backward()
    for a, b in zip(fused.parameters(), single.parameters(), strict=True):
        assert largest(a.grad, b.grad.double()) <= 1e-5 * b.grad.abs().max()


def test_an_empty_stack_and_plain_residuals():
    x = torch.randn(2, WIDTH)
    assert mhc_nn.HyperConnectedStack([])(x) is x
    inner = layers(2)
    stack = mhc_nn.HyperConnectedStack([mhc_nn.Residual(layer) for layer in inner])
    middle = x + inner[0](x)
    assert torch.equal(stack(x), middle + inner[1](middle))


@pytest.mark.parametrize("fused", [True, False])
def test_extra_arguments_reach_the_layer(fused):
    class Scaled(nn.Module):
        def forward(self, hidden, factor, *, shift):
            return hidden * factor + shift

    for kind in (mhc_nn.ManifoldHyperConnection, mhc_nn.HyperConnection):
        stack = mhc_nn.HyperConnectedStack([kind(Scaled(), WIDTH) for _ in range(2)], fused=fused)
        x = torch.randn(3, 4, WIDTH)
        assert not torch.equal(stack(x, 2.0, shift=1.0), stack(x, 3.0, shift=1.0))
        with pytest.raises(TypeError, match="shift"):
            stack(x, 2.0)
    assert torch.equal(mhc_nn.Residual(Scaled())(x, 2.0, shift=1.0), x + (x * 2 + 1))


@pytest.fixture
def float64_by_default():
    """Biases such as the logit of 1/4 are rounded where they are made: make them in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["mhc", "hc"])
def test_residual_start_is_the_plain_residual_network_exactly(kind, n, float64_by_default):
    config = RESIDUAL.replace(num_streams=n)
    inner = layers(6)
    if kind == "mhc":
        connections = [mhc_nn.ManifoldHyperConnection(f, WIDTH, config) for f in inner]
    else:
        connections = [mhc_nn.HyperConnection(f, WIDTH, config, i) for i, f in enumerate(inner)]
    stack = mhc_nn.HyperConnectedStack(connections)
    hidden = torch.randn(3, 5, WIDTH)
    plain = mhc_nn.HyperConnectedStack([mhc_nn.Residual(layer) for layer in inner])(hidden)
    x = stack(mhc_nn.Expand(n)(hidden))
    assert largest(mhc_nn.Collapse()(x), plain) < 1e-12
    head = mhc_nn.Head(WIDTH, config)
    assert largest(head(x), plain) < 1e-12


def test_streams_part_and_every_parameter_is_trained_from_the_residual_start():
    torch.manual_seed(0)
    stack = mhc_nn.HyperConnectedStack(
        mhc_nn.ManifoldHyperConnection(layer, WIDTH, RESIDUAL) for layer in layers(3)
    )
    head = mhc_nn.Head(WIDTH, RESIDUAL)
    model = nn.Sequential(mhc_nn.Expand(4), stack, head)
    data = torch.randn(64, WIDTH)
    target = torch.tanh(data.roll(1, -1) * 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    touched = dict.fromkeys((name for name, _ in model.named_parameters()), False)
    first = None
    for _ in range(50):
        loss = (model(data) - target).square().mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            touched[name] |= bool(parameter.grad is not None and parameter.grad.any())
        optimizer.step()
    assert all(touched.values()), [name for name, seen in touched.items() if not seen]
    x = stack(mhc_nn.Expand(4)(data))
    spread = (x - x.mean(-2, keepdim=True)).norm() / x.norm()
    assert spread > 1e-3
    assert loss.item() < first


def test_paper_start():
    torch.manual_seed(0)
    block = mhc_nn.ManifoldHyperConnection(nn.Identity(), 256)
    assert torch.equal(block.alpha, torch.full((3,), 0.01))
    assert not block.bias.any()
    assert abs(block.phi.std().item() * 32 - 1) < 0.05
    _, h_post, h_res, _ = block.pre(torch.randn(10, 4, 256))
    assert largest(h_res, torch.full_like(h_res, 0.25)) < 0.02
    assert largest(h_post, torch.ones_like(h_post)) < 0.05


def test_residual_start_needs_a_post_scale_above_one():
    config = RESIDUAL.replace(post_scale=1.0)
    with pytest.raises(ValueError, match="post_scale must be above 1 where init is 'residual'"):
        mhc_nn.ManifoldHyperConnection(nn.Identity(), WIDTH, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_a_model_leaves_the_maps_in_float32(dtype):
    block = mhc_nn.ManifoldHyperConnection(layers(1)[0], WIDTH)
    before = copy.deepcopy(block.state_dict())
    model = nn.Sequential(mhc_nn.Expand(4), block, mhc_nn.Head(WIDTH)).to(dtype)
    assert block.layer[1].weight.dtype == dtype
    for name in ("phi", "alpha", "bias"):
        assert torch.equal(getattr(block, name), before[name])
    assert model(torch.randn(3, WIDTH, dtype=dtype)).dtype == dtype
    assert model.double()(torch.randn(3, WIDTH, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("kind", [mhc_nn.ManifoldHyperConnection, mhc_nn.HyperConnection])
def test_autocast_keeps_the_streams_and_the_maps(kind, device):
    block = spoiled(kind(nn.Linear(WIDTH, WIDTH), WIDTH)).to(device)
    seen = []
    block.tap.register_forward_hook(lambda _module, _args, h_res: seen.append(h_res.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 4, WIDTH, device=device, dtype=dtype)
        with torch.autocast(device, dtype=torch.bfloat16):
            x_next = block(x)
            x_next.float().square().sum().backward()
        assert x_next.dtype == dtype
    assert seen == [torch.float32] * 2


def test_taps_see_h_res_of_every_sublayer():
    stack = mhc_nn.HyperConnectedStack(
        mhc_nn.ManifoldHyperConnection(layer, WIDTH) for layer in layers(3)
    )
    seen = []
    for connection in stack.connections:
        connection.tap.register_forward_hook(lambda _module, _args, h_res: seen.append(h_res))
    stack(torch.randn(2, 5, 4, WIDTH))
    assert [tuple(h_res.shape) for h_res in seen] == [(2, 5, 4, 4)] * 3
    assert all((h_res.sum(-1) - 1).abs().max() < 1e-6 for h_res in seen)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_a_stack_compiles_whole(backend):
    device = "cuda" if backend == "inductor" else "cpu"
    stack = spoiled(
        mhc_nn.HyperConnectedStack(
            mhc_nn.ManifoldHyperConnection(layer, WIDTH) for layer in layers(3)
        )
    ).to(device)
    x = torch.randn(6, 4, WIDTH, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend=backend)
    expected = stack(x)
    assert largest(compiled(x), expected.double()) < 1e-5 * expected.abs().max()
    compiled(x).square().sum().backward()
    assert stack.connections[0].phi.grad.any()


@pytest.mark.parametrize("kind", [mhc_nn.ManifoldHyperConnection, mhc_nn.HyperConnection])
def test_a_stack_exports(kind):
    stack = mhc_nn.HyperConnectedStack(kind(layer, WIDTH) for layer in layers(2))
    x = torch.randn(6, 4, WIDTH)
    program = torch.export.export(stack, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert torch.equal(program.module()(x[:3]), stack(x[:3]))


@pytest.mark.parametrize("kind", [mhc_nn.ManifoldHyperConnection, mhc_nn.HyperConnection])
def test_state_dict_round_trip(kind):
    source, target = spoiled(kind(layers(1)[0], WIDTH)), kind(layers(1)[0], WIDTH)
    x = torch.randn(3, 4, WIDTH)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


def deepseek_v4_sublayer(x, layer, fn, base, scale, norm_eps, eps=1e-6):
    """V4's own convention: comb [in, out], from the specification."""
    n, flat = x.shape[-2], x.flatten(-2)
    logits = flat @ fn.t() * (flat.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    pre = torch.sigmoid(logits[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(logits[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (logits[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    comb = torch.softmax(comb, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    output = layer((pre.unsqueeze(-1) * x).sum(-2))
    return post.unsqueeze(-1) * output.unsqueeze(-2) + torch.einsum("...ij,...ic->...jc", comb, x)


def test_deepseek_v4_loads_and_exports():
    torch.manual_seed(0)
    config = MHCConfig.deepseek_v4(norm_eps=1e-5)
    layer = layers(1)[0].double()
    block = mhc_nn.ManifoldHyperConnection(layer, WIDTH, config).double()
    fn, base = torch.randn(24, 4 * WIDTH, dtype=torch.float64) * 0.3, torch.randn(24).double()
    scale = torch.rand(3).double() + 0.5
    mhc_nn.load_deepseek_v4(block, fn, base, scale)
    x = torch.randn(5, 4, WIDTH, dtype=torch.float64)
    truth = deepseek_v4_sublayer(x, layer, fn, base, scale, 1e-5)
    assert largest(block(x), truth) < 1e-13
    exported = mhc_nn.export_deepseek_v4(block)
    assert torch.equal(exported["fn"], fn)
    assert torch.equal(exported["base"], base)
    assert torch.equal(exported["scale"], scale)


def test_deepseek_v4_head_is_not_permuted():
    head = mhc_nn.Head(WIDTH, MHCConfig.deepseek_v4())
    fn, base, scale = torch.randn(4, 4 * WIDTH), torch.randn(4), torch.randn(1)
    mhc_nn.load_deepseek_v4(head, fn, base, scale)
    assert torch.equal(head.phi, fn)
    assert torch.equal(mhc_nn.export_deepseek_v4(head)["fn"], fn)


def test_deepseek_v4_refuses_other_shapes_before_it_copies():
    block = mhc_nn.ManifoldHyperConnection(nn.Identity(), WIDTH)
    before = block.phi.clone()
    message = "load_deepseek_v4: base must have shape [24] to match bias, got [8]"
    with pytest.raises(ValueError, match=re.escape(message)):
        mhc_nn.load_deepseek_v4(block, torch.randn(24, 64), torch.zeros(8), torch.ones(3))
    assert torch.equal(block.phi, before)
    with pytest.raises(TypeError, match=r"load_deepseek_v4: fn must be a torch\.Tensor, got list"):
        mhc_nn.load_deepseek_v4(block, [1], 2, 3)
    with pytest.raises(TypeError, match="must be a ManifoldHyperConnection or a Head, got Linear"):
        mhc_nn.load_deepseek_v4(nn.Linear(1, 1), *[torch.zeros(1)] * 3)


def test_bad_modules():
    with pytest.raises(TypeError, match="layer must be a module, got int"):
        mhc_nn.ManifoldHyperConnection(3, WIDTH)
    with pytest.raises(ValueError, match="hidden_size must be an int of at least 1, got 0"):
        mhc_nn.HyperConnection(nn.Identity(), 0)
    for index in (-1, 1.5):
        with pytest.raises(
            ValueError, match=f"layer_index must be an int of at least 0, got {index}"
        ):
            mhc_nn.HyperConnection(nn.Identity(), WIDTH, layer_index=index)
    for kind in (mhc_nn.ManifoldHyperConnection, mhc_nn.HyperConnection):
        with pytest.raises(ValueError, match="hidden_size must be an int of at least 1, got True"):
            kind(nn.Identity(), True)
        with pytest.raises(
            TypeError, match=f"{kind.__name__}: config must be an MHCConfig, got int"
        ):
            kind(nn.Identity(), WIDTH, 0)
    with pytest.raises(TypeError, match="Head: config must be an MHCConfig, got dict"):
        mhc_nn.Head(WIDTH, {})
    with pytest.raises(TypeError, match="Residual: layer must be a module, got NoneType"):
        mhc_nn.Residual(None)
    for count in (0, 2.0, True):
        with pytest.raises(ValueError, match="Expand: num_streams must be an int of at least 1"):
            mhc_nn.Expand(count)
    with pytest.raises(ValueError, match="Collapse: mode must be one of"):
        mhc_nn.Collapse("max")
    with pytest.raises(ValueError, match="Head: hidden_size must be an int of at least 1"):
        mhc_nn.Head(0)
    narrow = mhc_nn.ManifoldHyperConnection(nn.Linear(WIDTH, 8), WIDTH)
    with pytest.raises(ValueError, match=re.escape("layer_output must have shape [3, 16]")):
        narrow(torch.randn(3, 4, WIDTH))


@pytest.mark.parametrize("name", ["ManifoldHyperConnection", "HyperConnection", "Head", "pre"])
def test_streams_of_another_shape_are_named(name):
    if name == "Head":
        entrance = mhc_nn.Head(WIDTH)
    else:
        kind = "ManifoldHyperConnection" if name == "pre" else name
        block = getattr(mhc_nn, kind)(nn.Linear(WIDTH, WIDTH), WIDTH)
        name, entrance = kind, block.pre if name == "pre" else block
    for shape in ((2, 10, WIDTH), (3, 2, WIDTH), (3, 4, 8), (WIDTH,)):
        message = f"{name}: x must have shape [..., 4, 16], got {list(shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            entrance(torch.randn(shape))
    with pytest.raises(TypeError, match=f"{name}: x must be a torch.Tensor, got list"):
        entrance([1.0])
    with pytest.raises(ValueError, match=f"{name}: x must have a dtype of .*, got int64"):
        entrance(torch.ones(3, 4, WIDTH, dtype=torch.int64))


@pytest.mark.parametrize("kind", [mhc_nn.ManifoldHyperConnection, mhc_nn.HyperConnection])
def test_sublayers_run_on_meta(kind):
    block = kind(nn.Linear(WIDTH, WIDTH, device="meta"), WIDTH, device="meta")
    assert block(torch.empty(3, 4, WIDTH, device="meta")).shape == (3, 4, WIDTH)


def test_repr_names_the_sizes():
    assert "hidden_size=16, num_streams=4" in repr(
        mhc_nn.ManifoldHyperConnection(nn.Identity(), 16)
    )
