"""TileLang programs on the emulator: real ones against PyTorch, broken ones reported."""

import re
import time
from dataclasses import replace

import pytest
import torch

from emulator import EmulationError, available, emulate, emulate_source, poisoned

if reason := available():
    pytest.skip(reason, allow_module_level=True)

from tilelang.language import GemmWarpPolicy

import emulator_programs as programs
from mhc_tile.kernels.common.lowering import lower

BASELINE = {"tl.reducer_force_baseline": True}
TOKENS = 37
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative RMS error; infinite if anything is NaN."""
    distance = (actual.double() - truth).norm() / truth.norm()
    return float("inf") if distance.isnan() else distance.item()


def doubly_stochastic(logits: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    matrix = logits.double().exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [256, 200])
def test_pre_apply_in_fragments(dtype, channels):
    x, h_pre = torch.randn(TOKENS, 4, channels).to(dtype), torch.rand(TOKENS, 4)
    layer_input = poisoned(TOKENS, channels, dtype=dtype)
    run = emulate(programs.pre_apply(channels, name(dtype)))
    run(x=x, h_pre=h_pre, layer_input=layer_input)
    truth = torch.einsum("ti,tic->tc", h_pre.double(), x.double())
    assert error(layer_input, truth) < torch.finfo(dtype).eps


@pytest.mark.parametrize("program", [programs.sinkhorn_threads, programs.sinkhorn_fragment])
def test_sinkhorn(program):
    logits, h_res = torch.randn(TOKENS, 4, 4) * 3, poisoned(TOKENS, 4, 4)
    emulate(program())(logits=logits, h_res=h_res)
    assert error(h_res, doubly_stochastic(logits)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_projection_through_cp_async_and_tensor_cores(dtype, stages):
    x, phi = torch.randn(TOKENS, 256).to(dtype), torch.randn(24, 256).to(dtype)
    out = poisoned(TOKENS, 24)
    emulate(programs.project(256, name(dtype), stages=stages))(x=x, phi=phi, out=out)
    assert error(out, x.double() @ phi.double().T) < 1e-6


def test_projection_in_tf32():
    x, phi = torch.randn(TOKENS, 128).bfloat16(), torch.randn(24, 128)
    out = poisoned(TOKENS, 24)
    emulate(programs.project(128, "bfloat16", weights="tfloat32"))(x=x, phi=phi, out=out)
    truth = x.double() @ phi.double().T
    assert 1e-5 < error(out, truth) < 6e-4  # phi's low 13 bits are dropped
    truncated = (phi.view(torch.int32) & -0x2000).view(torch.float32)
    assert error(out, x.double() @ truncated.double().T) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gradient_of_the_weights_through_transposed_loads(dtype):
    x, grad = torch.randn(TOKENS, 128).to(dtype), torch.randn(TOKENS, 32).to(dtype)
    grad_phi = poisoned(32, 128, dtype=dtype)
    emulate(programs.grad_weights(128, name(dtype)))(x=x, grad=grad, grad_phi=grad_phi)
    assert error(grad_phi, grad.double().T @ x.double()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("threads", [32, 128])
def test_a_reducer_across_warps(threads):
    grad, x = torch.randn(TOKENS, 4, 256).bfloat16(), torch.randn(TOKENS, 4, 256).bfloat16()
    grad_h_res = poisoned(TOKENS, 4, 4)
    run = emulate(programs.outer_sums(256, threads=threads), pass_configs=BASELINE)
    run(grad=grad, x=x, grad_h_res=grad_h_res)
    assert error(grad_h_res, torch.einsum("toc,tic->toi", grad.double(), x.double())) < 1e-6


def emulated_squares(policy, configs):
    """Relative errors of the product and of its operand's sums of squares."""
    x, phi = torch.randn(64, 128).bfloat16(), torch.randn(32, 128).bfloat16()
    out, squares = poisoned(64, 32), poisoned(64)
    run = emulate(programs.squares_beside_gemm(128, policy), pass_configs=configs)
    run(x=x, phi=phi, out=out, squares=squares)
    product = x.double() @ phi.double().T
    return error(out, product), error(squares, x.double().square().sum(1))


def test_the_reducer_that_tilelang_miscompiles_is_caught():
    """TileLang 0.1.15 drops the combine across lanes beside a GEMM whose warps split along N."""
    product, squares = emulated_squares(GemmWarpPolicy.Square, None)
    assert product < 1e-6
    assert 0.7 < squares < 0.8  # a quarter of the truth, as on the GPU


@pytest.mark.parametrize(
    ("policy", "configs"), [(GemmWarpPolicy.Square, BASELINE), (GemmWarpPolicy.FullRow, None)]
)
def test_what_avoids_the_miscompiled_reducer(policy, configs):
    assert max(emulated_squares(policy, configs)) < 1e-6


def test_no_barrier_or_wait_of_the_projection_can_be_left_out():
    x, phi = torch.randn(TOKENS, 256).bfloat16(), torch.randn(24, 256).bfloat16()
    lowered = lower(programs.project(256, "bfloat16"), "sm_80")
    lines = lowered.source.split("\n")
    waits = re.compile(r"\s*(__syncthreads\(\)|tl::cp_async_wait<\d+>\(\));")
    numbers = [number for number, line in enumerate(lines) if waits.match(line)]
    assert len(numbers) >= 4
    for number in numbers:
        source = "\n".join([*lines[:number], "", *lines[number + 1 :]])
        run = emulate_source(replace(lowered, source=source), schedules=["forward"])
        with pytest.raises(EmulationError, match=r"race|nobody has written|has been waited for"):
            run(x=x, phi=phi, out=poisoned(TOKENS, 24), tokens=TOKENS)


def test_two_kernels_in_one_program():
    x, scaled, sums = torch.randn(TOKENS, 64), poisoned(TOKENS, 64), poisoned(TOKENS)
    emulate(programs.scale_then_sum(64))(x=x, scaled=scaled, sums=sums, factor=3.0)
    assert torch.equal(scaled, 3 * x)
    assert error(sums, 3 * x.double().sum(1)) < 1e-6


def test_hopper_code_runs_where_its_own_units_are_off():
    configs = {
        "tl.disable_warp_specialized": True,
        "tl.disable_tma_lower": True,
        "tl.disable_wgmma": True,
    }
    x, phi = torch.randn(TOKENS, 128).bfloat16(), torch.randn(24, 128).bfloat16()
    out = poisoned(TOKENS, 24)
    emulate(programs.project(128, "bfloat16"), "sm_90a", configs)(x=x, phi=phi, out=out)
    assert error(out, x.double() @ phi.double().T) < 1e-6


def test_hopper_code_is_refused_otherwise():
    with pytest.raises(EmulationError, match="which the emulator does not have; lower for"):
        emulate(programs.project(128, "bfloat16", tile=64), "sm_90a")


@pytest.mark.parametrize("arch", ["sm_100a", "sm_120a"])
def test_packed_math_of_newer_architectures(arch):
    configs = {"tl.disable_warp_specialized": True, "tl.disable_tma_lower": True}
    x, h_pre, layer_input = torch.randn(5, 4, 256), torch.rand(5, 4), poisoned(5, 256)
    emulate(programs.pre_apply(256, "float32"), arch, configs)(
        x=x, h_pre=h_pre, layer_input=layer_input
    )
    assert error(layer_input, torch.einsum("ti,tic->tc", h_pre.double(), x.double())) < 1e-6


def test_a_missing_barrier_is_reported():
    x, y = torch.randn(3, 256), poisoned(3, 256)
    emulate(programs.mirror(256))(x=x, y=y)
    assert torch.equal(y, x.flip(1))
    y = poisoned(3, 256)
    with pytest.raises(EmulationError, match="shared memory, which nobody has written yet"):
        emulate(programs.mirror(256), pass_configs=programs.UNSYNCHRONISED)(x=x, y=y)
    with pytest.raises(EmulationError, match="depends on the order of threads"):
        emulate(programs.mirror(256), pass_configs=programs.UNSYNCHRONISED, instrument=False)(
            x=x, y=y
        )


def test_a_write_out_of_bounds_is_reported():
    x, y = torch.randn(13, 4), poisoned(13, 4)
    emulate(programs.double_rows())(x=x, y=y)
    assert torch.equal(y, 2 * x)
    with pytest.raises(EmulationError, match="out of bounds: at offset 208 of x, which has 208"):
        emulate(programs.double_rows(), pass_configs=programs.UNGUARDED)(x=x, y=y)
    with pytest.raises(EmulationError, match="writes outside of y, which has 208 bytes"):
        emulate(programs.double_rows(), pass_configs=programs.UNGUARDED, instrument=False)(x=x, y=y)


def test_unwritten_shared_memory_is_reported_even_where_no_nan_comes_out():
    x, y = torch.randn(3, 256), poisoned(3, 256)
    with pytest.raises(EmulationError, match="shared memory, which nobody has written yet"):
        emulate(programs.broken_half_written(256))(x=x, y=y)
    emulate(programs.broken_half_written(256), instrument=False)(x=x, y=y)
    assert not y.isnan().any()


def test_a_wait_for_too_few_copies_is_reported():
    x, y = torch.randn(3, 2, 128), poisoned(3, 128)
    with pytest.raises(EmulationError, match=r"before the cp.async of .* has been waited for"):
        emulate(programs.broken_short_wait(128))(x=x, y=y)
    emulate(programs.broken_short_wait(128), instrument=False)(x=x, y=y)
    assert y.isnan().any()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": torch.randn(5, 64)}, ValueError, r"x must have shape \[tokens, 256\] = \[5, 256\]"),
        ({"y": torch.randn(4, 256)}, ValueError, r"y must have shape .* got \[4, 256\]"),
        ({"x": torch.randn(5, 256).half()}, ValueError, "x must have dtype torch.float32"),
        ({"x": torch.randn(256, 5).t()}, ValueError, r"x must be contiguous, got strides \[1, 5\]"),
        ({"z": 3.0}, TypeError, "unknown z"),
    ],
)
def test_arguments_are_checked_as_on_a_gpu(change, kind, message):
    values = {"x": torch.randn(5, 256), "y": poisoned(5, 256), **change}
    with pytest.raises(kind, match=message):
        emulate(programs.mirror(256))(**values)
    with pytest.raises(TypeError, match="missing y"):
        emulate(programs.mirror(256))(x=values["x"])


def test_a_run_takes_far_less_than_a_second():
    x, h_pre = torch.randn(TOKENS, 4, 256).bfloat16(), torch.rand(TOKENS, 4)
    layer_input = poisoned(TOKENS, 256, dtype=torch.bfloat16)
    run = emulate(programs.pre_apply(256, "bfloat16"))
    start = time.process_time()
    run(x=x, h_pre=h_pre, layer_input=layer_input)
    assert time.process_time() - start < 0.5
