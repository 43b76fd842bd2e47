"""What a layer may be, take and return: modules alone, keywords by signature, extras in a tuple."""

import functools
import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mhc_tile import HyperConnectedStack, HyperConnection, ManifoldHyperConnection, Residual

WIDTH = 8


def residual(layer: nn.Module, _width: int) -> Residual:
    return Residual(layer)


KINDS = [ManifoldHyperConnection, HyperConnection, residual]
FUSED = pytest.mark.parametrize("fused", [True, False])
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def streams(kind) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, WIDTH, generator=generator) if kind is residual else four(generator)


def four(generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(5, 4, WIDTH, generator=generator)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH)


class Masked(nn.Module):
    """Takes `mask`, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, hidden, mask=None):
        return self.inner(hidden) * (1 if mask is None else mask)


class Scaled(Masked):
    def forward(self, hidden, *, scale=1.0):
        return self.inner(hidden) * scale


class Anything(Masked):
    def forward(self, hidden, **kwargs):
        self.seen = kwargs
        return self.inner(hidden)


class Output(NamedTuple):
    hidden: Tensor
    weights: Tensor
    cache: object


class Attending(Masked):
    """Returns what `wrap` makes of its output, its weights and None."""

    def __init__(self, wrap=lambda *values: values) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, hidden, mask=None):
        return self.wrap(super().forward(hidden, mask), hidden.sum(-1), None)


# what a layer may be


@EVERY_KIND
def test_functions_are_refused_with_the_way_out(kind):
    attention = nn.MultiheadAttention(WIDTH, 2)
    for layer in (
        lambda h: attention(h, h, h)[0],
        attention.forward,
        functools.partial(attention, need_weights=False),
        nn.Linear,
        torch.tanh,
    ):
        name = type(layer).__name__
        message = f": layer must be a module, got {name}; wrap it in a torch.nn.Module that calls"
        with pytest.raises(TypeError, match=re.escape(message)):
            kind(layer, WIDTH)


@EVERY_KIND
def test_a_compiled_layer_is_a_module(kind):
    torch._dynamo.reset()
    connection = kind(torch.compile(linear(), backend="eager"), WIDTH)
    assert connection(streams(kind)).shape == streams(kind).shape
    assert sum("layer" in name for name, _ in connection.named_parameters()) == 2


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([nn.Identity(), torch.tanh], "connections[1] must be a module, got builtin_function"),
        ([None], "connections[0] must be a module, got NoneType"),
        ({"a": nn.Identity()}, "connections[0] must be a module, got str"),
        (nn.Identity(), "connections must be an iterable of modules, got Identity"),
        (3, "connections must be an iterable of modules, got int"),
    ],
)
def test_a_stack_is_of_modules(items, message):
    with pytest.raises(TypeError, match=re.escape(f"HyperConnectedStack: {message}")):
        HyperConnectedStack(items)


def test_fused_is_a_bool():
    with pytest.raises(TypeError, match="HyperConnectedStack: fused must be True or False, got 'n"):
        HyperConnectedStack([], fused="no")


def test_a_residual_adds_its_like_alone():
    """A sum would broadcast what merge refuses."""
    with pytest.raises(
        ValueError, match=re.escape("Residual: layer_output must have shape [5, 8]")
    ):
        Residual(nn.Linear(WIDTH, 1))(streams(residual))


# what a layer may return


@EVERY_KIND
@pytest.mark.parametrize("wrap", [lambda *values: values, Output], ids=["tuple", "named tuple"])
def test_extras_are_passed_through(kind, wrap):
    x = streams(kind)
    plain, attending = kind(Masked(), WIDTH), kind(Attending(wrap), WIDTH)
    attending.load_state_dict(plain.state_dict())
    x_next, weights, cache = attending(x, mask=0.5)
    assert torch.equal(x_next, plain(x, mask=0.5))
    assert (weights.shape, cache) == ((5,), None)
    attending.layer.wrap = lambda output, *_: (output,)
    (alone,) = attending(x, mask=0.5)
    assert torch.equal(alone, x_next)


@EVERY_KIND
def test_what_is_neither_a_tensor_nor_starts_with_one_is_named(kind):
    shape = list(streams(residual).shape)
    for wrap, got in (
        (lambda *values: list(values), "list"),
        (lambda output, *_: {"hidden": output}, "dict"),
        (lambda *_: (), "tuple of NoneType"),
        (lambda output, *_: (None, output), "tuple of NoneType"),
    ):
        message = f": layer must return a torch.Tensor of shape {shape}, alone or as the first of"
        with pytest.raises(TypeError, match=re.escape(message) + f" a tuple, got {got}$"):
            kind(Attending(wrap), WIDTH)(streams(kind))


@FUSED
@EVERY_KIND
@pytest.mark.parametrize("hooked", [False, True])
def test_a_stack_returns_extras_by_connection(kind, fused, hooked):
    torch.manual_seed(0)
    parts = [kind(layer, WIDTH) for layer in (Attending(), linear(), Attending(Output))]
    if hooked and hasattr(parts[0], "tap"):
        for part in parts:
            part.tap.register_forward_hook(lambda _module, _inputs, h_res: h_res.clone())
    x, expected = streams(kind), []
    truth = x
    for part in parts:
        result = part(truth)
        truth, *extras = result if isinstance(result, tuple) else (result,)
        expected.append(tuple(extras))
    x_next, extras = HyperConnectedStack(parts, fused=fused)(x)
    assert torch.equal(x_next, truth)
    assert [len(each) for each in extras] == [2, 0, 2]
    for found, wanted in zip(extras[::2], expected[::2], strict=True):
        assert torch.equal(found[0], wanted[0])
        assert found[1] is None
    grads = torch.autograd.grad(x_next.sum() + extras[0][0].sum(), list(parts[0].parameters()))
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_torch_s_attention_and_recurrent_layers_fit():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(WIDTH, 2)

        def forward(self, hidden):
            return self.inner(hidden, hidden, hidden)

    stack = HyperConnectedStack(
        ManifoldHyperConnection(layer, WIDTH) for layer in (Attention(), nn.GRU(WIDTH, WIDTH))
    )
    x_next, ((weights,), (last,)) = stack(four())
    assert (x_next.shape, weights.shape, last.shape) == ((5, 4, WIDTH), (5, 5), (1, WIDTH))


# which keywords a layer gets


def mixed(kind, fused: bool) -> HyperConnectedStack:
    torch.manual_seed(0)
    layers = (Masked(), linear(), Scaled(), Anything())
    return HyperConnectedStack([kind(layer, WIDTH) for layer in layers], fused=fused)


@FUSED
@EVERY_KIND
def test_keywords_go_to_the_layers_that_take_them(kind, fused):
    stack, x = mixed(kind, fused), streams(kind)
    masked, plain, scaled, anything = stack
    truth = anything(scaled(plain(masked(x, mask=0.3)), scale=3.0))
    assert torch.equal(stack(x, mask=0.3, scale=3.0), truth)
    assert anything.layer.seen == {"mask": 0.3, "scale": 3.0}
    other = stack(x, scale=2.0)
    assert anything.layer.seen == {"scale": 2.0}
    assert not torch.equal(other, truth)


@FUSED
@EVERY_KIND
def test_a_keyword_that_no_layer_takes_is_named(kind, fused):
    stack, x = mixed(kind, fused)[:3], streams(kind)
    message = (
        "HyperConnectedStack: a keyword must be one that a layer takes, of ['mask', 'scale'], "
        "got 'maks'"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        stack(x, mask=1.0, maks=1.0)
    with pytest.raises(TypeError, match="got 'hidden'"):  # the layers' input has its place
        stack(x, hidden=x)
    with pytest.raises(TypeError, match="maks"):
        stack[0](x, maks=1.0)


def test_what_stands_between_is_routed_by_its_own_signature():
    class Between(nn.Module):
        def forward(self, x, *, shift=0.0):
            return x + shift

    class Own(ManifoldHyperConnection):
        def forward(self, x, *args, gain=1.0, **kwargs):
            return gain * super().forward(x, *args, **kwargs)

    x = four()
    inner = HyperConnectedStack([ManifoldHyperConnection(Scaled(), WIDTH)])
    stack = HyperConnectedStack([Own(Masked(), WIDTH), Between(), nn.Identity(), inner])
    own, between, _, _ = stack
    truth = inner(between(own(x, mask=0.5, gain=2.0), shift=1.0), scale=3.0)
    assert torch.equal(stack(x, mask=0.5, gain=2.0, shift=1.0, scale=3.0), truth)
    with pytest.raises(TypeError, match=re.escape("of ['gain', 'mask', 'scale', 'shift'], got 'x")):
        stack(x, xy=1)


def test_wrapped_layers_are_routed_by_what_they_wrap():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend="eager")

    torch._dynamo.reset()
    x = four()
    for wrap in (wrapped, checkpoint_wrapper, nn.DataParallel):
        stack = HyperConnectedStack(
            [wrap(ManifoldHyperConnection(linear(), WIDTH))]
            + [ManifoldHyperConnection(wrap(layer), WIDTH) for layer in (Masked(), linear())]
        )
        assert not torch.equal(stack(x, mask=0.5), stack(x))
        with pytest.raises(TypeError, match="got 'scale'"):
            stack(x, scale=2.0)


def test_connections_and_layers_may_be_replaced():
    x = four()
    stack = HyperConnectedStack([ManifoldHyperConnection(linear(), WIDTH)])
    stack.connections.append(ManifoldHyperConnection(Masked(), WIDTH))
    assert torch.equal(stack(x, mask=0.5), stack[1](stack[0](x), mask=0.5))
    stack[0].layer = Scaled()
    assert torch.equal(stack(x, scale=0.5), stack[1](stack[0](x, scale=0.5)))


@pytest.mark.parametrize("kind", [ManifoldHyperConnection, HyperConnection])
def test_keywords_and_extras_compile_whole_and_signatures_are_not_read_again(kind, monkeypatch):
    torch.manual_seed(0)
    layers = (Attending(), linear(), Scaled())
    stack, x = HyperConnectedStack([kind(layer, WIDTH) for layer in layers]), four()
    monkeypatch.setattr("inspect.signature", None)
    truth, extras = stack(x, mask=0.5, scale=2.0)
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    x_next, found = compiled(x, mask=0.5, scale=2.0)
    assert (x_next - truth).norm() <= 1e-5 * truth.norm()
    assert torch.allclose(found[0][0], extras[0][0])
    assert found[1:] == ((), ())
