"""`pre` with one gradient of x for itself and `merge`, and with an h_pre taken and returned."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cases import MAPPING, PRE, Call, Shape, call, cotangents, tensors, torch_op_arguments
from compare import BACKWARD, PAIRS, K, compare
from mhc_tile import (
    ManifoldHyperConnection,
    boundary,
    close_sublayer,
    gradients,
    merge,
    nn,
    open_sublayer,
    ops,
    pre,
    pre_apply,
    reference,
)
from mhc_tile._library import OPS

SHAPE = Shape("ordinary", tokens=(2, 5), width=64)
SMALL = Shape("small", tokens=(2,), n=2, width=3)


def sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    state = open_sublayer(x, phi, alpha, bias, **PRE)
    return close_sublayer(state, state.layer_input * 0.5)


def plain(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, module=ops) -> Tensor:
    layer_input, h_post, h_res = module.pre(x, phi, alpha, bias, **PRE)
    return module.merge(x, layer_input * 0.5, h_post, h_res)


def with_h_pre(*inputs: Tensor, **constants: Any) -> tuple[Tensor, ...]:
    return pre(*inputs, **constants, return_h_pre=True)


def delayed(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The last input is the h_pre that another sublayer computed."""
    *inputs, h_pre = inputs
    return pre(*inputs, **PRE, h_pre=h_pre, return_h_pre=True)


def delayed_by_reference(*inputs: Tensor) -> tuple[Tensor, ...]:
    *inputs, given = inputs
    h_pre, h_post, h_res_logits = reference.mapping(*inputs, **MAPPING)
    h_res = reference.sinkhorn(h_res_logits, PRE["iters"], PRE["sinkhorn_eps"])
    return reference.pre_apply(inputs[0], given), h_post, h_res, h_pre


def leaves_of_delayed(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    h_pre = tensors(shape, dtype)["h_pre"].requires_grad_()
    return (*leaves(shape, dtype).inputs, h_pre)


def leaves(shape: Shape = SHAPE, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Call:
    return call("pre", shape, dtype, device).to(grad=True)


class Operations(TorchDispatchMode):
    """Names and result shapes of the operations that run, those inside an op of ours left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Size | None]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        shape = result.shape if isinstance(result, Tensor) else None
        self.seen.append((function._schema.name, shape))
        return result


def operations_of_backward(result: Tensor) -> list[tuple[str, torch.Size | None]]:
    grad = cotangents((result,))[0]
    with Operations() as operations:
        result.backward(grad)
    return operations.seen


def test_return_x_is_deprecated_and_returns_x_itself():
    made = leaves()
    with pytest.warns(DeprecationWarning, match="pre: return_x .* open_sublayer") as caught:
        *results, x = pre(*made.inputs, **PRE, return_x=True)
    assert caught[0].filename == __file__
    assert x is made.inputs[0]
    for value, truth in zip(results, pre(*made.inputs, **PRE), strict=True):
        assert torch.equal(value, truth)


def test_return_x_compiles():
    def function(*inputs):
        *_, x = pre(*inputs, **PRE, return_x=True)
        return x * 2

    inputs = leaves().inputs
    torch._dynamo.reset()
    with pytest.warns(DeprecationWarning, match="return_x"):
        result = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(result, inputs[0] * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_gradient_is_the_sum(dtype, device):
    made = leaves(dtype=dtype, device=device)
    x_next = sublayer(*made.inputs)
    (grad,) = cotangents((x_next,))
    actual = torch.autograd.grad(x_next, made.inputs, grad)
    wide = made.to(torch.float64, grad=True)
    truth = torch.autograd.grad(plain(*wide.inputs, reference), wide.inputs, grad.double())
    k = BACKWARD * (PAIRS if device == "cuda" else K)["pre"]
    if dtype != torch.float64:  # layer_input and its cotangent are rounded between the ops
        k += 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for value, expected in zip(actual, truth, strict=True):
        compare(value, expected, k=k)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("function", [pre, with_h_pre])
def test_one_result_alone(function, index, device):
    made = leaves(device=device)
    result = function(*made.inputs, **PRE)[index]
    (grad,) = cotangents((result,))
    actual = torch.autograd.grad(result, made.inputs, grad, allow_unused=True)
    result = reference.pre(*made.inputs, **PRE)[index]
    truth = torch.autograd.grad(result, made.inputs, grad, allow_unused=True)
    for value, expected in zip(actual, truth, strict=True):
        if expected is None or not expected.any():
            assert value is None or not value.any()
        else:
            compare(value, expected, k=BACKWARD * K["pre"])


def test_gradcheck_and_gradgradcheck():
    inputs = call("pre", SMALL, torch.float64).to(grad=True).inputs
    assert torch.autograd.gradcheck(sublayer, inputs)
    assert torch.autograd.gradgradcheck(sublayer, inputs, fast_mode=True)


def test_a_part_of_grad_x_is_added_before_the_rounding():
    arguments, others = torch_op_arguments("pre_backward")
    part = torch.randn_like(arguments[3])
    bare, *rest = OPS["pre_backward"](*arguments, **others)
    whole, *same = OPS["pre_backward"](*arguments, part, **others)
    assert torch.equal(whole, bare + part)
    assert all(torch.equal(a, b) for a, b in zip(rest, same, strict=True))
    halves = [v.bfloat16() if i in (0, 3) else v for i, v in enumerate(arguments)]
    others.pop("norm_eps")
    wide = gradients.pre_backward(*halves, part.bfloat16(), **others)[0]
    halves_op = OPS["pre_backward"](*halves, part.bfloat16(), norm_eps=1e-6, **others)[0]
    assert torch.equal(halves_op, wide.bfloat16())


def test_opcheck_with_a_part_of_grad_x(device):
    arguments, others = torch_op_arguments("pre_backward", device)
    part = torch.randn_like(arguments[3]).requires_grad_()
    torch.library.opcheck(OPS["pre_backward"], (*arguments, part), others)


@pytest.mark.parametrize("recompute", [False, True])
def test_compile_fullgraph_gives_the_eager_bits(recompute, device):
    def function(*inputs):
        if recompute:
            return checkpoint(sublayer, *inputs, use_reentrant=False)
        return sublayer(*inputs)

    made = leaves(dtype=torch.bfloat16, device=device)
    torch._dynamo.reset()
    results = [f(*made.inputs) for f in (sublayer, function)]
    results.append(torch.compile(function, fullgraph=True, backend="aot_eager")(*made.inputs))
    (grad,) = cotangents(results[:1])
    truth, *others = ((r, *torch.autograd.grad(r, made.inputs, grad)) for r in results)
    for values in others:
        assert all(torch.equal(a, b) for a, b in zip(values, truth, strict=True))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_any_number_of_tokens(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(sublayer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (6, 9, 13):
        inputs = leaves(Shape("dynamic", tokens=(tokens,))).inputs
        assert torch.equal(compiled(*inputs), sublayer(*inputs))


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return sublayer(*inputs)

    inputs = call("pre", SHAPE).inputs
    program = torch.export.export(Module(), inputs)
    assert torch.equal(program.module()(*inputs), sublayer(*inputs))


def test_autograd_adds_the_gradients_of_x_that_pre_and_merge_have():
    made = leaves(dtype=torch.bfloat16)
    seen = operations_of_backward(plain(*made.inputs))
    assert seen.count(("aten::add", made.inputs[0].shape)) == 1


@pytest.mark.parametrize("kind", ["op", "module", "stack"])
def test_autograd_runs_no_addition_in_an_open_sublayer(kind):
    torch.manual_seed(0)
    connections = [ManifoldHyperConnection(torch.nn.Linear(16, 16), 16) for _ in range(2)]
    x = torch.randn(3, 4, 16, requires_grad=True)
    if kind == "op":
        result = sublayer(x, *(p.detach() for p in connections[0].parameters(recurse=False)))
    else:
        result = (connections[0] if kind == "module" else nn.HyperConnectedStack(connections))(x)
    seen = operations_of_backward(result)
    assert "mhc_tile::pre_backward" in dict(seen)
    assert not [name for name, shape in seen if "add" in name and shape == x.shape]


def test_nothing_is_filled_with_zeros_for_what_the_backward_keeps():
    made = call("boundary", SHAPE, torch.bfloat16).to(grad=True)
    x_next, layer_input, h_post, h_res = boundary(*made.inputs, **made.others)
    seen = operations_of_backward(merge(x_next, layer_input, h_post, h_res))
    assert "mhc_tile::boundary_backward" in dict(seen)
    assert not [name for name, _ in seen if "zero" in name or "full" in name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(), (0,), (2, 5)], ids=str)
def test_h_pre_is_taken_and_returned(tokens, dtype):
    inputs = leaves_of_delayed(Shape("any", tokens=tokens), dtype)
    for value, truth in zip(delayed(*inputs), delayed_by_reference(*inputs), strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)
    own = with_h_pre(*inputs[:4], **PRE)
    for value, truth in zip(own, pre(*inputs[:4], **PRE), strict=False):
        assert torch.equal(value, truth)
    assert torch.equal(own[3], delayed(*inputs)[3])
    assert torch.equal(pre_apply(inputs[0], own[3]), own[0])
    assert len(pre(*inputs[:4], **PRE, h_pre=inputs[4])) == 3


@pytest.mark.parametrize("read", [(0,), (3,), (0, 1, 2, 3)], ids=str)
def test_gradients_reach_x_through_both_h_pre(read):
    inputs = leaves_of_delayed(SHAPE)
    results = ([f(*inputs)[i] for i in read] for f in (delayed, delayed_by_reference))
    found, truth = (
        torch.autograd.grad(r, inputs, cotangents(tuple(r)), allow_unused=True) for r in results
    )
    for value, expected in zip(found, truth, strict=True):
        if expected is None or not expected.any():
            assert value is None or not value.any()
        else:
            compare(value, expected, k=BACKWARD * K["pre"])


def test_gradcheck_and_gradgradcheck_of_a_delayed_h_pre():
    inputs = leaves_of_delayed(SMALL)
    assert torch.autograd.gradcheck(delayed, inputs)
    assert torch.autograd.gradgradcheck(delayed, inputs, fast_mode=True)


def test_a_delayed_h_pre_compiles():
    inputs = leaves_of_delayed(SHAPE, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(delayed, fullgraph=True, backend="aot_eager")
    found, truth = (
        (*r, *torch.autograd.grad(r, inputs, cotangents(r)))
        for r in (compiled(*inputs), delayed(*inputs))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_a_delayed_h_pre_keeps_its_dtypes_under_autocast():
    inputs = leaves_of_delayed(SHAPE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = delayed(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, delayed(*inputs), strict=True))


def test_an_h_pre_of_another_shape_is_named():
    *inputs, h_pre = leaves_of_delayed(SHAPE)
    for wrong in (h_pre[..., :3], h_pre.float()):
        with pytest.raises(ValueError, match="pre: h_pre must"):
            pre(*inputs, **PRE, h_pre=wrong)
    with pytest.raises(TypeError, match=r"pre: h_pre must be a torch.Tensor, got list"):
        pre(*inputs, **PRE, h_pre=[1.0])
    with pytest.raises(TypeError, match="pre: return_h_pre must be True or False, got 1"):
        pre(*inputs, **PRE, return_h_pre=1)


@pytest.mark.gpu
def test_cuda_graph_of_forward_and_backward():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # leaves belong to the stream that they are made on
        made = leaves(dtype=torch.bfloat16, device="cuda")
        (grad,) = cotangents((made.inputs[0],))

        def step():
            x_next = sublayer(*made.inputs)
            return x_next, *torch.autograd.grad(x_next, made.inputs, grad)

        expected = step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for value in captured:
            value.detach().zero_()
        graph.replay()
        stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
