"""Stacks call every connection that does more than the fused op; they check their neighbours."""

import copy
import re

import numpy as np
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
def graphs():
    """A backend of torch.compile, and what it was given."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph

    yield backend, seen
    torch._dynamo.reset()


class Halved(nn.Module):
    """A layer or tap that torch.compile makes a graph of; of torch's own it makes none."""

    def forward(self, value):
        return value / 2


@pytest.mark.parametrize("part", ["connection", "layer", "tap"])
@pytest.mark.parametrize("fused", [True, False])
def test_what_was_compiled_in_place_runs_compiled(fused, part, graphs):
    backend, seen = graphs
    parts, x = connections(), torch.randn(5, 4, WIDTH)
    if part != "connection":
        setattr(parts[1], part, Halved())
    truth = one_by_one(parts, x)
    found = parts[1] if part == "connection" else getattr(parts[1], part)
    found.compile(backend=backend)
    result = HyperConnectedStack(parts, fused=fused)(x)
    assert len(seen) == 1
    assert (result - truth).norm() <= 1e-5 * truth.norm()
    torch._dynamo.reset()
    whole = torch.compile(HyperConnectedStack(parts, fused=fused), fullgraph=True, backend="eager")
    assert (whole(x) - truth).norm() <= 1e-5 * truth.norm()


GLOBAL_HOOKS = [
    "register_module_forward_pre_hook",
    "register_module_forward_hook",
    "register_module_full_backward_pre_hook",
    "register_module_full_backward_hook",
]


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_global_hooks_see_every_connection(register):
    stack, seen = HyperConnectedStack(connections()), []
    x = torch.randn(5, 4, WIDTH, requires_grad=True)
    fused = stack(x)

    def hook(module, *_):
        seen.append(module)

    handle = getattr(torch.nn.modules.module, register)(hook)
    try:
        called = stack(x)
        called.sum().backward()
    finally:
        handle.remove()
    for connection in stack:
        assert [seen.count(m) for m in (connection, connection.layer)] == [1, 1]
    assert torch.equal(called, fused)
    stack(x).sum().backward()
    assert len(seen) == 3 * 3 + 1


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_stack_runs_the_global_hooks_that_it_was_compiled_with():
    def double(module, _inputs, x):
        return 2 * x if isinstance(module, ManifoldHyperConnection) else None

    stack, x = HyperConnectedStack(connections()), torch.randn(5, 4, WIDTH)
    plain = stack(x)
    handle = torch.nn.modules.module.register_module_forward_hook(double)
    try:
        truth = stack(x)
        torch._dynamo.reset()
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")(x)
    finally:
        handle.remove()
    assert (truth - plain).norm() > 0.1 * plain.norm()
    assert (compiled - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_another_call_is_run(name, monkeypatch):
    plain = getattr(nn.Module, name)

    def doubled(self, *args, **kwargs):
        return 2 * plain(self, *args, **kwargs)

    kind = type("Called", (ManifoldHyperConnection,), {name: doubled})
    parts, x = connections(), torch.randn(5, 4, WIDTH)
    parts[1] = connections(1, kind)[0]
    assert torch.equal(HyperConnectedStack(parts)(x), one_by_one(parts, x))
    if name == "__call__":  # as tools replace it for a while
        stack, seen = HyperConnectedStack(connections()), []

        def call(self, *args, **kwargs):
            seen.append(self)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, call)
        stack(x)
        assert all(connection in seen for connection in stack)


@pytest.mark.parametrize("fused", [True, False])
def test_a_stack_is_a_sequence_of_its_connections(fused):
    parts, x = connections(4), torch.randn(5, 4, WIDTH)
    stack = HyperConnectedStack(parts, fused=fused)
    assert (len(stack), list(stack), list(reversed(stack))) == (4, parts, parts[::-1])
    assert (stack[0], stack[-1], stack[np.int64(2)]) == (parts[0], parts[3], parts[2])
    assert parts[2] in stack
    for piece in (slice(1, 3), slice(None), slice(2, 0, -1), slice(0, 0)):
        some = stack[piece]
        assert isinstance(some, HyperConnectedStack)
        assert (some.fused, list(some)) == (fused, parts[piece])
        assert torch.equal(some(x), one_by_one(parts[piece], x))
    with pytest.raises(IndexError):
        stack[4]
    assert len(stack.state_dict()) == 4 * 5  # as before: no name changes
    assert all(name.startswith("connections.") for name in stack.state_dict())


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
