"""Bad input: every documented error, naming the op, the argument, the rule and the value."""

import re

import numpy as np
import pytest
import torch

from cases import SIGNATURES, Shape, call
from mhc_tile import MHCConfig, ops

SHAPE = Shape("checked", tokens=(2, 3), n=4, width=8)

# op, argument, what it becomes, the message
BAD = [
    ("mapping", "x", lambda x: x[..., :2, :], "mapping: phi must have shape [8, 16] to match x"),
    ("mapping", "x", lambda x: x[0, 0, 0], "mapping: x must have shape [..., n, C], got [8]"),
    ("mapping", "x", lambda x: x[..., :0], "mapping: x must have n >= 1 and C >= 1"),
    ("mapping", "x", lambda x: x[..., :0, :], "mapping: x must have n >= 1 and C >= 1"),
    ("mapping", "x", lambda x: x.long(), "mapping: x must have a dtype of bfloat16, float16"),
    (
        "mapping",
        "phi",
        lambda p: p.t(),
        "mapping: phi must have shape [24, 32] to match x",
    ),
    ("mapping", "phi", lambda p: p.bfloat16(), "mapping: phi must be float32 where x is float32"),
    ("mapping", "alpha", lambda a: a[:1], "mapping: alpha must have shape [3]"),
    ("mapping", "bias", lambda b: b.view(6, 4), "mapping: bias must have shape [24]"),
    (
        "mapping",
        "bias",
        lambda b: b.to("meta"),
        "mapping: bias must be on x's device cpu",
    ),
    ("sinkhorn", "logits", lambda v: v[..., :3], "sinkhorn: logits must have shape [..., n, n]"),
    ("sinkhorn", "logits", lambda v: v.half(), "sinkhorn: logits must be float32 or float64"),
    ("pre_apply", "h_pre", lambda h: h[0], "pre_apply: h_pre must have shape [2, 3, 4]"),
    ("merge", "layer_output", lambda v: v.double(), "merge: layer_output must be float32 where x"),
    ("merge", "h_res", lambda h: h[..., 0], "merge: h_res must have shape [2, 3, 4, 4]"),
    ("pre", "phi", lambda p: p[:8], "pre: phi must have shape [24, 32]"),
    ("boundary", "h_post", lambda h: h[:1], "boundary: h_post must have shape [2, 3, 4]"),
    ("boundary", "alpha", lambda a: a.double(), "boundary: alpha must be float32 where x is"),
    ("expand", "hidden", lambda h: h[0, 0, 0], "expand: hidden must have shape [..., C]"),
    ("expand", "hidden", lambda h: h.int(), "expand: hidden must have a dtype of bfloat16"),
    ("collapse", "x", lambda x: x[0, 0, 0], "collapse: x must have shape [..., n, C], got [8]"),
    ("head", "phi_head", lambda p: p[:3], "head: phi must have shape [4, 32]"),
]


@pytest.mark.parametrize(("op", "argument", "spoil", "message"), BAD)
def test_bad_tensors(op, argument, spoil, message):
    made = call(op, SHAPE)
    position = SIGNATURES[op][0].index(argument)
    inputs = list(made.inputs)
    inputs[position] = spoil(inputs[position])
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ops, op)(*inputs, **made.others)


@pytest.mark.parametrize("op", SIGNATURES)
def test_every_argument_must_be_a_tensor(op):
    made = call(op, SHAPE)
    for position in range(len(made.inputs)):
        inputs = list(made.inputs)
        inputs[position] = [1.0]
        with pytest.raises(TypeError, match=rf"{op}: \w+ must be a torch.Tensor, got list"):
            getattr(ops, op)(*inputs, **made.others)


@pytest.mark.parametrize(
    ("op", "constant", "value", "message"),
    [
        ("mapping", "norm_eps", -1.0, "mapping: norm_eps must be finite and at least 0, got -1.0"),
        ("mapping", "pre_eps", float("nan"), "mapping: pre_eps must be finite and at least 0"),
        ("mapping", "post_scale", 0.0, "mapping: post_scale must be finite and above 0, got 0.0"),
        ("sinkhorn", "iters", 0, "sinkhorn: iters must be an int of at least 1, got 0"),
        ("sinkhorn", "eps", -1e-6, "sinkhorn: eps must be finite and at least 0"),
        ("pre", "iters", 0, "pre: iters must be an int of at least 1"),
        ("pre", "iters", 20.0, "pre: iters must be an int of at least 1, got 20.0"),
        ("expand", "num_streams", 2.5, "expand: num_streams must be an int of at least 1"),
        ("pre", "norm_eps", "1e-6", "pre: norm_eps must be a number, got '1e-6'"),
        ("mapping", "post_scale", None, "mapping: post_scale must be a number, got None"),
        ("pre", "sinkhorn_eps", float("inf"), "pre: sinkhorn_eps must be finite"),
        ("boundary", "norm_eps", -1.0, "boundary: norm_eps must be"),
        ("expand", "num_streams", 0, "expand: num_streams must be an int of at least 1, got 0"),
        ("collapse", "mode", "max", "collapse: mode must be one of ['sum', 'mean'], got 'max'"),
        ("head", "pre_eps", -1.0, "head: pre_eps must be finite and at least 0"),
    ],
)
def test_bad_constants(op, constant, value, message):
    made = call(op, SHAPE)
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ops, op)(*made.inputs, **{**made.others, constant: value})


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_constants_may_be_numbers_of_other_libraries(kind):
    logits = torch.randn(3, 4, 4)
    expected = ops.sinkhorn(logits, iters=5, eps=0.25)
    assert torch.equal(ops.sinkhorn(logits, iters=kind(5), eps=np.float32(0.25)), expected)


@pytest.mark.gpu
def test_mixed_devices():
    made = call("merge", SHAPE)
    with pytest.raises(ValueError, match="merge: layer_output must be on x's device cuda:0"):
        ops.merge(made.inputs[0].cuda(), *made.inputs[1:])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_streams": 0}, ValueError, "num_streams must be an int of at least 1, got 0"),
        ({"num_streams": 4.0}, TypeError, "num_streams must be an int of at least 1, got 4.0"),
        ({"iters": 0}, ValueError, "iters must be an int of at least 1, got 0"),
        ({"iters": True}, TypeError, "iters must be an int of at least 1, got True"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps must be finite and at least 0, got -1.0"),
        ({"pre_eps": float("nan")}, ValueError, "pre_eps must be finite and at least 0, got nan"),
        ({"sinkhorn_eps": -1e-9}, ValueError, "sinkhorn_eps must be finite and at least 0"),
        ({"post_scale": 0.0}, ValueError, "post_scale must be finite and above 0, got 0.0"),
        ({"init": "zero"}, ValueError, "init must be one of ['paper', 'residual'], got 'zero'"),
    ],
)
def test_bad_configurations(values, error, message):
    with pytest.raises(error, match=re.escape(f"MHCConfig: {message}")):
        MHCConfig(**values)
    with pytest.raises(error, match=re.escape(message)):
        MHCConfig.paper().replace(**values)


def test_presets_and_immutability():
    paper, v4 = MHCConfig.paper(), MHCConfig.deepseek_v4(norm_eps=1e-5, num_streams=2)
    assert (paper.norm_eps, paper.pre_eps, paper.sinkhorn_eps) == (1e-20, 0, 0)
    assert (v4.norm_eps, v4.pre_eps, v4.sinkhorn_eps, v4.num_streams) == (1e-5, 1e-6, 1e-6, 2)
    assert (paper.iters, paper.post_scale) == (v4.iters, v4.post_scale) == (20, 2.0)
    with pytest.raises(AttributeError, match="cannot assign"):
        paper.iters = 3
