// Reductions across threads: operators, tl::AllReduce and tl::warp_reduce.
//
// They wait, exchange and combine in the order of the device templates, so that a missing barrier,
// a workspace that is too small or a group of the wrong width fails here as it would there.
#pragma once

#include "packed.h"
#include "threads.h"

namespace tl {

#define SIMT_OPERATOR(name, expression)                      \
  struct name {                                              \
    template <typename T>                                    \
    SIMT_INLINE T operator()(const T& x, const T& y) const { \
      return expression;                                     \
    }                                                        \
  };
SIMT_OPERATOR(SumOp, x + y)
SIMT_OPERATOR(MaxOp, ::max(x, y))
SIMT_OPERATOR(MinOp, ::min(x, y))
SIMT_OPERATOR(MaxOpNan, x != x ? x : y != y ? y : ::max(x, y))
SIMT_OPERATOR(MinOpNan, x != x ? x : y != y ? y : ::min(x, y))
SIMT_OPERATOR(BitAndOp, x & y)
SIMT_OPERATOR(BitOrOp, x | y)
SIMT_OPERATOR(BitXorOp, x ^ y)
SIMT_OPERATOR(SumOp_f32x2, add2(x, y))
SIMT_OPERATOR(MaxOp_f32x2, max2(x, y))
SIMT_OPERATOR(MinOp_f32x2, min2(x, y))
// Pairs of 16-bit values in a uint1.
#define SIMT_PAIR_OPERATORS(suffix, Pair)                                                \
  SIMT_OPERATOR(SumOp_##suffix, to_uint1(add2(from_uint1<Pair>(x), from_uint1<Pair>(y)))) \
  SIMT_OPERATOR(MaxOp_##suffix, to_uint1(max2(from_uint1<Pair>(x), from_uint1<Pair>(y)))) \
  SIMT_OPERATOR(MinOp_##suffix, to_uint1(min2(from_uint1<Pair>(x), from_uint1<Pair>(y))))
SIMT_PAIR_OPERATORS(bf16x2, __nv_bfloat162)
SIMT_PAIR_OPERATORS(fp16x2, __half2)
#undef SIMT_PAIR_OPERATORS
#undef SIMT_OPERATOR

// Who waits between the steps that go through shared memory.
struct SyncThreadsBarrier {
  template <int phase = 0>
  static SIMT_INLINE void sync() {
    simt::block_barrier();
  }
};
template <int threads>
struct NamedBarrier {
  template <int phase = 1>
  static SIMT_INLINE void sync() {
    simt::named_barrier(phase, threads);
  }
};

// Combines the values of `threads / scale` threads whose indices differ in the bits from `scale` up
// to `threads`, and hands every one of them the result. Steps over 32 threads and more go through
// `workspace`, one slot a thread (times `batch` slices of `stride` slots), shorter ones through
// shuffles.
template <class Op, int threads, int scale, int offset = 0, class Barrier = SyncThreadsBarrier,
          int batch = 1, int stride = 0>
struct AllReduce {
  static_assert(scale > 0 && threads % scale == 0, "AllReduce: threads is a multiple of scale");
  static_assert((threads / scale & (threads / scale - 1)) == 0 && (scale & (scale - 1)) == 0,
                "AllReduce: scale and the number of threads that reduce are powers of two");

  template <typename T>
  static SIMT_INLINE T run(T value, T* workspace = nullptr) {
    AllReduce<Op, threads, scale, offset, Barrier, 1, 0>::run_batch(&value, workspace);
    return value;
  }

  template <typename T>
  static SIMT_INLINE void run_batch(T* values, T* workspace = nullptr) {
    if constexpr (threads > scale) {
      constexpr int distance = threads / 2;
      if constexpr (distance >= 32) {
        if (!workspace) simt::reject("AllReduce across warps has no workspace");
        const int slot = int(simt::thread_index().x) - offset;
        Barrier::template sync<1>();
        for (int i = 0; i < batch; ++i) workspace[slot + i * stride] = values[i];
        Barrier::template sync<2>();
        for (int i = 0; i < batch; ++i)
          values[i] = Op()(values[i], workspace[(slot ^ distance) + i * stride]);
      } else {
        for (int i = 0; i < batch; ++i)
          values[i] = Op()(values[i], __shfl_xor_sync(~0u, values[i], distance));
      }
      AllReduce<Op, distance, scale, offset, Barrier, batch, stride>::run_batch(values, workspace);
    }
  }
};

template <typename T, typename Op>
SIMT_INLINE T warp_reduce(T value, Op op) {
  for (int distance = 16; distance; distance /= 2)
    value = op(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}
template <typename T>
SIMT_INLINE T warp_reduce_sum(T value) {
  return warp_reduce(value, SumOp());
}
template <typename T>
SIMT_INLINE T warp_reduce_max(T value) {
  return warp_reduce(value, MaxOp());
}
template <typename T>
SIMT_INLINE T warp_reduce_min(T value) {
  return warp_reduce(value, MinOp());
}
template <typename T>
SIMT_INLINE T warp_reduce_bitand(T value) {
  return warp_reduce(value, BitAndOp());
}
template <typename T>
SIMT_INLINE T warp_reduce_bitor(T value) {
  return warp_reduce(value, BitOrOp());
}

}  // namespace tl
