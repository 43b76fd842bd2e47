"""A sublayer whose merge leaves its share of grad_x to the backward of pre."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cases import PRE, Call, Shape, call, cotangents, tensors, torch_op_arguments
from mhc_tile import (
    ManifoldHyperConnection,
    close_sublayer,
    gradients,
    merge,
    next_sublayer,
    nn,
    open_sublayer,
    pre,
    reference,
    sublayer,
)
from mhc_tile._library import OPS
from mhc_tile.ops.merge import MERGE_BACKWARD_MAPS

SHAPE = Shape("ordinary", tokens=(2, 5), width=64)
SMALL = Shape("small", tokens=(2,), n=2, width=3)


def layer(layer_input: Tensor) -> Tensor:
    return torch.tanh(layer_input)


def whole(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    return sublayer(x, layer, phi, alpha, bias, **PRE)


def plain(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    layer_input, h_post, h_res = pre(x, phi, alpha, bias, **PRE)
    return merge(x, layer(layer_input), h_post, h_res)


def by_reference(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    layer_input, h_post, h_res = reference.pre(x, phi, alpha, bias, **PRE)
    return reference.merge(x, layer(layer_input), h_post, h_res)


def leaves(shape: Shape = SHAPE, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Call:
    return call("pre", shape, dtype, device).to(grad=True)


def differentiated(function, made: Call) -> tuple[Tensor, ...]:
    result = function(*made.inputs)
    grads = torch.autograd.grad(result, made.inputs, cotangents((result,)))
    return (result.detach(), *grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 5), (300,)], ids=str)
def test_it_is_pre_the_layer_and_merge(tokens, dtype, device):
    made = leaves(Shape("any", tokens=tokens, width=64), dtype, device)
    actual, others = differentiated(whole, made), differentiated(plain, made)
    assert torch.equal(actual[0], others[0])
    truth = differentiated(by_reference, made.to(torch.float64, grad=True))
    for value, other, true in zip(actual, others, truth, strict=True):
        assert (value.shape, value.dtype) == (other.shape, other.dtype)
        ours, theirs = ((v.double() - true).norm() for v in (value, other))
        assert ours <= 1.25 * theirs + 1e-6 * true.norm()
        assert ours <= 0.01 * true.norm()


def test_gradcheck_and_gradgradcheck():
    inputs = leaves(SMALL).inputs
    assert torch.autograd.gradcheck(whole, inputs)
    assert torch.autograd.gradgradcheck(whole, inputs, fast_mode=True)


def test_gradgradcheck_of_a_stack():
    stack = nn.HyperConnectedStack(blocks(2, 3)).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stack, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(stack, (x,), fast_mode=True)


def test_opcheck_of_the_parts(device):
    arguments, others = torch_op_arguments("pre_backward", device)
    part = torch.randn_like(arguments[3]).requires_grad_()
    mixing = torch.rand_like(arguments[2]).requires_grad_()
    torch.library.opcheck(OPS["pre_backward"], (*arguments, part, mixing), others)
    arguments, _ = torch_op_arguments("merge_backward", device)
    torch.library.opcheck(MERGE_BACKWARD_MAPS.call, arguments[:-1])


def test_the_maps_are_those_of_merge_backward(device):
    values = tensors(SHAPE, torch.bfloat16, device)
    inputs = [values[name] for name in ("x", "layer_output", "h_post", "h_res")]
    grad = cotangents((inputs[0],))[0]
    truth = OPS["merge_backward"](grad, *inputs)[1:]
    for value, other in zip(MERGE_BACKWARD_MAPS.call(grad, *inputs[:-1]), truth, strict=True):
        assert torch.equal(value, other)


def test_the_gradient_of_merge_is_added_before_the_rounding():
    arguments, others = torch_op_arguments("pre_backward")
    part, mixing = torch.randn_like(arguments[3]), torch.rand_like(arguments[2])
    fused = OPS["pre_backward"](*arguments, part, mixing, **others)[0]
    bare = OPS["pre_backward"](*arguments, **others)[0]
    assert torch.allclose(fused, bare + mixing.mT @ part)
    halves = [v.bfloat16() if i in (0, 3) else v for i, v in enumerate(arguments)]
    constants = {k: v for k, v in others.items() if k != "norm_eps"}
    wide = gradients.pre_backward(*halves, part.bfloat16(), mixing, **constants)[0]
    narrow = OPS["pre_backward"](*halves, part.bfloat16(), mixing, **others)[0]
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("recompute", [False, True])
def test_compile_fullgraph_gives_the_eager_bits(recompute, device):
    def function(*inputs):
        return checkpoint(whole, *inputs, use_reentrant=False) if recompute else whole(*inputs)

    made = leaves(dtype=torch.bfloat16, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    truth = differentiated(whole, made)
    for other in (function, compiled):
        for value, true in zip(differentiated(other, made), truth, strict=True):
            assert torch.equal(value, true)


def test_a_layer_of_another_shape_is_named():
    inputs = leaves().inputs
    with pytest.raises(ValueError, match="sublayer: layer_output must have shape"):
        sublayer(inputs[0], lambda value: value[..., :3], *inputs[1:], **PRE)


def blocks(count: int, width: int = 16) -> list[ManifoldHyperConnection]:
    torch.manual_seed(0)
    made = [ManifoldHyperConnection(torch.nn.Linear(width, width), width) for _ in range(count)]
    for block in made:
        torch.nn.init.constant_(block.alpha, 0.7)
    return made


def composed(connections, x: Tensor, replace=lambda h_res: h_res) -> Tensor:
    for block in connections:
        layer_input, h_post, h_res, _ = block.pre(x)
        x = merge(x, block.layer(layer_input), h_post, replace(h_res))
    return x


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("hooked", [(), (0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_a_hook_on_a_tap_may_replace_h_res(fused, hooked, compiled):
    connections = blocks(3)

    def average(_module, _inputs, h_res):
        return 0.5 * h_res + 0.5 * h_res.flip(-1)

    stack = nn.HyperConnectedStack(connections, fused=fused)
    x = torch.randn(5, 4, 16, requires_grad=True)
    truth = x
    for index, block in enumerate(connections):
        one = (lambda h: average(None, None, h)) if index in hooked else (lambda h: h)
        truth = composed([block], truth, one)
    for index in hooked:
        connections[index].tap.register_forward_hook(average)
    torch._dynamo.reset()
    actual = (torch.compile(stack, backend="aot_eager") if compiled else stack)(x)
    parameters = [x, *stack.parameters()]
    grad = torch.randn_like(actual)
    pairs = zip(
        (actual, *torch.autograd.grad(actual, parameters, grad)),
        (truth, *torch.autograd.grad(truth, parameters, grad)),
        strict=True,
    )
    for value, true in pairs:
        assert (value - true).norm() <= 1e-5 * true.norm()


def test_a_stack_has_the_gradients_of_its_parts():
    connections = blocks(3)
    x = torch.randn(5, 4, 16, requires_grad=True)
    stack = nn.HyperConnectedStack(connections)
    actual, truth = stack(x), composed(connections, x)
    grad = torch.randn_like(actual)
    parameters = [x, *stack.parameters()]
    grads = torch.autograd.grad(actual, parameters, grad)
    for value, true in zip(grads, torch.autograd.grad(truth, parameters, grad), strict=True):
        assert (value - true).norm() <= 1e-5 * true.norm()


def test_what_nothing_reads_has_no_gradient():
    """x_next alone, with a layer that reads nothing: the gradients are those of merge and maps."""
    made = leaves()
    x, *parameters = made.inputs
    actual = sublayer(x, torch.zeros_like, *parameters, **PRE)
    layer_input, h_post, h_res = pre(x, *parameters, **PRE)
    truth = merge(x, torch.zeros_like(layer_input), h_post, h_res)
    grad = cotangents((truth,))
    for value, true in zip(
        torch.autograd.grad(actual, made.inputs, grad),
        torch.autograd.grad(truth, made.inputs, grad),
        strict=True,
    ):
        assert torch.allclose(value, true)


def test_compiled_autograd_after_an_eager_forward():
    connections = blocks(2)
    x = torch.randn(5, 4, 16, requires_grad=True)
    truth = torch.autograd.grad(composed(connections, x).square().sum(), x)[0]
    loss = nn.HyperConnectedStack(connections)(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert (x.grad - truth).norm() <= 1e-5 * truth.norm()


def test_a_non_contiguous_x():
    made = leaves()
    x, *parameters = made.inputs
    turned = x.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    assert not turned.is_contiguous()
    grad = torch.randn_like(x)
    results = [whole(value, *parameters) for value in (x, turned)]
    grads = [torch.autograd.grad(r, v, grad)[0] for r, v in zip(results, (x, turned), strict=True)]
    assert torch.equal(*results)
    assert torch.allclose(*grads)


def test_a_layer_under_autocast_may_return_another_dtype(device):
    made = leaves(dtype=torch.float32, device=device)
    weight = torch.randn(64, 64, device=device)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return sublayer(x, lambda value: value @ weight, *parameters, **PRE)

    with torch.autocast(device, torch.bfloat16):
        x_next = function(*made.inputs)
    assert x_next.dtype == torch.float32
    truth = function(*made.inputs)
    assert 0 < (x_next - truth).norm() < 0.02 * truth.norm()


def steps(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """A sublayer closed twice, three next ones, one of which nothing merges; all that can be read.

    The layers read everything that a state offers, so no gradient of an attribute is left out.
    """
    state = open_sublayer(x, *parameters, **PRE)
    last = next_sublayer(state, reads_all(state), *parameters, **PRE)
    open_for_ever = next_sublayer(last, layer(last.layer_input), *parameters, **PRE)
    ends = [close_sublayer(last, value) for value in (reads_all(last), last.x[..., 0, :])]
    ends.append(close_sublayer(state, layer(state.layer_input)))
    ends.append(merge(last.x, last.layer_input, last.h_post, last.h_res.flip(-1)))
    branch = next_sublayer(state, state.layer_input, *parameters, **PRE)
    return *ends, last.x, last.h_res, open_for_ever.layer_input, branch.x


def reads_all(state) -> Tensor:
    read = torch.tanh(state.layer_input) + state.x.mean(-2)
    return read * state.h_post.sum(-1, True) + state.h_res[..., 0, 1, None]


def plain_steps(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The same with `pre` and `merge`, where a tuple is a state."""

    class State:
        def __init__(self, x: Tensor) -> None:
            self.x = x
            self.layer_input, self.h_post, self.h_res = pre(x, *parameters, **PRE)

        def merge(self, layer_output: Tensor) -> Tensor:
            return merge(self.x, layer_output, self.h_post, self.h_res)

    state = State(x)
    last = State(state.merge(reads_all(state)))
    open_for_ever = State(last.merge(layer(last.layer_input)))
    ends = [last.merge(reads_all(last)), last.merge(last.x[..., 0, :])]
    ends.append(state.merge(layer(state.layer_input)))
    ends.append(merge(last.x, last.layer_input, last.h_post, last.h_res.flip(-1)))
    branch = state.merge(state.layer_input)
    return *ends, last.x, last.h_res, open_for_ever.layer_input, branch


@pytest.mark.parametrize("index", [None, *range(8)])
@pytest.mark.parametrize("compiled", [False, True])
def test_whatever_reads_a_step_has_a_true_gradient(index, compiled):
    made = leaves()
    torch._dynamo.reset()
    function = torch.compile(steps, fullgraph=True, backend="aot_eager") if compiled else steps
    results, truth = ([*f(*made.inputs)] for f in (function, plain_steps))
    if index is not None:
        results, truth = [results[index]], [truth[index]]
    for value, true in zip(results, truth, strict=True):
        assert torch.allclose(value, true, rtol=1e-12)
    grads = cotangents(tuple(truth))
    for value, true in zip(
        torch.autograd.grad(results, made.inputs, grads),
        torch.autograd.grad(truth, made.inputs, grads),
        strict=True,
    ):
        assert true.any()
        assert (value - true).norm() <= 1e-12 * true.norm()


def test_gradgradcheck_of_the_steps():
    inputs = leaves(SMALL).inputs
    assert torch.autograd.gradcheck(steps, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(steps, inputs, fast_mode=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_steps_under_checkpoint(reentrant):
    made = leaves()
    results = [steps(*made.inputs), checkpoint(steps, *made.inputs, use_reentrant=reentrant)]
    grads = cotangents(results[0])
    truth, found = [], []
    for kept, values in zip((truth, found), results, strict=True):
        torch.autograd.backward(values, grads)
        kept += [value.grad.clone() for value in made.inputs]
        for value in made.inputs:
            value.grad = None
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_a_layer_that_breaks_the_graph_between_the_steps():
    def broken(layer_input: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.tanh(layer_input)

    def function(*inputs: Tensor) -> Tensor:
        state = open_sublayer(*inputs, **PRE)
        state = next_sublayer(state, broken(state.layer_input), *inputs[1:], **PRE)
        return close_sublayer(state, broken(state.layer_input) + state.x[..., 1, :])

    made = leaves()
    torch._dynamo.reset()
    truth = differentiated(function, made)
    found = differentiated(torch.compile(function, backend="aot_eager"), made)
    for value, true in zip(found, truth, strict=True):
        assert (value - true).norm() <= 1e-12 * true.norm()


@pytest.mark.parametrize("how", ["no_grad", "forward mode"])
def test_a_state_that_leaves_where_it_was_opened(how):
    """Its x has the gradient of a plain merge, whose maps are constants without grad mode."""
    made = leaves()
    x = made.inputs[0]
    if how == "no_grad":
        with torch.no_grad():
            state = open_sublayer(*made.inputs, **PRE)
    else:
        with torch.autograd.forward_ad.dual_level():
            state = open_sublayer(*made.inputs, **PRE)
    truth = merge(x, layer(state.layer_input), state.h_post, state.h_res)
    (grad,) = cotangents((truth,))
    (expected,) = torch.autograd.grad(truth, x, grad, retain_graph=True)
    (found,) = torch.autograd.grad(close_sublayer(state, layer(state.layer_input)), x, grad)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_a_state_closed_under_a_transform_of_torch_func():
    made = leaves()
    state = open_sublayer(*made.inputs, **PRE)

    def function(layer_output: Tensor) -> Tensor:
        return close_sublayer(state, layer_output).square().sum()

    layer_output = state.layer_input.detach()
    found = torch.func.grad(function)(layer_output)
    leaf = layer_output.requires_grad_()
    (truth,) = torch.autograd.grad(function(leaf), leaf)
    assert torch.allclose(found, truth, rtol=1e-12)


@pytest.mark.parametrize("name", ["layer_input", "h_post", "h_res", "x"])
def test_what_a_state_holds_cannot_be_replaced(name):
    state = open_sublayer(*leaves().inputs, **PRE)
    with pytest.raises(AttributeError):
        setattr(state, name, getattr(state, name) * 2)


def test_a_map_that_is_written_into_is_an_error_of_the_backward():
    state = open_sublayer(*leaves().inputs, **PRE)
    x_next = close_sublayer(state, layer(state.layer_input))
    with torch.no_grad():
        state.h_res.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x_next.sum().backward()


def test_what_the_steps_are_given_is_checked():
    x, *parameters = leaves().inputs
    state = open_sublayer(x, *parameters, **PRE)
    for call_of, name in (
        (lambda s, v: close_sublayer(s, v), "close_sublayer"),
        (lambda s, v: next_sublayer(s, v, *parameters, **PRE), "next_sublayer"),
    ):
        with pytest.raises(TypeError, match=f"{name}: state must be an OpenSublayer, got tuple"):
            call_of((x,), x)
        with pytest.raises(TypeError, match=rf"{name}: layer_output must be a torch.Tensor, got N"):
            call_of(state, None)
        with pytest.raises(ValueError, match=f"{name}: layer_output must have shape"):
            call_of(state, state.layer_input[..., :3])
    with pytest.raises(ValueError, match="next_sublayer: phi must have shape"):
        next_sublayer(state, state.layer_input, parameters[0][1:], *parameters[1:], **PRE)
    with pytest.raises(ValueError, match="next_sublayer: iters must be an int of at least 1"):
        next_sublayer(state, state.layer_input, *parameters, **{**PRE, "iters": True})
    with pytest.raises(ValueError, match="open_sublayer: phi must have shape"):
        open_sublayer(x, parameters[0][1:], *parameters[1:], **PRE)
