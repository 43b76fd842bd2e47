// Thread indices, barriers, votes and shuffles under their CUDA names.
#pragma once

#include "runtime.h"
#include "vectors.h"

// Kernels get `threadIdx` and its like as local constants; these serve other device functions.
#define SIMT_THREAD_CONSTANTS                                                               \
  [[maybe_unused]] const dim3 threadIdx = simt::thread_index(),                             \
                              blockIdx = simt::block_index(), blockDim = simt::block_size(), \
                              gridDim = simt::grid_size();

constexpr int warpSize = 32;

SIMT_INLINE void __syncthreads() { simt::block_barrier(); }
SIMT_INLINE void __syncwarp(unsigned mask = ~0u) { simt::warp_barrier(mask); }
SIMT_INLINE void __threadfence() {}
SIMT_INLINE void __threadfence_block() {}
SIMT_INLINE void __nanosleep(unsigned) { simt::yield(); }
// Programmatic dependent launch: kernels run one after the other here.
SIMT_INLINE void cudaGridDependencySynchronize() {}
SIMT_INLINE void cudaTriggerProgrammaticLaunchCompletion() {}

SIMT_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::ballot(mask, predicate);
}
SIMT_INLINE int __any_sync(unsigned mask, int predicate) {
  return simt::ballot(mask, predicate) != 0;
}
SIMT_INLINE int __all_sync(unsigned mask, int predicate) {
  return simt::ballot(mask, !predicate) == 0;
}

// `width` cuts the warp into segments; a lane whose source is outside of its segment keeps its own
// value. __shfl_xor_sync may read earlier segments, as on the GPU.
template <typename T>
SIMT_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = simt::linear_thread() % 32;
  simt::shuffle(mask, &value, sizeof(T), (lane & ~(width - 1)) | (source & (width - 1)));
  return value;
}
template <typename T>
SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = simt::linear_thread() % 32, source = lane ^ distance;
  simt::shuffle(mask, &value, sizeof(T), source <= (lane | (width - 1)) ? source : lane);
  return value;
}
template <typename T>
SIMT_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = simt::linear_thread() % 32, source = lane + int(distance);
  simt::shuffle(mask, &value, sizeof(T), source <= (lane | (width - 1)) ? source : lane);
  return value;
}
template <typename T>
SIMT_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = simt::linear_thread() % 32, source = lane - int(distance);
  simt::shuffle(mask, &value, sizeof(T), source >= (lane & ~(width - 1)) ? source : lane);
  return value;
}

namespace cooperative_groups {

struct grid_group {
  SIMT_INLINE void sync() const { simt::grid_barrier(); }
};
SIMT_INLINE grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

SIMT_INLINE void device_assert(bool condition) {
  if (!condition) simt::reject("device_assert failed");
}
SIMT_INLINE void device_assert_with_msg(bool condition, const char* message) {
  if (!condition) simt::reject(message);
}

namespace tl {

template <typename T>
SIMT_INLINE T shfl_sync(unsigned mask, T value, int source) {
  return __shfl_sync(mask, value, source);
}
template <typename T>
SIMT_INLINE T shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_xor_sync(mask, value, distance);
}
template <typename T>
SIMT_INLINE T shfl_down_sync(unsigned mask, T value, int distance) {
  return __shfl_down_sync(mask, value, distance);
}
template <typename T>
SIMT_INLINE T shfl_up_sync(unsigned mask, T value, int distance) {
  return __shfl_up_sync(mask, value, distance);
}
SIMT_INLINE int get_lane_idx(int warp = 32) { return simt::linear_thread() % warp; }
SIMT_INLINE int get_warp_idx(int warp = 32) { return simt::linear_thread() / warp; }
SIMT_INLINE int get_warp_idx_sync(int warp = 32) { return simt::linear_thread() / warp; }
SIMT_INLINE int get_warp_group_idx(int warp = 32, int warps = 4) {
  return simt::linear_thread() / (warp * warps);
}
SIMT_INLINE void __sync_thread_partial(int barrier = 0, int threads = 0) {
  simt::named_barrier(barrier, threads);
}
SIMT_INLINE void __named_barrier_arrive(int barrier, int threads) {
  simt::named_arrive(barrier, threads);
}

// Blocks in panels of `width` rows or columns, alternating in direction (T.use_swizzle).
SIMT_INLINE dim3 swizzled_block(unsigned width, bool rows) {
  const dim3 index = simt::block_index(), grid = simt::grid_size();
  const unsigned along = rows ? grid.x : grid.y, across = rows ? grid.y : grid.x;
  const unsigned linear = index.x + index.y * grid.x, panel = linear / (width * along);
  const unsigned inside = linear % (width * along);
  const unsigned height = (panel + 1) * width <= across ? width : across - panel * width;
  const unsigned step = inside / height;
  const unsigned far = panel % 2 ? along - 1 - step : step;
  const unsigned near = panel * width + inside % height;
  return rows ? dim3{far, near, index.z} : dim3{near, far, index.z};
}
template <int width>
SIMT_INLINE dim3 rasterization2DRow() {
  return swizzled_block(width, true);
}
template <int width>
SIMT_INLINE dim3 rasterization2DColumn() {
  return swizzled_block(width, false);
}

}  // namespace tl
