"""Every kernel that ships, through its launcher, on the CPU: its generated CUDA in the emulator.

The emulator checks bounds, races, unwritten memory and barriers besides the result. Kernels run in
the portable form that sm_80 gets.
"""

from typing import Any

import pytest
import torch

import emulator
import emulator_launch
from cases import Shape, call, cotangents
from compare import BACKWARD, PAIRS, K, compare
from emulated import CONSTANTS, KERNELS, default, emulated_kernels, kernel, wide  # noqa: F401 - a fixture
from mhc_tile import gradients, reference
from mhc_tile.ops._definition import DEFINITIONS

pytestmark = pytest.mark.skipif(
    emulator.available() is not None, reason=str(emulator.available() or "")
)
SHAPES = [
    Shape("ragged tokens", tokens=(37,), width=72),
    Shape("one token", tokens=(1,), width=264),
    Shape("one stream", tokens=(7,), n=1, width=64),
    Shape("eight streams", tokens=(7,), n=8, width=64),
    Shape("large logits", tokens=(7,), width=64, scale=8.0),
]


def check(op: str, actual: Any, truth: Any, scale: float, k: float) -> None:
    pairs = zip(actual, truth, strict=True)
    for index, (value, expected) in enumerate(pairs):
        if not expected.any():
            assert not value.any()
            continue
        compare(value, expected, k=k * scale, name=f"{op}[{index}]")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merge(shape, dtype):
    inputs = call("merge", shape, dtype).inputs
    own = default("merge", inputs[0])
    actual = kernel("merge").forward(*inputs, config=own)
    check("merge", [actual], [reference.merge(*wide(*inputs))], 1, 1)
    grad = cotangents((inputs[0],))[0]
    own = default("merge_backward", inputs[0])
    truth = gradients.merge_backward(*wide(grad, *inputs))
    actual = kernel("merge").backward(grad, *inputs, config=own)
    check("merge backward", actual, truth, 1, BACKWARD)
    nothing, *others = kernel("merge").backward(grad, *inputs[:-1], None, config=own)
    assert nothing is None
    check("merge backward without grad_x", others, truth[1:], 1, BACKWARD)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pre_apply_and_streams(shape, dtype):
    x, h_pre = call("pre_apply", shape, dtype).inputs
    hidden = kernel("pre_apply").forward(x, h_pre, config=default("pre_apply", x))
    check("pre_apply", [hidden], [reference.pre_apply(*wide(x, h_pre))], 1, 1)
    grad = cotangents((hidden,))[0]
    truth = gradients.pre_apply_backward(*wide(grad, x, h_pre))
    own = default("pre_apply_backward", x)
    actual = kernel("pre_apply").backward(grad, x, h_pre, config=own)
    check("pre_apply backward", actual, truth, 1, BACKWARD)
    expanded = kernel("streams").expand(hidden, shape.n, config=default("expand", x))
    assert torch.equal(expanded, reference.expand(hidden, shape.n))
    mean = kernel("streams").collapse(x, mean=True, config=default("collapse", x))
    check("collapse", [mean], [reference.collapse(x.double(), "mean")], 1, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_sinkhorn(shape, eps):
    (logits,) = call("sinkhorn", shape).inputs
    h_res = kernel("sinkhorn").forward(
        logits, iters=20, eps=eps, config=default("sinkhorn", logits)
    )
    truth = reference.sinkhorn(logits.double(), 20, eps)
    check("sinkhorn", [h_res], [truth], shape.scale, K["sinkhorn"])
    grad = cotangents((h_res,))[0]
    truth = gradients.sinkhorn_backward(grad.double(), logits.double(), 20, eps)
    own = default("sinkhorn_backward", logits)
    actual = kernel("sinkhorn").backward(grad, logits, iters=20, eps=eps, config=own)
    if shape.n > 1:  # a 1 x 1 matrix is always 1 where eps is 0, and nearly so elsewhere
        check("sinkhorn backward", [actual], [truth], shape.scale, K["sinkhorn"] * BACKWARD)


def test_sinkhorn_backward_of_logits_of_scale_100():
    (logits,) = call("sinkhorn", Shape("large", tokens=(256,), scale=100.0)).inputs
    grad = cotangents((logits,))[0]
    truth = gradients.sinkhorn_backward(grad.double(), logits.double(), 20, 1e-6)
    own = default("sinkhorn_backward", logits)
    actual = kernel("sinkhorn").backward(grad, logits, iters=20, eps=1e-6, config=own)
    compare(actual, truth, k=K["sinkhorn"], name="sinkhorn backward")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pre(shape):
    inputs = call("pre", shape, torch.bfloat16).inputs
    own = default("pre", inputs[0])
    results = kernel("pre.launch").forward(*inputs, norm_eps=1e-6, **CONSTANTS, config=own)
    x, phi, alpha, bias = wide(*inputs)
    saved = reference.normalised_projection(x, phi, 1e-6)
    truth = (*reference.pre_from_projection(x, saved[0], alpha, bias, **CONSTANTS), *saved)
    check("pre", results, truth, shape.scale, PAIRS["pre"])
    grads = cotangents(results[:3])
    part = cotangents((inputs[0],), seed=2)[0]
    truth = gradients.pre_backward(*wide(*grads), x, phi, alpha, bias, *saved, **CONSTANTS)
    for h_res in (None, results[2]):
        actual = kernel("pre_backward.launch").backward(
            *grads, *inputs, *results[3:], part, h_res, **CONSTANTS,
            config=default("pre_backward", inputs[0]),
        )  # fmt: skip
        added = part.double() if h_res is None else h_res.double().mT @ part.double()
        whole = (truth[0] + added, *truth[1:])
        check("pre backward", actual, whole, shape.scale, PAIRS["pre"] * BACKWARD)


ANY = [
    (Shape("fp32", tokens=(11,), width=64), torch.float32),
    (Shape("fp32, ragged width", tokens=(7,), width=127), torch.float32),
    (Shape("fp32, large logits", tokens=(5,), width=64, scale=8.0), torch.float32),
    (Shape("bf16, ragged width", tokens=(1,), width=127), torch.bfloat16),
    (Shape("bf16, narrow", tokens=(50,), width=4), torch.bfloat16),
    (Shape("one channel", tokens=(5,), width=1), torch.bfloat16),
    (Shape("one stream", tokens=(9,), n=1, width=127), torch.bfloat16),
    (Shape("two streams", tokens=(9,), n=2, width=126), torch.float16),
    (Shape("eight streams", tokens=(6,), n=8, width=127), torch.bfloat16),
    (Shape("eight streams, fp32", tokens=(6,), n=8, width=65), torch.float32),
]


@pytest.mark.parametrize(("shape", "dtype"), ANY, ids=[str(shape) for shape, _ in ANY])
def test_mapping_and_pre_of_any_dtype_and_width(shape, dtype):
    inputs = call("pre", shape, dtype).inputs
    x, phi, alpha, bias = wide(*inputs)
    saved = reference.normalised_projection(x, phi, 1e-6)
    own = default("pre", inputs[0])
    results = kernel("pre.launch").forward(*inputs, norm_eps=1e-6, **CONSTANTS, config=own)
    truth = (*reference.pre_from_projection(x, saved[0], alpha, bias, **CONSTANTS), *saved)
    check("pre", results, truth, shape.scale, K["pre"])
    constants = {"pre_eps": 1e-3, "post_scale": 1.5, "norm_eps": 1e-6}
    constants["config"] = default("mapping", inputs[0])
    maps = kernel("mapping.launch").forward(*inputs, **constants)
    truth = reference.maps(saved[0], alpha, bias, shape.n, pre_eps=1e-3, post_scale=1.5)
    check("mapping", maps, (*truth, *saved), shape.scale, K["mapping"])
    last = kernel("mapping.launch").forward(inputs[0][-1:].clone(), *inputs[1:], **constants)
    assert all(torch.equal(alone[0], value[-1]) for alone, value in zip(last, maps, strict=True))


def test_one_block_walks_over_tokens_for_each_segment_of_any_width():
    x, phi, *_ = call("mapping", Shape("walk", tokens=(45,), width=75), torch.bfloat16).inputs
    config = kernel("mapping.simt").Config(members=3, blocks=1, warps=2, group=4)
    parts = kernel("mapping.simt").project(x, phi, config)
    flat, width = x.double().flatten(1), 128  # of the segments of 300 elements
    for member, segment in enumerate(range(0, 300, width)):
        own, phi_own = (v.double()[:, segment : segment + width] for v in (flat, phi))
        truth = torch.cat([(own**2).sum(1, keepdim=True), own @ phi_own.T], 1)
        compare(parts[member], truth, k=2, name=f"segment {member}")


BACKWARD_CASES = [
    (Shape("tokens in several groups", tokens=(300,), width=264), torch.bfloat16, "sm_80"),
    (Shape("overlapping launches", tokens=(300,), width=264), torch.bfloat16, "sm_90a"),
    (Shape("ragged width", tokens=(19,), width=127), torch.bfloat16, "sm_80"),
    (Shape("ragged width in float32", tokens=(19,), width=127), torch.float32, "sm_90a"),
    (Shape("eight streams", tokens=(19,), n=8, width=72), torch.float16, "sm_80"),
    (Shape("one channel", tokens=(5,), width=1), torch.bfloat16, "sm_90a"),
    (Shape("two streams in float32", tokens=(19,), n=2, width=72), torch.float32, "sm_80"),
]


@pytest.mark.parametrize(("shape", "dtype", "arch"), BACKWARD_CASES, ids=str)
def test_backward_of_pre_and_mapping(shape, dtype, arch, monkeypatch):
    for name in ("mapping_backward", "pre_backward.dots", "mapping.token_state", "common.programs"):
        monkeypatch.setattr(kernel(name), "architecture", lambda _device: arch)
    inputs = call("pre", shape, dtype).inputs
    x, *parameters = wide(*inputs)
    saved = [value.float() for value in reference.normalised_projection(x, parameters[0], 1e-6)]
    maps = [torch.empty(*shape.tokens, *rest) for rest in ((shape.n,), (shape.n,), (shape.n,) * 2)]
    layer_input, k = x[:, 0].to(dtype), K["pre"] * BACKWARD

    grads = cotangents((layer_input, *maps[1:]))
    truth = gradients.pre_backward(*wide(*grads), x, *parameters, *wide(*saved), **CONSTANTS)
    own = default("pre_backward", inputs[0])
    actual = kernel("pre_backward.launch").backward(
        *grads, *inputs, *saved, **CONSTANTS, config=own
    )
    check("pre backward", actual, truth, 1, k)

    grads = cotangents(tuple(maps))
    truth = gradients.mapping_backward(
        *wide(*grads), x, *parameters, *wide(*saved), post_scale=CONSTANTS["post_scale"]
    )
    constants = {name: CONSTANTS[name] for name in ("pre_eps", "post_scale")}
    own = default("mapping_backward", inputs[0])
    actual = kernel("mapping.backward").backward(*grads, *inputs, *saved, **constants, config=own)
    check("mapping backward", actual, truth, 1, k)


@pytest.mark.parametrize(
    ("tokens", "n", "width", "ranks", "groups", "reducers", "steps"),
    [
        (1, 4, 64, 2, 2, 3, 1),
        (90, 4, 64, 2, 2, 3, 1),
        (100, 4, 64, 3, 1, 2, 1),
        (40, 1, 264, 3, 1, 2, 2),  # Sinkhorn of one entry, sums of 4 columns
        (40, 2, 136, 2, 2, 3, 2),
        (40, 8, 24, 2, 1, 3, 1),  # sums of 81 columns, three a lane
    ],
)
def test_pre_in_one_launch(tokens, n, width, ranks, groups, reducers, steps):
    shape = Shape("groups", tokens=(tokens,), n=n, width=width)
    inputs = call("pre", shape, torch.bfloat16).inputs
    config = kernel("pre.persistent").Config(ranks, groups, steps, group=8, owners=reducers)
    results = kernel("pre.launch").forward(*inputs, norm_eps=1e-6, **CONSTANTS, config=config)
    x, phi, alpha, bias = wide(*inputs)
    saved = reference.normalised_projection(x, phi, 1e-6)
    truth = (*reference.pre_from_projection(x, saved[0], alpha, bias, **CONSTANTS), *saved)
    check("pre in one launch", results, truth, shape.scale, PAIRS["pre"])


@pytest.mark.parametrize(
    ("tokens", "width", "ranks", "groups", "steps", "dtype"),
    [
        (1, 64, 2, 2, 1, torch.bfloat16),
        (90, 72, 2, 2, 2, torch.bfloat16),  # the second rank has fewer channels, rows have a pad
        (100, 64, 3, 1, 1, torch.float16),
        (40, 520, 3, 1, 4, torch.bfloat16),  # nothing is spared: a lane a chunk
    ],
)
def test_boundary_in_one_launch(tokens, width, ranks, groups, steps, dtype, monkeypatch):
    boundary, persistent = kernel("boundary.launch"), kernel("pre.persistent")
    monkeypatch.setattr(persistent, "check_launch", lambda *_: None)  # sm_80 cannot
    shape = Shape("groups", tokens=(tokens,), width=width)
    inputs = call("boundary", shape, dtype).inputs
    config = boundary.Config(ranks, groups, steps=steps, group=8, owners=2)
    results = boundary.forward(*inputs, norm_eps=1e-6, **CONSTANTS, config=config)
    x_next = kernel("merge").forward(*inputs[:4], config=default("merge", inputs[0]))
    assert torch.equal(results[0], x_next)
    alone = persistent.Config(ranks, groups, steps=steps, group=8)
    same = kernel("pre.launch").forward(
        x_next, *inputs[4:], norm_eps=1e-6, **CONSTANTS, config=alone
    )
    assert all(torch.equal(one, other) for one, other in zip(results[1:], same, strict=True))


def test_mailbox_stages_keep_reducers_apart_from_old_messages():
    persistent = kernel("pre.persistent")
    for ranks, reducers in ((1, 1), (5, 7), (10, 3), (10, 7), (28, 3), (33, 5)):
        config = persistent.Config(ranks, 4, owners=reducers)
        assert config.mailbox_stages >= max(config.lag, config.longest_skip())
    assert persistent.Config(10, 13, owners=7).longest_skip() == 7
    assert persistent.Config(28, 4).longest_skip() == 9


def test_a_token_of_zeros_and_one_of_nan():
    x, *parameters = call("mapping", Shape("corners", tokens=(9,), width=64), torch.bfloat16).inputs
    x[2] = 0
    x[5, 1, 7] = float("nan")
    constants = {"pre_eps": 0.0, "post_scale": 2.0}
    own = default("mapping", x)
    *maps, projection, inv_rms = kernel("mapping.launch").forward(
        x, *parameters, norm_eps=1e-20, **constants, config=own
    )
    assert inv_rms[2] == 0
    assert not projection[2].any()
    assert torch.isnan(projection[5]).all()
    assert torch.isfinite(projection[[0, 1, 2, 3, 4, 6, 7, 8]]).all()
    x[5] = 1
    *maps, projection, inv_rms = kernel("mapping.launch").forward(
        x, *parameters, norm_eps=1e-20, **constants, config=own
    )
    grads = kernel("mapping.backward").backward(
        *cotangents(tuple(maps)), x, *parameters, projection, inv_rms, **constants,
        config=default("mapping_backward", x),
    )  # fmt: skip
    assert not grads[0][2].any()
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_token_without_leading_dims_through_the_implementation_of_the_op(dtype):
    for name in ("mapping", "pre"):
        forward, backward = (DEFINITIONS[op].by_kernel for op in (name, f"{name}_backward"))
        made = call(name, Shape("no leading dims", tokens=(), width=64), dtype)
        results = forward(*made.inputs, **made.others)
        kept = results[-2:]
        assert [value.dim() for value in kept] == [1, 0]
        truth = getattr(reference, name)(*wide(*made.inputs), **made.others)
        check(name, results[:-2], truth, 1, PAIRS[name])
        grads = cotangents(tuple(results[:-2]))
        actual = backward(*grads, *made.inputs, *kept, **made.others)
        assert [a.shape for a in actual] == [value.shape for value in made.inputs]


@pytest.mark.parametrize(
    ("tokens", "width", "ranks", "groups", "lag", "merge_grad"),
    [
        (1, 72, 2, 2, 2, "added"),
        (150, 72, 2, 2, 2, "added"),  # several iterations, the second rank has few channels
        (70, 72, 2, 1, 3, "mixed"),
        (100, 264, 2, 1, 2, ""),  # six grad_x warps
        (40, 264, 2, 1, 2, "mixed"),
        (100, 136, 2, 1, 2, ""),
        (70, 128, 2, 2, 2, "mixed"),  # every rank has all of its channels
        (40, 136, 2, 1, 2, "mixed"),
    ],
)
def test_backward_of_pre_in_one_pass(tokens, width, ranks, groups, lag, merge_grad, monkeypatch):
    persistent = kernel("pre_backward.persistent")
    monkeypatch.setattr(persistent.Config, "launches", lambda *_: True)  # sm_80 cannot
    limit = emulator_launch.shared_limit("sm_90a")  # the kernel is for that and later
    monkeypatch.setattr(emulator_launch, "shared_limit", lambda _: limit)
    monkeypatch.setattr(persistent, "FLUSH", 2)
    inputs = call("pre", Shape("groups", tokens=(tokens,), width=width), torch.bfloat16).inputs
    x, *parameters = wide(*inputs)
    saved = [value.float() for value in reference.normalised_projection(x, parameters[0], 1e-6)]
    layer_input = x[:, 0].bfloat16()
    part = torch.randn_like(inputs[0])
    h_res = torch.rand(tokens, 4, 4)
    given = {"": (), "added": (part,), "mixed": (part, h_res)}[merge_grad]
    grads = cotangents((layer_input, torch.empty(tokens, 4), torch.empty(tokens, 4, 4)))
    truth = gradients.pre_backward(*wide(*grads), x, *parameters, *wide(*saved), **CONSTANTS)
    added = {"": 0, "added": part.double(), "mixed": h_res.double().mT @ part.double()}[merge_grad]
    truth = (truth[0] + added, *truth[1:])
    config = persistent.Config(ranks, groups, lag)
    actual = kernel("pre_backward.launch").backward(
        *grads, *inputs, *saved, *given, **CONSTANTS, config=config
    )
    check("pre backward", actual, truth, 1, K["pre"] * BACKWARD)
