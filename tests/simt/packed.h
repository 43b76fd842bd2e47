// Arithmetic on pairs: tl::add2, sub2, mul2, fma2, max2, min2, abs2 for fp32, bf16 and fp16.
#pragma once

#include "maths.h"

namespace tl {

// Pairs of 16-bit values travel through generated code as a uint1.
template <typename Pair>
SIMT_INLINE Pair from_uint1(uint1 value) {
  return simt::bits_as<Pair>(value);
}
template <typename Pair>
SIMT_INLINE uint1 to_uint1(Pair value) {
  return simt::bits_as<uint1>(value);
}
SIMT_INLINE uint1 pack_half2(half_t x, half_t y) { return uint1{__pack_half2(x, y)}; }

SIMT_INLINE float2 add2(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
SIMT_INLINE float2 sub2(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
SIMT_INLINE float2 mul2(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
SIMT_INLINE float2 fma2(float2 a, float2 b, float2 c) {
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
}
SIMT_INLINE float2 max2(float2 a, float2 b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }
SIMT_INLINE float2 min2(float2 a, float2 b) { return {fminf(a.x, b.x), fminf(a.y, b.y)}; }
SIMT_INLINE float2 abs2(float2 a) { return {fabsf(a.x), fabsf(a.y)}; }

#define SIMT_PAIRS(Pair)                                                                       \
  SIMT_INLINE Pair add2(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }                     \
  SIMT_INLINE Pair sub2(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }                     \
  SIMT_INLINE Pair mul2(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }                     \
  SIMT_INLINE Pair fma2(Pair a, Pair b, Pair c) {                                              \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                     \
  }                                                                                            \
  SIMT_INLINE Pair max2(Pair a, Pair b) { return {::max(a.x, b.x), ::max(a.y, b.y)}; }         \
  SIMT_INLINE Pair min2(Pair a, Pair b) { return {::min(a.x, b.x), ::min(a.y, b.y)}; }         \
  SIMT_INLINE Pair abs2(Pair a) { return {__habs(a.x), __habs(a.y)}; }
SIMT_PAIRS(__nv_bfloat162)
SIMT_PAIRS(__half2)
#undef SIMT_PAIRS

}  // namespace tl
