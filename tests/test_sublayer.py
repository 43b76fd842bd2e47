"""A sublayer whose merge leaves its share of grad_x to the backward of pre."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cases import PRE, Call, Shape, call, cotangents, tensors, torch_op_arguments
from mhc_tile import ManifoldHyperConnection, gradients, merge, nn, pre, reference, sublayer
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


def test_the_share_of_merge_is_mixed_before_the_rounding():
    arguments, others = torch_op_arguments("pre_backward")
    part, mixing = torch.randn_like(arguments[3]), torch.rand_like(arguments[2])
    mixed = OPS["pre_backward"](*arguments, part, mixing, **others)[0]
    bare = OPS["pre_backward"](*arguments, **others)[0]
    assert torch.allclose(mixed, bare + mixing.mT @ part)
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
