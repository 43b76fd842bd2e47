"""Numbers at the ends of the dtypes' ranges, through the launchers of kernels in the emulator.

NaN and infinity stay, subnormal sums of squares count, and phi keeps its digits at any scale.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import emulator
from cases import Shape, call, cotangents
from compare import relative_rms
from emulated import CONSTANTS, default, emulated_kernels, kernel, wide  # noqa: F401 - a fixture
from mhc_tile import gradients, reference

pytestmark = pytest.mark.skipif(
    emulator.available() is not None, reason=str(emulator.available() or "")
)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INF = float("inf")
GPU_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32).item()  # that of its arithmetic
MAPS = {key: CONSTANTS[key] for key in ("pre_eps", "post_scale")}
FORMS = ("pre", "persistent", "mapping", "boundary")


def inputs_of(dtype: torch.dtype, tokens: int = 9, n: int = 4, width: int = 64) -> list[Tensor]:
    return list(call("pre", Shape("numbers", tokens=(tokens,), n=n, width=width), dtype).inputs)


def projected(form: str, inputs: list[Tensor], norm_eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Projection and inv_rms by one of the forms of the forward."""
    x, *parameters = inputs
    constants = {**(MAPS if form == "mapping" else CONSTANTS), "norm_eps": norm_eps}
    if form in ("persistent", "boundary"):
        module = kernel("pre.persistent" if form == "persistent" else "boundary")
        constants["config"] = module.Config(2, 1, steps=1, group=8, owners=2)
    else:
        constants["config"] = default(form, x)
    if form == "boundary":  # x_next is x
        tokens, n, _ = x.shape
        maps = torch.zeros(tokens, n), torch.eye(n).repeat(tokens, 1, 1)
        return kernel(form).forward(x, x[:, 0].contiguous(), *maps, *parameters, **constants)[-2:]
    return kernel("pre" if form == "persistent" else form).forward(*inputs, **constants)[-2:]


def saved_of(x: Tensor, phi: Tensor, norm_eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What `projected` should be."""
    return reference.normalised_projection(x.double(), phi.double(), norm_eps)


@pytest.fixture
def _any_config(monkeypatch):
    # sm_80 reallocates no registers
    monkeypatch.setattr(kernel("pre.persistent"), "check_launch", lambda *_: None)


def both_backwards(name: str, inputs: list[Tensor], saved: Any, spoil: Any = None) -> Any:
    """The gradients of `pre` or `mapping` and what they should be; `spoil` changes cotangents."""
    x = inputs[0]
    tokens, n, _ = x.shape
    saved = [value.float() for value in saved]
    first = x[:, 0] if name == "pre" else torch.empty(tokens, n)
    grads = list(cotangents((first, torch.empty(tokens, n), torch.empty(tokens, n, n))))
    if spoil is not None:
        spoil(grads)
    constants = dict(CONSTANTS if name == "pre" else MAPS)
    own = default(f"{name}_backward", x)
    actual = kernel(f"{name}_backward").backward(*grads, *inputs, *saved, **constants, config=own)
    if name == "mapping":
        del constants["pre_eps"]
    formula = getattr(gradients, f"{name}_backward")
    return actual, formula(*wide(*grads), *wide(*inputs), *wide(*saved), **constants)


def test_rounding_to_tf32_keeps_what_is_not_finite():
    import tilelang.language as T

    round_tf32 = kernel("common.split").round_tf32
    mantissas = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FEFFF, 0x7FF000, 0x7FFFFF])
    bits = (torch.arange(512)[:, None] << 23 | mantissas).flatten()
    values = bits.to(torch.int32).view(F32)

    @T.prim_func
    def program(x: T.Tensor((4608,), "float32"), y: T.Tensor((4608,), "float32")):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(4608):
                y[i] = round_tf32(x[i])

    rounded = torch.empty_like(values)
    emulator.emulate(program)(x=values, y=rounded)
    assert torch.equal(rounded.isfinite(), values.isfinite())
    assert torch.equal(rounded[values.isinf()], values[values.isinf()])
    visible = bits & 0x7FE000 != 0  # what a tensor core sees of a NaN
    assert rounded[values.isnan() & visible].isnan().all()
    to_infinity = bits & 0x7FFFFFFF >= 0x7F7FF000
    truth = torch.where(to_infinity, bits, bits + 0x1000) & 0xFFFFE000
    same = rounded.view(torch.int32) == truth.to(torch.int32)
    assert same[values.isfinite()].all()


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("name", ["pre", "mapping"])
def test_a_cotangent_that_is_not_finite_shows_in_the_gradients(name, dtype):
    inputs = inputs_of(dtype, tokens=3)
    for value in (GPU_NAN, INF):

        def spoil(grads, value=value):
            grads[1][2, 1] = value  # of h_post

        actual, truth = both_backwards(name, inputs, saved_of(*inputs[:2]), spoil)
        for got, expected in zip(actual, truth, strict=True):
            assert torch.equal(got.isfinite(), expected.isfinite())
        assert not actual[1][5].isfinite().any()
        assert actual[1][4].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("_any_config")
def test_subnormal_sums_of_squares_count(form):
    for dtype in (BF16, F32) if form in ("pre", "mapping") else (BF16,):
        x, *parameters = inputs_of(dtype, tokens=5, width=64)
        scales = torch.tensor([5e-20, 1e-20, 1e-21, 0.0, 1.0])
        x *= scales[:, None, None].to(dtype)
        for norm_eps in (0.0, 1e-20):
            projection, inv_rms = projected(form, [x, *parameters], norm_eps)
            truth = saved_of(x, parameters[0], norm_eps)
            assert inv_rms[3] == 0
            assert not projection[3].any()
            for token in (0, 1, 2, 4):
                assert relative_rms(inv_rms[token], truth[1][token]) < 1e-4
                assert relative_rms(projection[token], truth[0][token]) < 1e-4


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("name", ["pre", "mapping"])
def test_gradients_of_tiny_streams(name, dtype):
    inputs = inputs_of(dtype, tokens=3)
    inputs[0].fill_(5e-20)
    saved = saved_of(*inputs[:2], 0.0)
    for actual, truth in zip(*both_backwards(name, inputs, saved), strict=True):
        assert relative_rms(actual, truth) < 5e-3


@pytest.mark.parametrize(("n", "form"), [*((4, form) for form in FORMS), (1, "pre"), (8, "pre")])
@pytest.mark.usefixtures("_any_config")
def test_phi_of_any_magnitude_keeps_22_bits_in_float16(n, form):
    x, phi, *others = inputs_of(F16, tokens=3, n=n)
    x[1] *= 1e4 / x[1].abs().max()
    scales = 10.0 ** torch.linspace(-30, 30, len(phi))
    for rows in (scales, torch.full_like(scales, 1e-6)):
        scaled = phi * rows[:, None]
        projection, _ = projected(form, [x, scaled, *others])
        truth, _ = saved_of(x, scaled)
        for row in range(len(phi)):
            assert relative_rms(projection[:, row], truth[:, row]) < 2e-6, row


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("_any_config")
def test_what_is_not_finite_in_phi_stays_in_its_row(form):
    for dtype in (BF16, F16, F32) if form == "pre" else (BF16, F16):
        inputs = inputs_of(dtype, tokens=3)
        finite, _ = projected(form, inputs)
        phi = inputs[1].clone()
        phi[3, 7], phi[9, 200], phi[20, 5], phi[20, 130] = INF, GPU_NAN, INF, -INF
        projection, _ = projected(form, [inputs[0], phi, *inputs[2:]])
        truth, _ = saved_of(inputs[0], phi)
        rows = [3, 9, 20]
        assert torch.equal(
            projection[:, rows].nan_to_num(7.0), truth[:, rows].float().nan_to_num(7.0)
        )
        others = [row for row in range(24) if row not in rows]
        assert torch.equal(projection[:, others], finite[:, others])
