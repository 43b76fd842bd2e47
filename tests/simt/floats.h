// bf16, fp16 and tf32 values: rounding, arithmetic that rounds after each operation, conversions.
#pragma once

#include "vectors.h"

namespace simt {

template <typename To, typename From>
SIMT_INLINE To bits_as(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

// Nearest bf16, ties to even; NaN stays NaN.
SIMT_INLINE uint16_t round_bfloat16(float value) {
  uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

SIMT_INLINE float widen_bfloat16(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

}  // namespace simt

struct bfloat16_t {
  uint16_t bits;

  bfloat16_t() = default;
  SIMT_INLINE explicit bfloat16_t(float value) : bits(simt::round_bfloat16(value)) {}
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  SIMT_INLINE explicit bfloat16_t(T value) : bfloat16_t(static_cast<float>(value)) {}
  SIMT_INLINE operator float() const { return simt::widen_bfloat16(bits); }
  SIMT_INLINE bfloat16_t to_nv_bfloat16() const { return *this; }
};

struct half_t {
  _Float16 value;

  half_t() = default;
  SIMT_INLINE explicit half_t(float wide) : value(static_cast<_Float16>(wide)) {}
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  SIMT_INLINE explicit half_t(T wide) : half_t(static_cast<float>(wide)) {}
  SIMT_INLINE operator float() const { return static_cast<float>(value); }
  SIMT_INLINE half_t to_half() const { return *this; }
};

// fp32 bits; a value made from a float is rounded half up to 10 mantissa bits, one read from memory
// is not, and the tensor core drops the low 13 bits of either.
struct tfloat32_t {
  uint32_t bits;

  tfloat32_t() = default;
  SIMT_INLINE explicit tfloat32_t(float value) : bits(simt::bits_as<uint32_t>(value)) {
    if (__builtin_isfinite(value)) bits += 0x1000u;
  }
  SIMT_INLINE explicit tfloat32_t(bfloat16_t value) : tfloat32_t(float(value)) {}
  SIMT_INLINE explicit tfloat32_t(half_t value) : tfloat32_t(float(value)) {}
  SIMT_INLINE operator float() const { return simt::bits_as<float>(bits & ~0x1fffu); }
};

#define SIMT_ARITHMETIC(type)                                                              \
  SIMT_INLINE type operator+(type a, type b) { return type(float(a) + float(b)); }         \
  SIMT_INLINE type operator-(type a, type b) { return type(float(a) - float(b)); }         \
  SIMT_INLINE type operator*(type a, type b) { return type(float(a) * float(b)); }         \
  SIMT_INLINE type operator/(type a, type b) { return type(float(a) / float(b)); }         \
  SIMT_INLINE type operator-(type a) { return type(-float(a)); }                           \
  SIMT_INLINE type& operator+=(type& a, type b) { return a = a + b; }                      \
  SIMT_INLINE type& operator-=(type& a, type b) { return a = a - b; }                      \
  SIMT_INLINE type& operator*=(type& a, type b) { return a = a * b; }                      \
  SIMT_INLINE type& operator/=(type& a, type b) { return a = a / b; }
SIMT_ARITHMETIC(bfloat16_t)
SIMT_ARITHMETIC(half_t)
SIMT_ARITHMETIC(tfloat32_t)
#undef SIMT_ARITHMETIC

// CUDA's own types are these, too: nothing here needs to tell them apart.
using __nv_bfloat16 = bfloat16_t;
using half = half_t;
using __half = half_t;
struct alignas(4) __nv_bfloat162 {
  bfloat16_t x, y;
};
struct alignas(4) __half2 {
  half_t x, y;
};
using half2 = __half2;
using nv_bfloat162 = __nv_bfloat162;

namespace cutlass {
using ::bfloat16_t;
using ::half_t;
using ::tfloat32_t;
}  // namespace cutlass
namespace tl {
using ::tfloat32_t;
}  // namespace tl

SIMT_INLINE bfloat16_t __float2bfloat16(float value) { return bfloat16_t(value); }
SIMT_INLINE bfloat16_t __float2bfloat16_rn(float value) { return bfloat16_t(value); }
SIMT_INLINE float __bfloat162float(bfloat16_t value) { return float(value); }
SIMT_INLINE half_t __float2half(float value) { return half_t(value); }
SIMT_INLINE half_t __float2half_rn(float value) { return half_t(value); }
SIMT_INLINE float __half2float(half_t value) { return float(value); }
SIMT_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 value) {
  return {bfloat16_t(value.x), bfloat16_t(value.y)};
}
SIMT_INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {bfloat16_t(x), bfloat16_t(y)};
}
SIMT_INLINE float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {float(value.x), float(value.y)};
}
SIMT_INLINE __half2 __float22half2_rn(float2 value) { return {half_t(value.x), half_t(value.y)}; }
SIMT_INLINE __half2 __floats2half2_rn(float x, float y) { return {half_t(x), half_t(y)}; }
SIMT_INLINE float2 __half22float2(__half2 value) { return {float(value.x), float(value.y)}; }

// Two 16-bit values in a word, the first in the low half.
SIMT_INLINE unsigned __pack_half2(bfloat16_t x, bfloat16_t y) {
  return simt::bits_as<unsigned>(__nv_bfloat162{x, y});
}
SIMT_INLINE unsigned __pack_half2(half_t x, half_t y) {
  return simt::bits_as<unsigned>(__half2{x, y});
}
SIMT_INLINE unsigned __pack_nv_bfloat162(bfloat16_t x, bfloat16_t y) { return __pack_half2(x, y); }

SIMT_INLINE int __float_as_int(float value) { return simt::bits_as<int>(value); }
SIMT_INLINE unsigned __float_as_uint(float value) { return simt::bits_as<unsigned>(value); }
SIMT_INLINE float __int_as_float(int value) { return simt::bits_as<float>(value); }
SIMT_INLINE float __uint_as_float(unsigned value) { return simt::bits_as<float>(value); }
