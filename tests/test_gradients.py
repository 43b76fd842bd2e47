"""The written-out gradients against autograd of the reference, in float64."""

import pytest
import torch

from cases import SHAPES, SIGNATURES, Shape, call, cotangents
from compare import relative_rms
from mhc_tile import gradients, reference

F64 = torch.float64
SAVES_PROJECTION = ("mapping", "pre", "boundary", "head")


def written_out(name: str, made, grads):
    """Call `gradients.<name>_backward` with what its op would hand it."""
    inputs, others = list(made.inputs), dict(made.others)
    if name in SAVES_PROJECTION:
        x, phi = (inputs[0], inputs[1]) if name != "boundary" else (None, inputs[4])
        x = reference.merge(*inputs[:4]) if x is None else x
        inputs += reference.normalised_projection(x, phi, others.pop("norm_eps"))
        inputs += [x] if name == "boundary" else []
    if name == "mapping":
        others.pop("pre_eps")
    if name == "expand":
        inputs, others = [], {}
    if name == "collapse":
        others["num_streams"] = inputs.pop().shape[-2]
    result = getattr(gradients, f"{name}_backward")(*grads, *inputs, **others)
    return (result,) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SIGNATURES)
def test_formula_is_the_derivative(name, shape):
    made = call(name, shape, F64).to(grad=True)
    if name == "sinkhorn":
        results = (reference.sinkhorn(*made.inputs, **made.others),)
    else:
        results = made.run(getattr(reference, name))
    grads = cotangents(results)
    truth = torch.autograd.grad(results, made.inputs, grads)
    with torch.no_grad():
        actual = written_out(name, made, grads)
    for value, expected in zip(actual, truth, strict=True):
        assert value.shape == expected.shape
        if expected.norm() < 1e-12:  # nothing to sum over, or a 1 x 1 matrix that is always 1
            assert shape.path in ("no tokens", "one stream")
            assert value.norm() < 1e-12
        else:
            assert relative_rms(value, expected) < 1e-12


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("iters", [1, 2, 20])
def test_sinkhorn_backward_with_every_epsilon_and_count(eps, iters):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, 4, generator=generator, dtype=F64).requires_grad_()
    h_res = reference.sinkhorn(logits, iters, eps)
    grads = cotangents((h_res,))
    (truth,) = torch.autograd.grad(h_res, logits, grads[0])
    actual = gradients.sinkhorn_backward(grads[0], logits.detach(), iters, eps)
    assert relative_rms(actual, truth) < 1e-12


def test_a_token_of_zeros_has_no_gradient_through_the_map():
    made = call("mapping", Shape("zeros", tokens=(3,)), torch.float32, norm_eps=1e-20)
    x = made.inputs[0]
    x[1] = 0
    grads = cotangents(made.run())
    grad_x = written_out("mapping", made, grads)[0]
    assert torch.isfinite(grad_x).all()
    assert not grad_x[1].any()
    assert grad_x[0].any()
