"""Forward-mode AD and `torch.func`: the true tangent for every op, module and model."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import mhc_tile
from cases import SIGNATURES, Call, Shape, call
from compare import compare
from mhc_tile.models.moe import MixtureOfExperts
from tiny_models import EXPERTS

SMALL = Shape("small", tokens=(3,), n=2, width=5)
CONSTANTS = {"norm_eps": 1e-6, "iters": 3}


def functions_of(name: str):
    """The op as a function of its tensors, and float64 values for them."""
    made = call(name, SMALL, torch.float64)
    return lambda *inputs: Call(name, inputs, made.others).run(), made.inputs


def tangents_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in inputs)


def by_reverse_mode(function, inputs, tangents):
    """The tangents of the results, from the reverse mode alone."""
    _, found = torch.autograd.functional.jvp(function, inputs, tangents)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", SIGNATURES)
def test_jvp_of_every_op(name):
    function, inputs = functions_of(name)
    tangents = tangents_of(inputs)
    results, found = jvp(function, inputs, tangents)
    assert all(map(torch.equal, results, function(*inputs)))
    for actual, truth in zip(found, by_reverse_mode(function, inputs, tangents), strict=True):
        compare(actual, truth, k=64, name=f"tangent of {name}")


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_of_bfloat16_streams(name, requires_grad):
    made = call(name, SMALL, torch.bfloat16)
    tangents = tangents_of(made.inputs)
    double = tuple(value.double() for value in made.inputs)
    true = by_reverse_mode(
        lambda *inputs: Call(name, inputs, made.others).run(),
        double,
        tuple(tangent.double() for tangent in tangents),
    )
    with forward_ad.dual_level():
        leaves = made.to(grad=requires_grad).inputs
        duals = tuple(map(forward_ad.make_dual, leaves, tangents))
        found = [forward_ad.unpack_dual(v) for v in Call(name, duals, made.others).run()]
    for pair, truth in zip(found, true, strict=True):
        assert pair.primal.requires_grad == requires_grad
        assert pair.tangent.dtype == pair.primal.dtype
        # products of numbers that are rounded to bf16, summed over n: up to two roundings each
        compare(pair.tangent, truth, k=2**16 * 2, name=f"tangent of {name}")


def test_jacobian_in_forward_mode():
    hidden = torch.randn(3, dtype=torch.float64)

    def function(hidden):
        return mhc_tile.expand(hidden, 2)

    found = torch.autograd.functional.jacobian(
        function, hidden, strategy="forward-mode", vectorize=True
    )
    assert torch.equal(found, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    for transform in (jacfwd, jacrev):
        assert torch.equal(transform(function)(hidden), found)


def sublayer_of(name: str):
    """A function of x that is made of several ops, and x."""
    x, phi, alpha, bias = (value.detach() for value in call("pre", SMALL, torch.float64).inputs)
    parameters = (phi, alpha, bias)
    if name == "sublayer":
        return lambda x: mhc_tile.sublayer(x, torch.tanh, *parameters, **CONSTANTS), x
    if name == "pre and merge":

        def apart(x):
            layer_input, *maps, h_pre = mhc_tile.pre(
                x, *parameters, **CONSTANTS, h_pre=x[..., 0], return_h_pre=True
            )
            return mhc_tile.merge(x, torch.tanh(layer_input + h_pre.sum()), *maps)

        return apart, x
    torch.manual_seed(0)
    connection = {
        "stack": mhc_tile.ManifoldHyperConnection,
        "stack of HC": mhc_tile.HyperConnection,
    }[name]
    config = mhc_tile.MHCConfig(num_streams=2, iters=3)
    layers = [connection(nn.Linear(5, 5), 5, config) for _ in range(3)]
    stack = mhc_tile.HyperConnectedStack(layers).double().requires_grad_(False)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.5)
    return stack, x


@pytest.mark.parametrize("name", ["sublayer", "pre and merge", "stack", "stack of HC"])
def test_what_is_made_of_ops(name):
    function, x = sublayer_of(name)
    tangent = tangents_of((x,))[0]
    result, found = jvp(function, (x,), (tangent,))
    compare(result, function(x), k=64, name=name)
    (truth,) = by_reverse_mode(function, x, tangent)
    compare(found, truth, k=64, name=f"tangent of {name}")

    def loss(x):
        return function(x).square().sum()

    leaf = x.clone().requires_grad_()
    (truth,) = torch.autograd.grad(loss(leaf), leaf)
    compare(grad(loss)(x), truth, k=64, name=f"gradient of {name}")
    batch = torch.stack([x, tangent])
    compare(vmap(grad(loss))(batch)[0], truth, k=64, name="gradient under vmap")

    # forward over reverse and reverse over forward are the same product with the Hessian
    (truth,) = torch.autograd.functional.vhp(loss, x, tangent)[1:]
    compare(jvp(grad(loss), (x,), (tangent,))[1], truth, k=256, name="forward over reverse")
    compare(grad(lambda x: jvp(loss, (x,), (tangent,))[1])(x), truth, k=256, name="reverse")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, tangent)
        (gradient,) = torch.autograd.grad(loss(dual), leaf, create_graph=True)
        compare(forward_ad.unpack_dual(gradient).tangent, truth, k=256, name="dual")


def test_entry_and_exit():
    hidden = torch.randn(3, 5, dtype=torch.float64)
    tangent = tangents_of((hidden,))[0]
    expand, collapse = mhc_tile.Expand(2), mhc_tile.Collapse()
    result, found = jvp(lambda hidden: collapse(expand(hidden)), (hidden,), (tangent,))
    compare(result, collapse(expand(hidden)), k=1)
    compare(found, collapse(expand(tangent)), k=1)


def test_a_mixture_of_experts():
    """Its grouped matmuls and its permutation of rows."""
    torch.manual_seed(0)
    mixture = MixtureOfExperts(EXPERTS).double().eval().requires_grad_(False)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(6, EXPERTS.hidden_size, dtype=torch.float64)
    tangent = tangents_of((hidden,))[0]
    (truth,) = by_reverse_mode(mixture, hidden, tangent)
    compare(jvp(mixture, (hidden,), (tangent,))[1], truth, k=64)
    cotangent = torch.randn_like(hidden)
    leaf = hidden.clone().requires_grad_()
    (truth,) = torch.autograd.grad(mixture(leaf), leaf, cotangent)
    compare(vjp(mixture, hidden)[1](cotangent)[0], truth, k=64)


def test_compiled_jvp():
    function, x = sublayer_of("sublayer")
    tangent = tangents_of((x,))[0]

    def product(x, tangent):
        return jvp(function, (x,), (tangent,))[1]

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    compare(compiled(x, tangent), product(x, tangent), k=64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIGNATURES)
def test_jvp_on_cuda(name):
    made = call(name, SMALL, torch.float32, "cuda")
    tangents = tuple(value.cuda().float() for value in tangents_of(made.inputs))
    function, inputs = functions_of(name)
    truth = by_reverse_mode(function, inputs, tuple(v.cpu().double() for v in tangents))
    _, found = jvp(lambda *inputs: Call(name, inputs, made.others).run(), made.inputs, tangents)
    for actual, expected in zip(found, truth, strict=True):
        compare(actual.cpu(), expected, k=512, name=f"tangent of {name}")


def test_importing_the_package_imports_nothing_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import mhc_tile.models\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "third = new - sys.stdlib_module_names - {'mhc_tile'}\n"
        "dynamo = [name for name in sys.modules if name.startswith('torch._dynamo')]\n"
        "heavy = {name for name in set(sys.modules) - before if name.startswith('torch')}\n"
        "assert not third - {'torch'}, third\n"
        "assert not heavy and not dynamo, (heavy, dynamo[:3])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
