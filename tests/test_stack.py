"""Stacks call every connection that does more than the fused op; they check their neighbours."""

import copy
import re

import pytest
import torch
from torch import nn

from mhc_tile import HyperConnectedStack, HyperConnection, ManifoldHyperConnection, MHCConfig

WIDTH = 16


def connections(count: int = 3, kind: type = ManifoldHyperConnection) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind(nn.Linear(WIDTH, WIDTH), WIDTH) for _ in range(count)]


def one_by_one(parts, x):
    for connection in parts:
        x = connection(x)
    return x


class Doubled(ManifoldHyperConnection):
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_a_forward_of_its_own_is_called(how, place):
    parts = connections()
    if how == "subclass":
        parts[place] = connections(1, Doubled)[0]
    else:
        plain = parts[place].forward
        parts[place].forward = lambda x: 2 * plain(x)
    x = torch.randn(5, 4, WIDTH)
    truth = one_by_one(parts, x)
    assert torch.equal(HyperConnectedStack(parts)(x), truth)
    assert (truth - one_by_one(connections(), x)).norm() > 0.1 * truth.norm()


@pytest.mark.parametrize("name", ["pre", "forward", "backward pre", "backward"])
def test_hooks_of_connections_run(name):
    parts, seen = connections(), []
    register = {
        "pre": parts[1].register_forward_pre_hook,
        "forward": parts[1].register_forward_hook,
        "backward pre": parts[1].register_full_backward_pre_hook,
        "backward": parts[1].register_full_backward_hook,
    }[name]
    stack, x = HyperConnectedStack(parts), torch.randn(5, 4, WIDTH, requires_grad=True)
    fused = stack(x)
    handle = register(lambda *_: seen.append(name))
    called = stack(x)
    called.sum().backward()
    assert seen == [name]
    assert torch.equal(called, fused)
    handle.remove()
    stack(x).sum().backward()
    assert seen == [name]


def test_a_compiled_stack_runs_the_hooks_that_it_was_compiled_with():
    def double(_module, _inputs, x):
        return 2 * x

    stack = HyperConnectedStack(connections())
    stack.connections[1].register_forward_hook(double)
    x = torch.randn(5, 4, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")(x)
    truth = stack(x)
    assert (compiled - truth).norm() <= 1e-5 * truth.norm()


def test_fused_where_nothing_else_would_run(monkeypatch):
    parts, x = connections(), torch.randn(5, 4, WIDTH)
    parts[1].layer.register_forward_hook(lambda *_: None)
    parts[1].tap.register_forward_hook(lambda *_: None)
    truth = one_by_one(parts, x)
    monkeypatch.setattr(ManifoldHyperConnection, "__call__", lambda *_: pytest.fail("called"))
    assert torch.equal(HyperConnectedStack(parts)(x), truth)


@pytest.fixture
def mesh():
    """A mesh of this process only."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_connections_may_be_sharded_one_by_one(mesh):
    from torch.distributed.fsdp import fully_shard

    stack, x = HyperConnectedStack(connections()), torch.randn(5, 4, WIDTH)
    truth = stack(x)
    for connection in stack.connections:
        fully_shard(connection, mesh=mesh)
    fully_shard(stack, mesh=mesh)
    result = stack(x)
    result.sum().backward()
    assert torch.equal(result, truth)
    assert all(parameter.grad is not None for parameter in stack.parameters())


def test_sharded_layers_may_be_bf16_and_the_maps_stay_fp32(mesh, monkeypatch):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    stack = HyperConnectedStack(connections())
    x = torch.randn(5, 4, WIDTH, dtype=torch.bfloat16)
    other = copy.deepcopy(stack)
    for connection in other.connections:
        connection.layer.bfloat16()
    truth = other(x)
    policy = MixedPrecisionPolicy(torch.bfloat16)
    for connection in stack.connections:
        fully_shard(connection.layer, mesh=mesh, mp_policy=policy)
    fully_shard(stack, mesh=mesh)
    monkeypatch.setattr(ManifoldHyperConnection, "forward", None)  # no fused one calls it
    result = stack(x)
    grad = torch.randn(x.shape).bfloat16()
    result.backward(grad)
    truth.backward(grad)
    assert torch.equal(result, truth)
    for (name, found), true in zip(stack.named_parameters(), other.parameters(), strict=True):
        assert found.grad.dtype == torch.float32, name
        assert torch.equal(found.grad.full_tensor(), true.grad.float()), name
        assert found.grad.full_tensor().any(), name


@pytest.mark.parametrize("kind", [ManifoldHyperConnection, HyperConnection])
def test_neighbours_of_other_sizes_are_named(kind):
    first, second = connections(2)
    other = kind(nn.Identity(), WIDTH, MHCConfig.paper(num_streams=2))
    message = (
        "HyperConnectedStack: connections[2] must have num_streams 4 and hidden_size 16 as "
        "connections[1] has, got 2 and 16"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        HyperConnectedStack([first, second, other])
    with pytest.raises(ValueError, match="got 4 and 8"):
        HyperConnectedStack([first, kind(nn.Identity(), 8)])
    HyperConnectedStack([first, nn.Identity(), other])  # what stands between may change them
