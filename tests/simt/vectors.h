// CUDA's vector types with their alignments, and the make_ functions that the code generator emits.
#pragma once

#include "qualifiers.h"

#define SIMT_VECTORS(scalar, name, align2, align4)                        \
  struct name##1 {                                                        \
    scalar x;                                                             \
  };                                                                      \
  struct alignas(align2) name##2 {                                        \
    scalar x, y;                                                          \
  };                                                                      \
  struct name##3 {                                                        \
    scalar x, y, z;                                                       \
  };                                                                      \
  struct alignas(align4) name##4 {                                        \
    scalar x, y, z, w;                                                    \
  };                                                                      \
  SIMT_INLINE name##1 make_##name##1(scalar x) { return {x}; }            \
  SIMT_INLINE name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  SIMT_INLINE name##3 make_##name##3(scalar x, scalar y, scalar z) {      \
    return {x, y, z};                                                     \
  }                                                                       \
  SIMT_INLINE name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { \
    return {x, y, z, w};                                                  \
  }

SIMT_VECTORS(signed char, char, 2, 4)
SIMT_VECTORS(unsigned char, uchar, 2, 4)
SIMT_VECTORS(short, short, 4, 8)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(unsigned int, uint, 8, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 32)
SIMT_VECTORS(long long, longlong, 16, 32)
SIMT_VECTORS(unsigned long long, ulonglong, 16, 32)
#undef SIMT_VECTORS

using int4_t = int4;

// Eight 16-bit values as four words, low half first.
SIMT_INLINE int4 make_int4(short a, short b, short c, short d, short e, short f, short g, short h) {
  const short values[8] = {a, b, c, d, e, f, g, h};
  int4 result;
  memcpy(&result, values, sizeof(result));
  return result;
}

SIMT_INLINE uint4 make_uint4(ushort a, ushort b, ushort c, ushort d, ushort e, ushort f, ushort g,
                             ushort h) {
  const ushort values[8] = {a, b, c, d, e, f, g, h};
  uint4 result;
  memcpy(&result, values, sizeof(result));
  return result;
}

namespace tl {

// One small value repeated over a wider vector.
template <typename Vector, typename Unit>
SIMT_INLINE Vector broadcast(const Unit unit) {
  static_assert(sizeof(Vector) % sizeof(Unit) == 0);
  Vector result;
  for (size_t i = 0; i < sizeof(Vector) / sizeof(Unit); ++i)
    memcpy(reinterpret_cast<char*>(&result) + i * sizeof(Unit), &unit, sizeof(Unit));
  return result;
}

// A vector from one value per lane.
template <typename Vector, typename First, typename... Rest>
SIMT_INLINE Vector make_vec(const First first, const Rest... rest) {
  const First values[] = {first, static_cast<First>(rest)...};
  static_assert(sizeof(Vector) == sizeof(values));
  Vector result;
  memcpy(&result, values, sizeof(result));
  return result;
}

}  // namespace tl
