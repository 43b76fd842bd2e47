"""Planted mistakes, each of which the emulator must report, with the line that makes it."""

import subprocess

import pytest
import torch

import emulator_build
from cuda_source import cuda
from emulator import EmulationError, available, emulate_source, poisoned
from mhc_tile.kernels.common.lowering import DeviceFunction, Lowered

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))
SHARED = "  float* s = (float*)pool;\n"  # line 4, after the declaration of the pool
ASYNC = "  tl::cp_async_gs<4>(s + threadIdx.x, x + threadIdx.x);\n  tl::cp_async_commit();\n"

# name: what the message says, the source line it points to (the body starts at line 3), the body.
BF16 = "tl::DataType::kBFloat16"
MISTAKES = {
    "missing barrier": (
        r"reads offset \d+ of shared memory, which nobody has written yet",
        6,
        SHARED + "  s[threadIdx.x] = x[threadIdx.x];\n  out[threadIdx.x] = s[63 - threadIdx.x];",
    ),
    "missing barrier before a slot is used again": (
        "race: writes offset .* read by thread",
        8,
        SHARED + "  s[threadIdx.x] = x[threadIdx.x];\n  __syncthreads();\n"
        "  float v = s[min(threadIdx.x + 1, 63)];\n  s[threadIdx.x] = v;\n"
        "  __syncthreads();\n  out[threadIdx.x] = s[threadIdx.x];",
    ),
    "two values for one place": (
        "race: writes offset 0 of shared memory, over another value",
        5,
        SHARED + "  s[0] = x[threadIdx.x];\n  __syncthreads();\n  out[threadIdx.x] = s[0];",
    ),
    "a shuffle is no barrier": (
        "race: reads",
        7,
        SHARED + "  s[threadIdx.x] = x[threadIdx.x];\n"
        "  float sum = tl::warp_reduce_sum(x[threadIdx.x]);\n"
        "  out[threadIdx.x] = s[threadIdx.x ^ 1] + sum;",
    ),
    "__syncwarp orders one warp, not two": (
        "race: reads",
        6,
        SHARED + "  s[threadIdx.x] = x[threadIdx.x]; __syncwarp(); __syncwarp();\n"
        "  out[threadIdx.x] = s[threadIdx.x ^ 32];",
    ),
    "two blocks write one place": (
        "race: writes offset 0 of out, over another value written by thread 0 of block",
        3,
        "  if (threadIdx.x == 0) out[0] = blockIdx.x;",
    ),
    "a block reads what another wrote": (
        "race: writes offset 256 of out, read by thread 0 of block 0 in line 4",
        3,
        "  out[blockIdx.x * 64 + threadIdx.x] = 1.0f;\n"
        "  x[blockIdx.x * 64 + threadIdx.x] = out[(1 - blockIdx.x) * 64 + threadIdx.x];",
    ),
    "a write past the end": (
        "writes 4 bytes out of bounds: at offset 512 of out, which has 512 bytes",
        3,
        "  out[blockIdx.x * 64 + threadIdx.x + 1] = 0.0f;",
    ),
    "a read before the start": (
        "reads 16 bytes out of bounds: at offset -16 of x",
        3,
        "  float4 v[2]; v[threadIdx.x & 1] = *(float4*)(x - 4 + 8 * (threadIdx.x & 1));\n"
        "  out[threadIdx.x] = v[0].x + v[1].y;",
    ),
    "a wild address": (
        "reads 4 bytes outside of every tensor",
        3,
        "  out[threadIdx.x] = x[1ll << 40];",
    ),
    "shared memory past its end": (
        "writes 4 bytes out of bounds: at offset 256 of shared memory, which has 256 bytes",
        5,
        SHARED + "  s[threadIdx.x + 1] = x[threadIdx.x];",
    ),
    "a local array past its end": (
        "index 4 is outside of a local",
        4,
        "  float v[4];\n  for (int i = 0; i <= int(x[0]); ++i) v[i] = x[i];\n"
        "  out[threadIdx.x] = v[0] + v[3];",
    ),
    "a misaligned vector": (
        "misaligned",
        3,
        "  *(float2*)(out + 2 * threadIdx.x) = *(float2*)(x + 1);",
    ),
    "shared memory nobody wrote": (
        "reads offset 4 of shared memory, which nobody has written yet",
        6,
        SHARED + "  if (threadIdx.x != 1) s[threadIdx.x] = 1.0f; __syncthreads();\n"
        "  out[threadIdx.x] = fmaxf(s[threadIdx.x], 0.0f);",
    ),
    "shared memory an earlier block wrote": (
        "reads offset .* of shared memory, which nobody has written yet",
        6,
        SHARED + "  if (blockIdx.x == 0) s[threadIdx.x] = 1.0f;\n"
        "  if (blockIdx.x == 1) out[threadIdx.x] = s[threadIdx.x];",
    ),
    "cp.async without its wait": (
        "before the cp.async of thread 63 .* has been waited for",
        8,
        SHARED + ASYNC + "  __syncthreads();\n  out[threadIdx.x] = s[threadIdx.x];",
    ),
    "cp.async with a wait for too few groups": (
        "before the cp.async",
        8,
        SHARED + ASYNC + "  tl::cp_async_wait<1>(); __syncthreads();\n"
        "  out[threadIdx.x] = s[threadIdx.x];",
    ),
    "cp.async waited for, but no barrier": (
        "race: reads",
        8,
        SHARED + ASYNC + "  tl::cp_async_wait<0>();\n  out[threadIdx.x] = s[threadIdx.x / 2];",
    ),
    "cp.async into what others still read": (
        "race: writes offset .* of shared memory, read by",
        7,
        SHARED + "  s[threadIdx.x] = x[threadIdx.x]; __syncthreads();\n"
        "  out[threadIdx.x] = s[min(threadIdx.x + 1, 63)];\n"
        "  tl::cp_async_gs<4>(s + threadIdx.x, x + threadIdx.x);\n  tl::cp_async_wait<0>();",
    ),
    "a barrier that half of the block skips": (
        r"(?s)divergent barrier.*threads 0-31 wait at __syncthreads, line 3.*32-63 have ended",
        3,
        "  if (threadIdx.x < 32) __syncthreads();",
    ),
    "a barrier with too large a count": (
        r"(?s)divergent barrier.*threads 0-63 wait at barrier 2",
        3,
        "  tl::__sync_thread_partial(2, 96);",
    ),
    "a shuffle that half of the warp skips": (
        r"(?s)divergent barrier.*threads 0-15 wait at a shuffle.*16-63 have ended",
        3,
        "  if (threadIdx.x / 16 != 1) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);",
    ),
    "lanes at different instructions": (
        "divergent warp: lane 16 is at a shuffle while others .* are at __syncwarp",
        4,
        "  if (threadIdx.x < 16) __syncwarp();\n"
        "  else out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);",
    ),
    "a lane outside of its mask": (
        "a shuffle: lane 16 is not in its own mask 0000ffff",
        3,
        "  out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1);",
    ),
    "a flag that nobody sets": (
        "threads poll for what nobody stores",
        3,
        "  while (AtomicLoad((int*)x, 2) == 0) {}",
    ),
    "a grid barrier in an ordinary launch": (
        "a grid barrier needs a cooperative launch",
        3,
        "  cooperative_groups::this_grid().sync();",
    ),
    "a tile behind its array": (
        "a tile's registers reach past the end of their array",
        5,
        "  float c[4] = {}; unsigned a[4] = {}, b[4] = {};\n"
        "  for (int low = 0; low < 2; ++low)\n"
        f"    tl::mma_sync<{BF16}, {BF16}, tl::DataType::kFloat32, 16, 8, 16, false, true>(\n"
        "      c, a, b + 4 * low);\n  out[threadIdx.x] = c[0];",
    ),
    "a failed assertion": (
        "too many",
        3,
        '  device_assert_with_msg(threadIdx.x < 32, "too many");',
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_reported_with_its_line(name):
    message, line, body = MISTAKES[name]
    shared = 256 if "pool" in body else 0
    run = cuda("float* x, float* out", body, block=64, grid=2, shared=shared)
    x, out = torch.full((256,), 4.0), poisoned(128)
    if "two values" in name or "before a slot" in name:
        x = torch.randn(256)
    if "flag" in name:
        x.zero_()
    with pytest.raises(EmulationError, match=message) as error:
        run(x=x, out=out)
    assert f"line {line}:" in str(error.value)
    assert out.isnan().all(), "a run that fails must leave the caller's tensors alone"


def test_the_last_to_arrive_without_waiting_is_ordered_no_further_than_others():
    body = """
  float* s = (float*)pool;
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 32) {
    tl::__sync_thread_partial(3, 64);
    s[threadIdx.x] = 2.0f;
  } else {
    tl::__named_barrier_arrive(3, 64);
    if (threadIdx.x == 62) out[62] = s[30];
  }"""
    run = cuda("float* x, float* out", body, block=64, shared=256, schedules=["forward"])
    with pytest.raises(EmulationError, match=r"writes offset 120 .* read by thread 62"):
        run(x=torch.ones(64), out=poisoned(64))


def test_an_error_leaves_the_emulator_usable():
    broken = cuda("float* out", "  out[1 + threadIdx.x] = 0.0f;")
    whole = cuda("float* out", "  __syncthreads();\n  out[threadIdx.x] = 1.0f;")
    out = poisoned(32)
    for _ in range(3):
        with pytest.raises(EmulationError):
            broken(out=out)
        whole(out=out)
    assert torch.equal(out, torch.ones(32))


def test_schedules_alone_find_a_missing_barrier():
    body = SHARED + "  s[threadIdx.x] = x[threadIdx.x];\n  out[threadIdx.x] = s[63 - threadIdx.x];"
    values = {"x": torch.randn(64), "out": poisoned(64)}
    options = {"block": 64, "shared": 256, "instrument": False}
    with pytest.raises(EmulationError, match="out depends on the order of threads: forward and"):
        cuda("float* x, float* out", body, **options)(**values)
    cuda("float* x, float* out", body, **options, schedules=["reverse"])(**values)


def test_a_missing_grid_barrier_is_found_by_running_blocks_apart():
    body = """
  if (threadIdx.x == 0) part[blockIdx.x] = blockIdx.x + 1.0f;
  {barrier}
  out[blockIdx.x * 32 + threadIdx.x] = part[(blockIdx.x + 1) % gridDim.x];"""
    parameters, options = "float* part, float* out", {"grid": 3, "cooperative": True}
    values = {"part": torch.zeros(3), "out": poisoned(96)}
    whole = body.format(barrier="cooperative_groups::this_grid().sync();")
    cuda(parameters, whole, **options)(**values)
    assert values["out"].view(3, 32)[:, 0].tolist() == [2.0, 3.0, 1.0]
    values["part"].zero_()
    with pytest.raises(EmulationError, match="out depends on the order of threads"):
        cuda(parameters, body.format(barrier=""), **options)(**values)


def test_guard_zones_alone_find_a_write_past_the_end():
    run = cuda("float* out", "  out[threadIdx.x + 1] = 0.0f;", instrument=False)
    with pytest.raises(EmulationError, match="writes outside of out, which has 128 bytes"):
        run(out=poisoned(32))


@pytest.mark.parametrize(
    ("line", "construct", "remedy"),
    [
        ("tl::tma_load(x_desc, bar, s, 0, 0);", "TMA copies", "tl.disable_tma_lower"),
        ("tl::wgmma_ss<1>(a, b, c);", "wgmma", "tl.disable_wgmma"),
        ("tl::warpgroup_reg_alloc<240>();", "setmaxnreg", "tl.disable_warp_specialized"),
        ("mbarrier[0].arrive();", "mbarriers", "tl.disable_warp_specialized"),
        ("tl::cluster_sync();", "clusters", "sm_80"),
        ("tl::tcgen05mma_ss<1>(a, b, c);", "tcgen05", "sm_80"),
        ('asm volatile("nop;");', "inline PTX", "TileLang's own operations"),
    ],
)
def test_what_cannot_be_emulated_is_refused_by_name(line, construct, remedy):
    with pytest.raises(EmulationError, match=construct) as error:
        cuda("float* out", f"  {line}")
    assert remedy in str(error.value)
    assert f"line 3: {line}" in str(error.value)


def test_what_the_compiler_rejects_is_named_briefly():
    with pytest.raises(EmulationError, match="the emulator may lack unheard_of") as error:
        cuda("float* out", "  out[0] = unheard_of(1.0f);")
    assert "kernel.cu:3:" in str(error.value)
    assert len(str(error.value)) < 2000
    double_precision = ", ".join(["tl::DataType::kFloat64"] * 3)
    body = f"  tl::mma_sync<{double_precision}, 8, 8, 4, false, true>(out, 0, 0);"
    with pytest.raises(EmulationError, match=r"mma.sync for bf16, fp16 and tf32"):
        cuda("float* out", body)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"grid": 0}, "grid must be between"),
        ({"block": 1056}, "block must be between"),
        ({"shared": 200_000}, "dynamic shared memory must be at most 166912 bytes on sm_80"),
    ],
)
def test_launches_that_no_gpu_accepts(limits, message):
    with pytest.raises(EmulationError, match=message):
        cuda("float* out", "  out[threadIdx.x] = 0.0f;", **limits)(out=poisoned(32))


def test_libraries_are_kept_by_what_went_into_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_TILE_EMULATOR_CACHE", str(tmp_path))
    emulator_build._runtime.cache_clear()
    runs = []
    original = subprocess.run
    monkeypatch.setattr(
        emulator_build.subprocess, "run", lambda *a, **k: runs.append(a[0]) or original(*a, **k)
    )
    body = "  out[threadIdx.x] = 2.0f;"
    cuda("float* out", body)
    built = len(runs)
    assert built > 0
    cuda("float* out", body)
    assert len(runs) == built
    cuda("float* out", body, instrument=False)
    assert len(runs) > built
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".o", ".so", ".so"]
    emulator_build._runtime.cache_clear()


def test_an_argument_that_is_not_given_is_named():
    function = DeviceFunction("k", (("out", "handle"),), (1, 1, 1), (32, 1, 1), 0, False)
    source = 'extern "C" __global__ void k(float* out);\n'
    source += 'extern "C" __global__ void __launch_bounds__(32) k(float* out) {\n}\n'
    with pytest.raises(EmulationError, match="has no handle out"):
        emulate_source(Lowered(source, (function,)))(x=poisoned(1))
