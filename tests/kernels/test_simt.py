"""The emulator's instructions, each against what the PTX manual says it does."""

import pytest
import torch

from cuda_source import cuda
from emulator import available, poisoned

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))
LANES = torch.arange(32)
TYPES = {torch.bfloat16: "bfloat16_t", torch.float16: "half_t"}


@pytest.mark.parametrize(
    ("call", "source"),
    [
        ("__shfl_xor_sync(~0u, v, 5)", LANES ^ 5),
        ("__shfl_xor_sync(~0u, v, 4, 8)", LANES ^ 4),
        ("__shfl_down_sync(~0u, v, 3)", torch.where(LANES + 3 < 32, LANES + 3, LANES)),
        ("__shfl_down_sync(~0u, v, 3, 8)", torch.where(LANES % 8 + 3 < 8, LANES + 3, LANES)),
        ("__shfl_up_sync(~0u, v, 3, 8)", torch.where(LANES % 8 >= 3, LANES - 3, LANES)),
        ("__shfl_sync(~0u, v, 9, 8)", LANES // 8 * 8 + 1),
        ("__shfl_sync(0xffu << (threadIdx.x & 24), v, threadIdx.x & 24)", LANES // 8 * 8),
        ("tl::shfl_sync(~0u, v, 31 - threadIdx.x)", 31 - LANES),
    ],
)
def test_shuffles(call, source):
    out = poisoned(32)
    cuda("float* out", f"  float v = threadIdx.x;\n  out[threadIdx.x] = {call};")(out=out)
    assert torch.equal(out, source.float())


def test_halves_of_a_warp_shuffle_apart():
    body = """
  float v = threadIdx.x;
  if (threadIdx.x < 16)
    for (int i = 0; i < 3; ++i) v += __shfl_xor_sync(0xffffu, v, 1);
  else
    v = __shfl_xor_sync(0xffff0000u, v, 2);
  out[threadIdx.x] = v + __popc(__ballot_sync(~0u, threadIdx.x < 5));"""
    out = poisoned(32)
    cuda("float* out", body)(out=out)
    low = 4 * (LANES + (LANES ^ 1))
    assert torch.equal(out, torch.where(LANES < 16, low, LANES ^ 2).float() + 5)


def test_a_partial_warp_shuffles_among_the_lanes_it_has():
    out = poisoned(40)
    cuda("float* out", "  out[threadIdx.x] = tl::warp_reduce_sum(1.0f);", block=40)(out=out)
    assert torch.equal(out[:32], torch.full((32,), 32.0))
    assert out[32:].isnan().all()  # lanes 8 to 31 do not exist


@pytest.mark.parametrize("threads", [32, 64, 128, 256])
@pytest.mark.parametrize("scale", [1, 4, 32])
@pytest.mark.parametrize("barrier", ["tl::SyncThreadsBarrier", "tl::NamedBarrier<256>"])
def test_all_reduce(threads, scale, barrier):
    reduce = f"tl::AllReduce<tl::SumOp, {threads}, {scale}, 0, {barrier}>"
    body = f"  out[threadIdx.x] = {reduce}::run(x[threadIdx.x], (float*)pool);"
    x, out = torch.arange(256.0), poisoned(256)
    cuda("float* x, float* out", body, block=256, shared=1024)(x=x, out=out)
    groups = x.view(-1, threads // scale, scale)
    assert torch.equal(out, groups.sum(1, keepdim=True).expand_as(groups).reshape(-1))


def test_all_reduce_of_a_batch_with_an_offset_and_of_packed_pairs():
    body = """
  if (threadIdx.x >= 32) {
    float v[2] = {x[threadIdx.x], -x[threadIdx.x]};
    tl::AllReduce<tl::MaxOp, 64, 1, 32, tl::NamedBarrier<64>, 2, 64>::run_batch(v, (float*)pool);
    out[threadIdx.x] = v[0] - v[1];
  } else {
    float2 pair = tl::AllReduce<tl::SumOp_f32x2, 32, 1>::run(make_float2(1.0f, x[threadIdx.x]));
    out[threadIdx.x] = pair.x + pair.y;
  }"""
    x, out = torch.randn(96), poisoned(96)
    cuda("float* x, float* out", body, block=96, shared=512)(x=x, out=out)
    assert (out[:32] - 32 - x[:32].sum()).abs().max() < 1e-4
    assert torch.equal(out[32:], (x[32:].max() + x[32:].min()).expand(64))


MULTIPLY = """
  {kind}* A = ({kind}*)pool;  // [16, {k}]
  {kind}* B = A + 16 * {k};   // [{k}, 8]
  for (int i = threadIdx.x; i < 16 * {k}; i += 32) A[i] = a[i];
  for (int i = threadIdx.x; i < 8 * {k}; i += 32) B[i] = b[i];
  __syncthreads();
  {kind} fa[8], fb[4];
  float c[4] = {{1.0f, 1.0f, 1.0f, 1.0f}};
  tl::ptx_ldmatrix_x4(A + (threadIdx.x % 16) * {k} + (threadIdx.x / 16) * 8, fa);
  tl::ptx_ldmatrix_x2_trans(B + (threadIdx.x % 16) * 8, fb);
  tl::mma_sync<tl::DataType::{name}, tl::DataType::{name}, tl::DataType::kFloat32, 16, 8, {k},
               false, true>(c, (const unsigned*)fa, (const unsigned*)fb);
  for (int i = 0; i < 4; ++i)
    out[(threadIdx.x / 4 + i / 2 * 8) * 8 + threadIdx.x % 4 * 2 + i % 2] = c[i];"""


@pytest.mark.parametrize("dtype", TYPES)
def test_a_tile_through_ldmatrix_and_mma(dtype):
    a, b, out = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), poisoned(16, 8)
    kind = TYPES[dtype]
    name = {"bfloat16_t": "kBFloat16", "half_t": "kFloat16"}[kind]
    body = MULTIPLY.format(kind=kind, name=name, k=16)
    cuda(f"{kind}* a, {kind}* b, float* out", body, shared=1024)(a=a, b=b, out=out)
    assert (out - (a.double() @ b.double() + 1)).abs().max() < 2e-6


def test_a_tf32_tile_drops_the_low_bits():
    body = """
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float fa[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  float fb[2] = {b[t * 8 + g], b[(t + 4) * 8 + g]}, c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  tl::mma_sync<tl::DataType::kTensorFloat32, tl::DataType::kTensorFloat32, tl::DataType::kFloat32,
               16, 8, 8, false, true>(c, (const unsigned*)fa, (const unsigned*)fb);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];"""
    a, b, out = torch.randn(16, 8), torch.randn(8, 8), poisoned(16, 8)
    cuda("float* a, float* b, float* out", body)(a=a, b=b, out=out)
    truncated = [(v.view(torch.int32) & -0x2000).view(torch.float32).double() for v in (a, b)]
    assert (out - truncated[0] @ truncated[1]).abs().max() < 1e-6
    assert (out - a.double() @ b.double()).abs().max() > 1e-5


@pytest.mark.parametrize("trans", ["", "_trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_undoes_ldmatrix(count, trans):
    registers = ", ".join(f"r[{i}]" for i in range(count))
    body = f"""
  ushort* from = (ushort*)pool;
  ushort* to = from + {64 * count};
  for (int i = threadIdx.x; i < {64 * count}; i += 32) from[i] = x[i];
  __syncthreads();
  int r[{count}];
  tl::ptx_ldmatrix_x{count}{trans}(from + threadIdx.x % {8 * count} * 8, r);
  tl::ptx_stmatrix_m8n8_x{count}{trans}(to + threadIdx.x % {8 * count} * 8, {registers});
  __syncthreads();
  for (int i = threadIdx.x; i < {64 * count}; i += 32) out[i] = to[i];"""
    x = torch.randint(-1000, 1000, (64 * count,), dtype=torch.int16)
    out = poisoned(64 * count, dtype=torch.int16)
    cuda("ushort* x, ushort* out", body, shared=256 * count)(x=x, out=out)
    assert torch.equal(out, x)


def test_conversions_round_as_torch_does():
    x = torch.cat([torch.randn(4096), torch.randn(4096) * 1e-7, torch.randn(4096) * 1e5])
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65504.0, 65520.0])])
    bf, half = poisoned(len(x), dtype=torch.bfloat16), poisoned(len(x), dtype=torch.float16)
    body = """
  for (int i = threadIdx.x; i < count; i += 32) {
    bf[i] = (bfloat16_t)x[i];
    half[i] = half_t(x[i]);
  }"""
    kernel = cuda("float* x, bfloat16_t* bf, half_t* half, int count", body)
    kernel(x=x, bf=bf, half=half, count=len(x))
    assert torch.equal(bf, x.bfloat16())
    assert torch.equal(half, x.half())


@pytest.mark.parametrize("dtype", TYPES)
def test_narrow_arithmetic_rounds_after_each_operation(dtype):
    kind = TYPES[dtype]
    body = """
  const int i = threadIdx.x;
  out[i] = x[i] * y[i] + x[i];
  out[i + 32] = max(x[i], -y[i]);"""
    x, y, out = torch.randn(32).to(dtype), torch.randn(32).to(dtype), poisoned(64, dtype=dtype)
    cuda(f"{kind}* x, {kind}* y, {kind}* out", body)(x=x, y=y, out=out)
    assert torch.equal(out, torch.cat([x * y + x, torch.maximum(x, -y)]))


def test_packed_arithmetic():
    body = """
  float2 a = *(float2*)(x + 2 * threadIdx.x), b = make_float2(2.0f, -3.0f);
  *(float2*)(out + 2 * threadIdx.x) = tl::fma2(a, b, tl::sub2(tl::add2(a, b), tl::mul2(a, a)));
  uint1 p{__pack_nv_bfloat162(bfloat16_t(a.x), bfloat16_t(a.y))};
  *(uint1*)(packed + 2 * threadIdx.x) = tl::to_uint1(
      tl::max2(tl::from_uint1<__nv_bfloat162>(p), tl::abs2(tl::from_uint1<__nv_bfloat162>(p))));"""
    x, out, packed = torch.randn(64), poisoned(64), poisoned(64, dtype=torch.bfloat16)
    cuda("float* x, float* out, bfloat16_t* packed", body)(x=x, out=out, packed=packed)
    b = torch.tensor([2.0, -3.0]).repeat(32)
    assert (out - (x * b + (x + b - x * x))).abs().max() < 1e-5
    assert torch.equal(packed, x.bfloat16().abs())


def test_32_byte_vectors_and_integer_functions():
    body = """
  *(ulonglong4*)(out + 8 * threadIdx.x) = tl::load_global_256((ulonglong4*)(x + 8 * threadIdx.x));
  if (threadIdx.x == 0) out[0] = __popc(255) + __clz(1) + max(1, (int64_t)2) + min(3u, 4u);"""
    x, out = torch.randn(256), poisoned(256)
    cuda("float* x, float* out", body)(x=x, out=out)
    assert torch.equal(out[1:], x[1:])
    assert out[0] == 8 + 31 + 2 + 3


def test_fast_division_leaves_the_range_as_on_the_gpu():
    body, out = "  out[threadIdx.x] = __fdividef(1.0f, exp2f(120.0f + threadIdx.x));", poisoned(32)
    cuda("float* out", body)(out=out)
    assert torch.equal(out == 0, LANES + 120 > 126)


def test_sigmoid_tanh_and_their_kin():
    body = """
  const float v = x[threadIdx.x];
  out[threadIdx.x] = 1.0f / (1.0f + __expf(-v)) + tanhf(v) + rsqrtf(v * v + 1.0f) + exp2f(v)
                   + __frcp_rn(2.0f + v * v) + __logf(1.0f + v * v);"""
    x, out = torch.randn(32), poisoned(32)
    cuda("float* x, float* out", body)(x=x, out=out)
    v = x.double()
    square = v * v
    truth = v.sigmoid() + v.tanh() + (square + 1).rsqrt() + v.exp2() + 1 / (2 + square)
    truth = truth + (1 + square).log()
    assert ((out - truth) / truth).abs().max() < 5e-7


def test_cp_async_pipeline_and_zero_fill():
    body = """
  float* slots = (float*)pool;  // [2, 128]
  for (int s = 0; s < 2; ++s) {
    const int at = s * 128 + threadIdx.x * 4;
    tl::cp_async_gs_conditional<16>(slots + at, x + at, threadIdx.x < 20);
    tl::cp_async_commit();
  }
  for (int s = 0; s < 2; ++s) {
    if (s == 0) tl::cp_async_wait<1>(); else tl::cp_async_wait<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < 128; i += 32) out[s * 128 + i] = slots[s * 128 + i];
  }"""
    x, out = torch.randn(2, 128), poisoned(2, 128)
    cuda("float* x, float* out", body, shared=1024)(x=x, out=out)
    x[:, 80:] = 0
    assert torch.equal(out, x)


def test_named_barriers_order_their_own_threads():
    body = """
  float* slots = (float*)pool;
  const int half = threadIdx.x / 64, i = threadIdx.x % 64;
  for (int round = 0; round <= 2 * half; ++round) {
    slots[threadIdx.x] = threadIdx.x + round;
    tl::__sync_thread_partial(1 + half, 64);
    out[threadIdx.x] = slots[half * 64 + 63 - i];
    tl::__sync_thread_partial(1 + half, 64);
  }"""
    out = poisoned(128)
    cuda("float* out", body, block=128, shared=512)(out=out)
    mirror = torch.arange(128).view(2, 64).flip(1) + torch.tensor([[0], [2]])
    assert torch.equal(out, mirror.flatten().float())


def test_one_half_arrives_and_the_other_waits():
    body = """
  float* slots = (float*)pool;
  if (threadIdx.x < 32) {
    slots[threadIdx.x] = 7.0f;
    tl::__named_barrier_arrive(3, 64);
  } else {
    tl::__sync_thread_partial(3, 64);
    out[threadIdx.x - 32] = slots[63 - threadIdx.x];
  }"""
    out = poisoned(32)
    cuda("float* out", body, block=64, shared=128)(out=out)
    assert torch.equal(out, torch.full((32,), 7.0))


def test_warps_that_read_between_different_barriers_and_do_not_wait():
    """One writes, three read after barriers of their own, and the next round writes again."""
    body = """
  float* slots = (float*)pool;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int round = 0; round < 3; ++round) {
    if (warp == 0) {
      slots[lane] = lane + 100 * round;
      tl::__named_barrier_arrive(1, 128);
      tl::__sync_thread_partial(2, 128);
    } else {
      tl::__sync_thread_partial(1, 128);
      for (int other = 1; other < warp; ++other) tl::__named_barrier_arrive(3 * warp + other, 32);
      out[(round * 3 + warp - 1) * 32 + lane] = slots[31 - lane];
      tl::__named_barrier_arrive(2, 128);
    }
  }"""
    out = poisoned(3, 3, 32)
    cuda("float* out", body, block=128, shared=128)(out=out)
    rounds = 100 * torch.arange(3.0).view(3, 1, 1)
    assert torch.equal(out, (rounds + torch.arange(31.0, -1, -1)).expand(3, 3, 32))


def test_a_grid_barrier_and_a_polled_flag():
    body = """
  if (threadIdx.x == 0) part[blockIdx.x] = blockIdx.x + 1.0f;
  cooperative_groups::this_grid().sync();
  float sum = 0.0f;
  for (int b = 0; b < gridDim.x; ++b) sum += part[b];
  if (blockIdx.x == 0 && threadIdx.x == 0) AtomicStore(flag, 1, 3);
  while (AtomicLoad(flag, 2) != 1) __nanosleep(10);
  out[blockIdx.x * 32 + threadIdx.x] = sum;
  AtomicAdd(flag + 1, 1);"""
    part, out, flag = poisoned(5), poisoned(160), torch.zeros(2, dtype=torch.int32)
    run = cuda("float* part, float* out, int* flag", body, grid=5, cooperative=True)
    run(part=part, out=out, flag=flag)
    assert torch.equal(out, torch.full((160,), 15.0))
    assert flag.tolist() == [1, 160]


def test_static_shared_arrays_keep_apart():
    body = """
  __shared__ __align__(16) float left[64];
  __shared__ int right[64];
  left[threadIdx.x] = threadIdx.x;
  right[threadIdx.x] = -int(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = left[63 - threadIdx.x] + 2 * right[63 - threadIdx.x];"""
    out = poisoned(192)
    cuda("float* out", body, block=64, grid=3)(out=out)
    assert torch.equal(out.view(3, 64), (torch.arange(64.0) - 63).expand(3, 64))


def test_threads_may_store_the_same_value_to_one_place():
    body = """
  float* slot = (float*)pool;
  *slot = 3.0f;
  __syncthreads();
  out[threadIdx.x] = *slot;"""
    out = poisoned(64)
    cuda("float* out", body, block=64, shared=16)(out=out)
    assert torch.equal(out, torch.full((64,), 3.0))


def test_swizzled_blocks_cover_the_grid_once():
    body = """
  const dim3 blockIdx = tl::rasterization2DColumn<3>();
  if (threadIdx.x == 0) AtomicAdd(out + blockIdx.x, 1.0f);"""
    out = torch.zeros(7)
    cuda("float* out", body, grid=7)(out=out)
    assert torch.equal(out, torch.ones(7))
