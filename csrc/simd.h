// Vertical SIMD in GCC/Clang vector extensions: one kernel source, compiled once per instruction set.
//
// A file `<op>_simd.cpp` is compiled as several objects, each with its own ATST_ISA (a namespace name) and -march, and
// everything here is in an unnamed namespace or a template on such a type, so that the linker can never pick an AVX-512
// copy of a helper for the portable path. For the same reason these files use no header of the standard library that
// defines inline functions with external linkage; tests/test_build.py reads the objects' symbol tables to hold this.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef ATST_ISA
#  error "ATST_ISA is set by setup.py for each object compiled from a *_simd.cpp file"
#endif

namespace atst::ATST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef float vf_unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

#define ATST_INLINE inline __attribute__((always_inline))

ATST_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
ATST_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
// The first n lanes (at most all); of a partial load the others are 0.
ATST_INLINE vf load(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float v[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return load(v);
}
ATST_INLINE void store(float* p, vf x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  float v[kLanes];
  store(v, x);
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
ATST_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 is x, which x + 0 is not for -0: this costs nothing
ATST_INLINE vi splat_i(int32_t x) { return vi{} + x; }
ATST_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
ATST_INLINE vf bits_as_float(vi v) { return reinterpret_cast<vf>(v); }
ATST_INLINE vi float_as_bits(vf v) { return reinterpret_cast<vi>(v); }

// a * b + c, rounded once where the instruction set can. Written out where two contractions would be possible (of
// a * b + c * d), so that every place that computes the same thing gets the same bits.
ATST_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);
#elif defined(__FMA__)
  return __builtin_ia32_vfmaddps256(a, b, c);
#else
  return a * b + c;
#endif
}

ATST_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
  return __builtin_ia32_sqrtps512_mask(x, x, -1, 4);
#elif defined(__AVX2__)
  return __builtin_ia32_sqrtps256(x);
#elif defined(__SSE2__)
  return __builtin_ia32_sqrtps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// As torch.maximum: a NaN in either operand is the result.
ATST_INLINE vf max_nan(vf a, vf b) { return (a > b) | (a != a) ? a : b; }

// Nearest integer, ties to even, for |x| < 2^22.
ATST_INLINE vf round_small(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  return (x + magic) - magic;
}

// e^x within 2 ulp; +inf above 88.73, 0 below -87.34 (no subnormal results), NaN stays NaN.
ATST_INLINE vf exp(vf x) {
  const vf lo = splat(-87.33654f), hi = splat(88.72283f);
  vf t = x < lo ? lo : x;
  t = t > hi ? hi : t;
  const vf n = round_small(t * 1.44269504f);
  // ln 2 in two parts, the first with trailing zeros, so that n * part is exact
  const vf r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n as two factors: n reaches 128, which has no exponent of its own
  const vi k = __builtin_convertvector(n, vi);
  const vi half = k >> 1;
  p = p * bits_as_float((half + 127) << 23) * bits_as_float((k - half + 127) << 23);
  p = x < lo ? vf{} : p;
  p = x > hi ? splat(__builtin_inff()) : p;
  return x != x ? x : p;
}

// 2^x within 2 ulp for x <= 0; 0 below -126 (no subnormal results), NaN stays NaN. Half the work of exp.
ATST_INLINE vf exp2_of_negative(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: the low bits of the sum are the nearest integer
  const vf clamped = x < -126.0f ? splat(-126.0f) : x;
  const vf shifted = clamped + magic;
  const vf r = clamped - (shifted - magic);
  vf p = splat(1.534581243e-04f);
  p = p * r + 1.339993090e-03f;
  p = p * r + 9.618489072e-03f;
  p = p * r + 5.550328642e-02f;
  p = p * r + 2.402264625e-01f;
  p = p * r + 6.931471825e-01f;
  p = p * r + 1.0f;
  // the power of two by adding to the exponent; nothing is added to that of a NaN
  p = bits_as_float(float_as_bits(p) + (float_as_bits(shifted) << 23));
  return x < -126.0f ? vf{} : p;
}

// ln x within 2 ulp for normal x > 0; -inf at 0 and for subnormals, NaN below 0, +inf and NaN stay.
ATST_INLINE vf log(vf x) {
  const vi bits = float_as_bits(x);
  // mantissa in [sqrt(1/2), sqrt(2)), so that the polynomial's argument is small on both sides of 1
  vi e = ((bits - 0x3f3504f3) >> 23);
  const vf m = bits_as_float(bits - (e << 23));
  const vf f = m - 1.0f;
  const vf n = to_float(e);
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf z = f * f;
  vf y = f * z * p;
  y = y + n * -2.12194440e-4f;
  y = y - 0.5f * z;
  y = (f + y) + n * 0.693359375f;
  const float inf = __builtin_inff();
  y = x < 1.17549435e-38f ? splat(-inf) : y;
  y = x < 0.0f ? splat(__builtin_nanf("")) : y;
  return (x != x) | (x == inf) ? x : y;
}

// Sum and maximum of n values as a tree: short chains of operations, the same for every instruction set of as many
// lanes.
template <int n>
ATST_INLINE float tree_sum(const float* p) {
  if constexpr (n == 1)
    return p[0];
  else
    return tree_sum<n / 2>(p) + tree_sum<n / 2>(p + n / 2);
}

template <int n>
ATST_INLINE float tree_max(const float* p) {
  if constexpr (n == 1) {
    return p[0];
  } else {
    const float a = tree_max<n / 2>(p), b = tree_max<n / 2>(p + n / 2);
    return a > b ? a : b;
  }
}

ATST_INLINE float sum_of_lanes(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  return tree_sum<kLanes>(lanes);
}

// Of a vector without NaN.
ATST_INLINE float max_of_lanes(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  return tree_max<kLanes>(lanes);
}

}  // namespace
}  // namespace atst::ATST_ISA
