"""Every op, through its public function and through torch.ops, on the CPU and on CUDA."""

import copy
import warnings

import pytest
import torch
from torch import Tensor

from cases import SHAPES, SIGNATURES, Call, Shape, call, cotangents, torch_op_arguments
from compare import BACKWARD, PAIRS, K, compare
from mhc_tile import _library, ops, reference
from mhc_tile._library import OPS
from mhc_tile.ops import _dispatch

NAMES = list(SIGNATURES)
ORDINARY = SHAPES[0]


def reference_of(name: str):
    function = getattr(reference, name)
    if name == "sinkhorn":
        return lambda logits, *, iters, eps: function(logits, iters, eps)
    return function


def tolerance(name: str, device: str, dtype: torch.dtype, backward: bool = False) -> float:
    """The k of `compare` for an op."""
    pairs = device == "cuda" and (backward or dtype != torch.float32)
    k = PAIRS.get(name, K[name]) if pairs else K[name]
    if not backward:
        return k
    # The kernels of boundary's backward hand each other a gradient in x's dtype.
    between = device == "cuda" and name == "boundary"
    extra = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if between else 0
    return BACKWARD * k + extra


def with_tf32_phi(made: Call) -> Call:
    """The call with phi as tf32 holds it: the paper's accuracy, which a kernel must not exceed."""
    position = SIGNATURES[made.name][0].index("phi") if made.name in PAIRS else None
    inputs = list(made.inputs)
    if position is not None:
        bits = inputs[position].detach().view(torch.int32)
        inputs[position] = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return Call(made.name, tuple(inputs), made.others)


def truth_of(
    made: Call, results: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The reference in float64 on the CPU: results, and gradients of the inputs."""
    inputs = tuple(value.detach().cpu().double().requires_grad_() for value in made.inputs)
    if made.name == "boundary":
        # pre reads the rounded x_next: give the truth the same one, straight through.
        x_next = reference.merge(*inputs[:4])
        rounded = x_next + (results[0].detach().cpu().double() - x_next.detach())
        truth = (x_next, *reference.pre(rounded, *inputs[4:], **made.others))
    else:
        truth = Call(made.name, inputs, made.others).run(reference_of(made.name))
    given = [grad.cpu().double() for grad in grads]
    return truth, torch.autograd.grad(truth, inputs, given, allow_unused=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_match_float64(name, dtype, shape, device):
    made = call(name, shape, dtype, device).to(grad=True)
    results = made.run()
    grads = cotangents(results)
    actual = torch.autograd.grad(results, made.inputs, grads)
    true_results, true_grads = truth_of(made, results, grads)
    own = (with_tf32_phi(made) if device == "cuda" else made).run(reference_of(name))
    for index, (value, truth, baseline) in enumerate(zip(results, true_results, own, strict=True)):
        label = f"{name}[{index}]"
        k = tolerance(name, device, dtype) * shape.scale
        compare(value.cpu(), truth, k=k, name=label, baseline=baseline.cpu())
    for leaf, value, truth in zip(made.inputs, actual, true_grads, strict=True):
        assert value.dtype == leaf.dtype
        if not truth.any():  # nothing to sum over, or a 1 x 1 matrix that is always 1
            assert shape.path in ("no tokens", "one stream")
            assert not value.any()
            continue
        k = tolerance(name, device, dtype, backward=True) * shape.scale
        compare(value.cpu(), truth, k=k, name=f"grad of {name}")


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_gradgradcheck(name):
    made = call(name, Shape("small", tokens=(2,), n=2, width=3), torch.float64)
    if "iters" in made.others:
        made.others["iters"] = 3

    def function(*inputs):
        return Call(name, inputs, made.others).run()

    inputs = made.to(grad=True).inputs
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["sinkhorn", "mapping", "merge", "pre", "boundary"])
def test_third_derivatives(name):
    made = call(name, Shape("small", tokens=(1,), n=2, width=3), torch.float64)
    if "iters" in made.others:
        made.others["iters"] = 2

    def gradients(*inputs):
        found = Call(name, inputs, made.others).run()
        total = sum((value**2).sum() for value in found)
        return torch.autograd.grad(total, inputs, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, made.to(grad=True).inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_each_output_may_be_unused(name, device):
    made = call(name, ORDINARY, device=device).to(grad=True)
    for index in range(len(made.run())):
        results = made.run()
        grads = cotangents(results)
        actual = torch.autograd.grad(results[index], made.inputs, grads[index], allow_unused=True)
        alone = tuple(g if i == index else torch.zeros_like(g) for i, g in enumerate(grads))
        _, truth = truth_of(made, results, alone)
        for value, expected in zip(actual, truth, strict=True):
            if expected is not None and expected.any():
                k = tolerance(name, device, torch.float32, backward=True)
                compare(value.cpu(), expected, k=k, name=f"{name}[{index}]")


@pytest.mark.parametrize("name", sorted(OPS))
def test_opcheck(name, device):
    arguments, others = torch_op_arguments(name, device)
    torch.library.opcheck(OPS[name], arguments, others)


def test_every_public_op_is_a_torch_op():
    forward = {name for name in OPS if not name.endswith("_backward")}
    steps = {"sublayer", "open_sublayer", "next_sublayer", "close_sublayer", "OpenSublayer"}
    assert set(NAMES) == set(ops.__all__) - steps == forward
    assert all(f"{name}_backward" in OPS for name in NAMES)
    assert all(getattr(torch.ops.mhc_tile, name).default is OPS[name] for name in OPS)


@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph_gives_the_eager_bits(name, device):
    made = call(name, ORDINARY, torch.bfloat16, device).to(grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
    results, eager = made.run(compiled), made.run()
    grads = cotangents(eager)
    for actual, expected in zip(results, eager, strict=True):
        assert torch.equal(actual, expected)
    through = torch.autograd.grad(results, made.inputs, grads)
    for actual, expected in zip(
        through, torch.autograd.grad(eager, made.inputs, grads), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_inductor_knows_an_op_before_it_meets_it(name, monkeypatch):
    """Before torch 2.13 it writes out what led to the arguments of an op that it does not know."""
    from torch._inductor import lowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    made = call(name, ORDINARY, torch.float32)
    implicit = lowering.constrain_to_fake_tensors
    monkeypatch.delitem(lowering.lowerings, OPS[name], raising=False)
    monkeypatch.delitem(lowering._maybe_layout_constraints, OPS[name], raising=False)
    for old in (False, True):
        monkeypatch.setattr(_library, "_WRITES_ARGUMENTS_OUT", old)
        with FakeTensorMode(allow_non_fake_inputs=True):
            made.run(getattr(ops, name))
        assert (OPS[name] in lowering.lowerings) is old
    assert lowering._maybe_layout_constraints[OPS[name]] is implicit


@pytest.mark.parametrize("name", NAMES)
def test_export_with_dynamic_tokens(name):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return Call(name, inputs, others).run()

    others = call(name, ORDINARY).others
    shape = Shape("exported", tokens=(6,), width=16)
    made = call(name, shape)
    tokens = torch.export.Dim("tokens", min=2)
    dynamic = tuple({0: tokens} if value.shape[0] == 6 else {} for value in made.inputs)
    program = torch.export.export(Module(), made.inputs, dynamic_shapes={"inputs": dynamic})
    other = call(name, Shape("other", tokens=(11,), width=16))
    for actual, expected in zip(program.module()(*other.inputs), other.run(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name, device):
    made = call(name, ORDINARY, device=device).to(grad=True)
    expected = made.run()
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = made.run()
        grads = torch.autograd.grad(actual, made.inputs, cotangents(actual))
    for value, truth in zip(actual, expected, strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)
    for value, truth in zip(
        grads, torch.autograd.grad(expected, made.inputs, cotangents(expected)), strict=True
    ):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_inputs_give_the_contiguous_result(name, device):
    made = call(name, ORDINARY, device=device)
    spread = tuple(torch.stack([v, v], -1)[..., 0].detach().requires_grad_() for v in made.inputs)
    assert not any(value.is_contiguous() for value in spread if value.numel() > 1)
    leaves = made.to(grad=True)
    results, expected = Call(name, spread, made.others).run(), leaves.run()
    grads = cotangents(expected)
    for value, truth in zip(results, expected, strict=True):
        assert value.is_contiguous()
        assert torch.equal(value, truth)
    for value, truth in zip(
        torch.autograd.grad(results, spread, grads),
        torch.autograd.grad(expected, leaves.inputs, grads),
        strict=True,
    ):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_twice(name, device):
    made = call(name, SHAPES[8], torch.bfloat16, device).to(grad=True)
    first, second = made.run(), made.run()
    grads = cotangents(first)
    pairs = zip(
        (*first, *torch.autograd.grad(first, made.inputs, grads)),
        (*second, *torch.autograd.grad(second, made.inputs, grads)),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["mapping", "pre", "sinkhorn", "merge", "boundary", "head"])
def test_a_bad_token_does_not_touch_the_others(name, device):
    made = call(name, Shape("bad token", tokens=(5,)), device=device)
    for value in (float("nan"), float("inf")):
        spoiled = copy.deepcopy(made)
        first = spoiled.inputs[0]
        first[2].view(-1)[3] = value
        rest = [0, 1, 3, 4]
        for actual, expected in zip(spoiled.run(), made.run(), strict=True):
            assert torch.isfinite(actual[rest]).all()
            assert (actual[rest] - expected[rest]).abs().max() < 1e-5
            assert not torch.isfinite(actual[2]).all() or value == float("inf")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "width", "parts"),
    [
        pytest.param(700, 264, [slice(0, 1), slice(300, 337), slice(5, 700)], id="few tokens"),
        pytest.param(2000, 1032, [slice(950, 1050)], id="one regime for all"),
    ],
)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "head"])
def test_a_tokens_bits_do_not_depend_on_its_batch(name, tokens, width, parts, batch_invariant):
    batch_invariant(tokens > 1024)
    shape = Shape("batch", tokens=(tokens,), width=width)
    made = call(name, shape, torch.bfloat16, "cuda").to(grad=True)
    results = made.run()
    grads = cotangents(results)
    per_token = [value.shape[:1] == (tokens,) for value in made.inputs]
    whole = torch.autograd.grad(results, made.inputs, grads)
    for part in parts:
        pairs = zip(made.inputs, per_token, strict=True)
        inputs = tuple((v[part] if own else v).detach().requires_grad_() for v, own in pairs)
        sliced = Call(name, inputs, made.others).run()
        assert all(torch.equal(a, b[part]) for a, b in zip(sliced, results, strict=True))
        partial = torch.autograd.grad(sliced, inputs, [grad[part] for grad in grads])
        for own, a, b in zip(per_token, partial, whole, strict=True):
            assert not own or torch.equal(a, b[part])


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(2100, 1280), (333, 1048), (5, 2560)])
@pytest.mark.parametrize("name", ["merge", "pre", "boundary"])
def test_the_kernels_of_many_tokens_match_float64(name, tokens, width, batch_invariant):
    batch_invariant(True)
    shape = Shape("many", tokens=(tokens,), width=width)
    test_forward_and_backward_match_float64(name, torch.bfloat16, shape, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "width"), [(1, 4096), (2, 1544), (2, 2560), (8, 104), (8, 512)])
@pytest.mark.parametrize("tokens", [5, 1100])
def test_pre_of_many_tokens_with_other_n_matches_float64(tokens, n, width, batch_invariant):
    batch_invariant(True)
    shape = Shape("one stream" if n == 1 else "other n", tokens=(tokens,), n=n, width=width)
    test_forward_and_backward_match_float64("pre", torch.bfloat16, shape, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mapping", "pre", "boundary"])
def test_what_no_kernel_takes_falls_back_with_one_warning(name):
    made = call(name, Shape("odd", tokens=(3,), n=3, width=8), torch.bfloat16, "cuda")
    _dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"{name}: the PyTorch reference .* n in"):
        made.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.run()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph_of_forward_and_backward(name):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # leaves belong to the stream that they are made on
        made = call(name, ORDINARY, torch.bfloat16, "cuda").to(grad=True)
        grads = cotangents(made.run())

        def step():
            results = made.run()
            return (*results, *torch.autograd.grad(results, made.inputs, grads))

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
