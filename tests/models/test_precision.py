"""Maps, tables and counts keep their dtype and device, whatever the defaults, casts and states."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from mhc_tile import Head, HyperConnectedStack, HyperConnection, ManifoldHyperConnection, MHCConfig
from mhc_tile.models import RESIDUALS, Decoder, MoEConfig
from mhc_tile.models.layers import Rotary
from mhc_tile.models.moe import Router
from tiny_models import EXPERTS, TINY

WIDTH = 16
LONG = TINY.replace(context_length=1001)
RESIDUAL = MHCConfig.paper(init="residual")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def router() -> Router:
    made = Router(WIDTH, MoEConfig(num_experts=4, expert_ffn_size=8, experts_per_token=2))
    nn.init.normal_(made.weight)
    return made


MODULES = {
    "rotary": lambda: Rotary(8, LONG),
    "router": router,
    "mhc": lambda: ManifoldHyperConnection(nn.Identity(), WIDTH, RESIDUAL),
    "hc": lambda: HyperConnection(nn.Identity(), WIDTH, layer_index=1),
    "head": lambda: Head(WIDTH, RESIDUAL),
}
EVERY_MODULE = pytest.mark.parametrize("name", MODULES)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def assert_same(module: nn.Module, other: nn.Module) -> None:
    found, wanted = tensors(module), tensors(other)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert (value.dtype, value.device) == (wanted[name].dtype, wanted[name].device), name
        assert torch.equal(value, wanted[name]), name


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def half_by_default(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def meta_by_default():
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


# constants


@EVERY_MODULE
def test_the_default_dtype_rounds_nothing(name, half_by_default):
    module = made(name)
    torch.set_default_dtype(torch.float32)
    assert_same(module, made(name))


@EVERY_MODULE
@HALVES
def test_a_cast_and_its_way_back_round_nothing(name, dtype):
    assert_same(made(name).to(dtype), made(name))
    assert_same(made(name).to(dtype).float(), made(name))


@EVERY_MODULE
def test_reset_parameters_works_where_the_tensors_are(name, meta_by_default):
    module = made(name)
    for tensor in tensors(module).values():
        tensor.detach().zero_()
    meta_by_default()
    torch.manual_seed(0)
    module.reset_parameters()
    on_meta = MODULES[name]()
    assert {tensor.device.type for tensor in tensors(on_meta).values()} == {"meta"}
    on_meta.to_empty(device="cpu")
    torch.manual_seed(0)
    on_meta.reset_parameters()
    torch.set_default_device(None)
    for loaded in (module, on_meta):
        if name == "router":  # the mixture starts its weight
            loaded.weight = made(name).weight
        assert_same(loaded, made(name))


def test_angles_are_those_of_float64(half_by_default):
    rotary = Rotary(8, LONG)
    exponents = torch.arange(0, 8, 2, dtype=torch.float64) / 8
    angles = torch.outer(torch.arange(1001, dtype=torch.float64), 10000.0**-exponents)
    for found, truth in ((rotary.cos_SD, angles.cos()), (rotary.sin_SD, angles.sin())):
        assert (found - truth).abs().max() < 1e-4


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_decoder_runs_whatever_the_default_device(residual, meta_by_default):
    torch.manual_seed(0)
    model, tokens = Decoder(EXPERTS, residual), torch.zeros(2, 5, dtype=torch.int64)
    truth = model(tokens)
    meta_by_default()
    assert torch.equal(model(tokens), truth)
    model(tokens).backward(torch.ones_like(truth))
    model.balance_experts()
    assert all(value.device.type == "cpu" for value in tensors(model).values())


def test_the_step_of_an_expert_s_bias_is_not_rounded(half_by_default):
    routing = router()
    routing.expert_load.copy_(torch.tensor([1, 0, 0, 1]))
    routing.update_bias()
    assert routing.expert_bias.tolist() == pytest.approx([-1e-3, 1e-3, 1e-3, -1e-3], rel=1e-6)


def test_a_bias_that_was_loaded_in_16_bits_still_moves():
    routing = router()
    state = {name: value.bfloat16() for name, value in routing.state_dict().items()}
    routing.load_state_dict(state, assign=True)
    routing.expert_bias.fill_(1.0)  # its neighbour in bf16 is 1.0078
    routing.expert_load.copy_(torch.tensor([1, 0, 0, 1]))
    routing.update_bias()
    assert routing.expert_bias.dtype == torch.float32
    assert routing.expert_bias.tolist() == pytest.approx([0.999, 1.001, 1.001, 0.999], rel=1e-6)


# parameters


def streams(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (5, WIDTH) if name == "router" else (5, 4, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def first(result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


MAPPED = pytest.mark.parametrize("name", ["mhc", "hc", "head", "router"])
WARNING = "own parameters must be float32, got some rounded to 16 bits"


def own(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters() if "." not in name]


def rounded(module: nn.Module, how: str, dtype: torch.dtype) -> nn.Module:
    if how == "assign":
        state = {name: value.to(dtype) for name, value in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
    else:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
    return module


@MAPPED
@HALVES
@pytest.mark.parametrize("how", ["assign", "data"])
def test_rounded_parameters_are_read_in_float32(name, how, dtype):
    module, wide = rounded(made(name), how, dtype), made(name)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(parameter.to(dtype))
    x = streams(name)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        result, again = module(x), module(x)
    assert len(caught) == 1
    assert torch.equal(first(result), first(wide(x)))
    assert torch.equal(first(again), first(result))
    first(result).square().sum().backward()
    first(wide(x)).square().sum().backward()
    for parameter, truth in zip(module.parameters(), wide.parameters(), strict=True):
        assert parameter.grad.dtype == dtype
        assert torch.equal(parameter.grad, truth.grad.to(dtype))
    double = streams(name, torch.float64)
    assert first(module(double)).dtype == torch.float64
    assert tensors(module.float())[own(module)[0]].dtype == torch.float32


@MAPPED
@HALVES
def test_parametrized_maps_stay_float32_without_a_warning(name, dtype):
    plain, module = made(name), made(name)
    matrix = own(module)[0]
    with torch.no_grad():  # a norm of 0 has no direction
        for each in (plain, module):
            getattr(each, matrix).fill_(0.1)
    nn.utils.parametrizations.weight_norm(module, matrix)
    module.to(dtype)
    assert all(value.dtype == torch.float32 for value in module.parametrizations.parameters())
    x = streams(name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, truth = first(module(x)).float(), first(plain(x)).float()
    assert (result - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_stack_of_rounded_connections(compiled):
    def stack() -> HyperConnectedStack:
        torch.manual_seed(0)
        kinds = (ManifoldHyperConnection, ManifoldHyperConnection, HyperConnection)
        return HyperConnectedStack(kind(nn.Linear(WIDTH, WIDTH), WIDTH) for kind in kinds)

    found, truth = stack(), stack()
    for name, parameter in found.named_parameters():
        if "layer" not in name:
            parameter.data = parameter.data.bfloat16()
    truth.load_state_dict(found.state_dict())
    torch._dynamo.reset()
    run = torch.compile(found, fullgraph=True, backend="aot_eager") if compiled else found
    with pytest.warns(UserWarning, match=WARNING):
        result = run(streams("mhc"))
    assert (result - truth(streams("mhc"))).norm() <= 1e-5 * result.norm()


@pytest.mark.parametrize("sharded", ["connections", "stack"])
def test_a_policy_of_fsdp2_that_rounds_the_maps(mesh, sharded):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    stack = HyperConnectedStack(
        kind(nn.Linear(WIDTH, WIDTH), WIDTH) for kind in (ManifoldHyperConnection, HyperConnection)
    )
    x = streams("mhc", torch.bfloat16)
    policy = MixedPrecisionPolicy(torch.bfloat16)
    for module in stack if sharded == "connections" else ():
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(stack, mesh=mesh, mp_policy=policy)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        result, _ = stack(x), stack(x)
    told = [str(warning.message).split(":")[0] for warning in caught]
    kinds = sorted(kind.removeprefix("FSDP") for kind in told)
    assert kinds == ["HyperConnection", "ManifoldHyperConnection"]
    result.sum().backward()
    assert all(torch.isfinite(p.grad.full_tensor()).all() for p in stack.parameters())
