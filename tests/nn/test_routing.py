"""What a stack reads of its layers: their keywords as they are now, and what may be fused."""

import pickle
import types

import pytest
import torch
from torch import nn

from mhc_tile import HyperConnectedStack, ManifoldHyperConnection, Residual

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    seen = None

    def forward(self, hidden, mask=None):
        self.seen = mask
        return hidden


class Plain(nn.Module):
    def forward(self, hidden):
        return hidden


def undecorated(function):
    def wrapper(*args):
        return function(*args)

    return wrapper


class Wrapped(nn.Module):
    forward = undecorated(lambda _self, hidden: hidden)


class Shifted(ManifoldHyperConnection):
    def begin(self, x):
        return super().begin(torch.tanh(x))


def connected(*layers):
    return HyperConnectedStack(ManifoldHyperConnection(layer, 8) for layer in layers)


def test_a_patched_forward_gets_its_keyword():
    stack = connected(layer := Plain(), Masked())
    layer.forward = types.MethodType(Masked.forward, layer)
    stack(X, mask=1)
    assert layer.seen == 1
    del layer.forward
    stack(X, mask=2)  # and no longer, when the patch is gone
    assert layer.seen == 1


@pytest.mark.parametrize("place", ["in a stack", "in a connection"])
def test_a_replaced_layer_inside_another_gets_its_keyword(place):
    layer = Masked()
    if place == "in a stack":
        inner = connected(Plain())
        stack = HyperConnectedStack([inner, ManifoldHyperConnection(Masked(), 8)])
        inner[0].layer = layer
    else:
        stack = connected(Residual(Plain()), Masked())
        stack[0].layer.layer = layer
    stack(X, mask=1)
    assert layer.seen == 1


def test_torchscript_layers_are_connected():
    for layer in (torch.jit.script(nn.Linear(8, 8)), torch.jit.trace(nn.Linear(8, 8), X[:, 0])):
        assert connected(layer, Plain())(X).shape == X.shape


def test_a_stack_is_pickled_whatever_its_layers_forwards_are():
    stack = connected(Wrapped(), Masked())
    copy = pickle.loads(pickle.dumps(stack))
    assert torch.equal(copy(X), stack(X))
    copy(X, mask=1)
    assert copy[1].layer.seen == 1


@pytest.mark.parametrize("patched", [False, True])
def test_a_connection_with_a_begin_of_its_own_is_called(patched):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(2)]
    connections = [ManifoldHyperConnection(layers[0], 8), Shifted(layers[1], 8)]
    if patched:
        connections[1] = ManifoldHyperConnection(layers[1], 8)
        own = ManifoldHyperConnection.begin
        connections[1].begin = lambda x: own(connections[1], torch.tanh(x))
    fused, apart = (HyperConnectedStack(connections, fused=fused)(X) for fused in (True, False))
    assert torch.equal(fused, apart)
    connections[1] = ManifoldHyperConnection(layers[1], 8)
    assert not torch.equal(HyperConnectedStack(connections)(X), fused)


class Named(nn.Module):
    def forward(self, hidden, layer_input=None, h_res=None, opened=None):
        self.seen = layer_input, h_res, opened
        return hidden


def test_a_layers_keyword_may_have_the_name_of_a_quantity():
    connection = ManifoldHyperConnection(layer := Named(), 8)
    connection.tap.register_forward_hook(lambda *_: torch.eye(4).expand(2, 4, 4))
    for call in (connection, HyperConnectedStack([connection])):
        call(X, layer_input=1, h_res=2, opened=3)
        assert layer.seen == (1, 2, 3)
