// CUDA's keywords, type names and macros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <math.h>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict
#define __grid_constant__

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_INF __builtin_inf()
#define CUDART_NAN __builtin_nan("")

// Always inlined, so that an error is reported at the kernel's own line.
#define SIMT_INLINE inline __attribute__((always_inline))
// For what memory.cpp is told about explicitly: the compiler adds no hooks.
#define SIMT_RAW __attribute__((noinline, no_sanitize("thread", "alignment")))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
