// CUDA's mathematical functions. Approximate ones are computed exactly: the emulator is no judge of
// the last bit, except where an approximation leaves the range (__fdividef).
#pragma once

#include "floats.h"
#include "runtime.h"

SIMT_INLINE float max(float a, float b) { return fmaxf(a, b); }
SIMT_INLINE float min(float a, float b) { return fminf(a, b); }
SIMT_INLINE double max(double a, double b) { return fmax(a, b); }
SIMT_INLINE double min(double a, double b) { return fmin(a, b); }
SIMT_INLINE bfloat16_t max(bfloat16_t a, bfloat16_t b) { return bfloat16_t(fmaxf(a, b)); }
SIMT_INLINE bfloat16_t min(bfloat16_t a, bfloat16_t b) { return bfloat16_t(fminf(a, b)); }
SIMT_INLINE half_t max(half_t a, half_t b) { return half_t(fmaxf(a, b)); }
SIMT_INLINE half_t min(half_t a, half_t b) { return half_t(fminf(a, b)); }
// Integers, also of two widths, which CUDA's overloads accept.
template <typename A, typename B,
          typename = std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>>>
SIMT_INLINE std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) > T(b) ? T(a) : T(b);
}
template <typename A, typename B,
          typename = std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>>>
SIMT_INLINE std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(a) : T(b);
}

SIMT_INLINE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
SIMT_INLINE double rsqrt(double x) { return 1.0 / sqrt(x); }
SIMT_INLINE float __frcp_rn(float x) { return 1.0f / x; }
SIMT_INLINE float __fsqrt_rn(float x) { return sqrtf(x); }
SIMT_INLINE float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fsub_rn(float a, float b) { return a - b; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_INLINE float __fmaf_ieee_rn(float a, float b, float c) { return simt::multiply_add(a, b, c); }
SIMT_INLINE float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
// A divisor above 2^126 gives 0, and NaN if the dividend is infinite.
SIMT_INLINE float __fdividef(float a, float b) {
  const float magnitude = fabsf(b);
  if (magnitude > 0x1p126f && !__builtin_isinf(magnitude)) return a * 0.0f;
  return a / b;
}

// The C library declares some of these names for itself.
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.0f, x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __tanhf(x) tanhf(x)

// 16-bit functions: computed in fp32, rounded once.
#define SIMT_HALF_FUNCTION(name, function)                                            \
  SIMT_INLINE bfloat16_t name(bfloat16_t x) { return bfloat16_t(function(float(x))); } \
  SIMT_INLINE half_t name(half_t x) { return half_t(function(float(x))); }
SIMT_HALF_FUNCTION(hexp, expf)
SIMT_HALF_FUNCTION(hexp2, exp2f)
SIMT_HALF_FUNCTION(hlog, logf)
SIMT_HALF_FUNCTION(hlog2, log2f)
SIMT_HALF_FUNCTION(hsqrt, sqrtf)
SIMT_HALF_FUNCTION(hrsqrt, rsqrtf)
SIMT_HALF_FUNCTION(hrcp, __frcp_rn)
SIMT_HALF_FUNCTION(htanh, tanhf)
SIMT_HALF_FUNCTION(hsin, sinf)
SIMT_HALF_FUNCTION(hcos, cosf)
SIMT_HALF_FUNCTION(hfloor, floorf)
SIMT_HALF_FUNCTION(hceil, ceilf)
SIMT_HALF_FUNCTION(htrunc, truncf)
SIMT_HALF_FUNCTION(hrint, rintf)
SIMT_HALF_FUNCTION(__habs, fabsf)
#undef SIMT_HALF_FUNCTION
template <typename T>
SIMT_INLINE T __hadd_rn(T x, T y) {
  return x + y;
}
template <typename T>
SIMT_INLINE T __hsub_rn(T x, T y) {
  return x - y;
}
template <typename T>
SIMT_INLINE T __hmul_rn(T x, T y) {
  return x * y;
}
template <typename T>
SIMT_INLINE T __hfma(T x, T y, T z) {
  return T(float(double(x) * double(y) + double(z)));
}
template <typename T>
SIMT_INLINE T __hmax(T x, T y) {
  return max(x, y);
}
template <typename T>
SIMT_INLINE T __hmin(T x, T y) {
  return min(x, y);
}

SIMT_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
SIMT_INLINE int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
SIMT_INLINE int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
SIMT_INLINE T __ldg(const T* address) {
  return *address;
}

namespace tl {

template <typename T>
SIMT_INLINE T fast_max(T a, T b) {
  return ::max(a, b);
}
template <typename T>
SIMT_INLINE T fast_min(T a, T b) {
  return ::min(a, b);
}
SIMT_INLINE float fast_rcp(float x) { return 1.0f / x; }
// Clamped, but a NaN among the three wins.
template <typename T>
SIMT_INLINE T clamp(T x, T low, T high) {
  const float value(x), lower(low), upper(high);
  if (value != value) return x;
  if (lower != lower) return low;
  if (upper != upper) return high;
  return T(fminf(fmaxf(value, lower), upper));
}
template <int exponent = 1, typename T>
SIMT_INLINE T pow_of_int(T x) {
  T result = x;
  for (int i = 1; i < exponent; ++i) result *= x;
  return result;
}
template <typename T>
SIMT_INLINE bool Any(T* values, int count) {
  for (int i = 0; i < count; ++i)
    if (values[i]) return true;
  return false;
}
template <typename T>
SIMT_INLINE bool All(T* values, int count) {
  for (int i = 0; i < count; ++i)
    if (!values[i]) return false;
  return true;
}
template <typename T>
SIMT_INLINE T RoundTiesAwayFromZero(T x) {
  return T(roundf(float(x)));
}

}  // namespace tl
