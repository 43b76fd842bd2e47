// Tensor-core instructions of sm_80 and what feeds them: mma.sync, ldmatrix, stmatrix.
#pragma once

#include "threads.h"

namespace tl {

enum class DataType {
  kInt4,
  kUInt4,
  kInt8,
  kUInt8,
  kInt32,
  kFloat8_e4m3,
  kFloat8_e5m2,
  kFloat16,
  kBFloat16,
  kFloat32,
  kTensorFloat32,
  kFloat64,
};

// Registers of a tile that an array of the kernel must have, where the compiler knows the array.
#define SIMT_WITHIN(pointer, bytes)                                            \
  if (__builtin_dynamic_object_size(pointer, 0) < size_t(bytes))               \
  simt::reject("a tile's registers reach past the end of their array")

// c += a @ b with fp32 accumulators: bf16 and fp16 m16n8k8 and k16, tf32 m16n8k4 and k8.
template <DataType A, DataType B, DataType C, int m, int n, int k, bool, bool, bool = false>
SIMT_INLINE void mma_sync(float* c, const unsigned* a, const unsigned* b) {
  constexpr bool narrow = A == DataType::kBFloat16 || A == DataType::kFloat16;
  constexpr bool known = A == B && C == DataType::kFloat32 && m == 16 && n == 8 &&
                         ((narrow && (k == 8 || k == 16)) ||
                          (A == DataType::kTensorFloat32 && (k == 4 || k == 8)));
  static_assert(known, "the emulator has mma.sync for bf16, fp16 and tf32 with fp32 accumulators");
  constexpr int step = narrow ? 8 : 4;  // elements along k of one register of b
  SIMT_WITHIN(c, 16);
  SIMT_WITHIN(a, k / step * 8);
  SIMT_WITHIN(b, k / step * 4);
  simt::multiply(c, a, b,
                 A == DataType::kBFloat16  ? simt::Element::bfloat16
                 : A == DataType::kFloat16 ? simt::Element::float16
                                           : simt::Element::tfloat32,
                 k);
}

#define SIMT_LDMATRIX(name, count, transpose)                                   \
  SIMT_INLINE void name(const void* row, void* registers) {                     \
    SIMT_WITHIN(registers, 4 * count);                                          \
    simt::load_matrices(row, registers, count, transpose);                      \
  }
SIMT_LDMATRIX(ptx_ldmatrix_x1, 1, false)
SIMT_LDMATRIX(ptx_ldmatrix_x2, 2, false)
SIMT_LDMATRIX(ptx_ldmatrix_x4, 4, false)
SIMT_LDMATRIX(ptx_ldmatrix_x1_trans, 1, true)
SIMT_LDMATRIX(ptx_ldmatrix_x2_trans, 2, true)
SIMT_LDMATRIX(ptx_ldmatrix_x4_trans, 4, true)
#undef SIMT_LDMATRIX

template <bool transpose, typename... Words>
SIMT_INLINE void store_matrices(const void* row, const Words&... words) {
  const unsigned registers[] = {static_cast<unsigned>(words)...};
  simt::store_matrices(const_cast<void*>(row), registers, sizeof...(words), transpose);
}
#define SIMT_STMATRIX(name, transpose)                              \
  template <typename... Words>                                      \
  SIMT_INLINE void name(const void* row, const Words&... words) {   \
    store_matrices<transpose>(row, words...);                       \
  }
SIMT_STMATRIX(ptx_stmatrix_m8n8_x1, false)
SIMT_STMATRIX(ptx_stmatrix_m8n8_x2, false)
SIMT_STMATRIX(ptx_stmatrix_m8n8_x4, false)
SIMT_STMATRIX(ptx_stmatrix_m8n8_x1_trans, true)
SIMT_STMATRIX(ptx_stmatrix_m8n8_x2_trans, true)
SIMT_STMATRIX(ptx_stmatrix_m8n8_x4_trans, true)
#undef SIMT_STMATRIX
#undef SIMT_WITHIN

}  // namespace tl
