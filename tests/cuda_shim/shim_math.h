// CUDA's arithmetic functions. The fast ones of the GPU are the C library's here: nearer to the true value.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdlib>

namespace shim {
// Keeps a product and a sum apart that the compiler would otherwise contract (-ffp-contract=fast).
template <class T>
inline T apart(T v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}
SHIM_EXPORT void trap(Site site);
}  // namespace shim

inline void __trap(shim::Site site = {}) { shim::trap(site); }

#define SHIM_ROUNDED(prefix, T, fma_, sqrt_)                                                     \
  inline T __##prefix##mul_rn(T a, T b) { return shim::apart(a * b); }                           \
  inline T __##prefix##add_rn(T a, T b) { return shim::apart(shim::apart(a) + shim::apart(b)); } \
  inline T __##prefix##sub_rn(T a, T b) { return shim::apart(shim::apart(a) - shim::apart(b)); } \
  inline T __##prefix##div_rn(T a, T b) { return a / b; }                                        \
  inline T __##prefix##sqrt_rn(T a) { return sqrt_(a); }                                         \
  inline T __##prefix##rcp_rn(T a) { return T(1) / a; }
SHIM_ROUNDED(f, float, fmaf, sqrtf)
SHIM_ROUNDED(d, double, fma, sqrt)
#undef SHIM_ROUNDED
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float* s, float* c) { sincosf(x, s, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// sin and cos of pi x: exact at multiples of a half
inline double sinpi(double x) {
  const double r = remainder(x, 2.0);  // in [-1, 1]
  if (r == -1.0 || r == 1.0) return copysign(0.0, x);
  return fabs(r) > 0.5 ? sin(copysign(1.0 - fabs(r), r) * M_PI) : sin(r * M_PI);
}
inline double cospi(double x) {
  const double r = fabs(remainder(x, 2.0));
  return r > 0.25 ? sin((0.5 - r) * M_PI) : cos(r * M_PI);
}
inline float sinpif(float x) { return static_cast<float>(sinpi(x)); }
inline float cospif(float x) { return static_cast<float>(cospi(x)); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
inline void sincospi(double x, double* s, double* c) { *s = sinpi(x), *c = cospi(x); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
inline unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
inline long min(long a, long b) { return b < a ? b : a; }
inline long max(long a, long b) { return a < b ? b : a; }
inline unsigned long min(unsigned long a, unsigned long b) { return b < a ? b : a; }
inline unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// A conversion that does not fit saturates on the GPU, and NaN becomes 0.
namespace shim {
template <class T>
inline T to_integer(double x) {
  if (x != x) return 0;
  constexpr double low = static_cast<double>(std::numeric_limits<T>::min());
  constexpr double high = static_cast<double>(std::numeric_limits<T>::max());
  if (x <= low) return std::numeric_limits<T>::min();
  if (x >= high) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}
}  // namespace shim
#define SHIM_TO_INTEGER(to, T)                                                        \
  inline T __float2##to##_rn(float x) { return shim::to_integer<T>(nearbyintf(x)); }  \
  inline T __float2##to##_rz(float x) { return shim::to_integer<T>(truncf(x)); }      \
  inline T __float2##to##_rd(float x) { return shim::to_integer<T>(floorf(x)); }      \
  inline T __float2##to##_ru(float x) { return shim::to_integer<T>(ceilf(x)); }       \
  inline T __double2##to##_rn(double x) { return shim::to_integer<T>(nearbyint(x)); } \
  inline T __double2##to##_rz(double x) { return shim::to_integer<T>(trunc(x)); }     \
  inline T __double2##to##_rd(double x) { return shim::to_integer<T>(floor(x)); }     \
  inline T __double2##to##_ru(double x) { return shim::to_integer<T>(ceil(x)); }      \
  inline float __##to##2float_rn(T x) { return static_cast<float>(x); }
SHIM_TO_INTEGER(int, int)
SHIM_TO_INTEGER(uint, unsigned)
SHIM_TO_INTEGER(ll, long long)
SHIM_TO_INTEGER(ull, unsigned long long)
#undef SHIM_TO_INTEGER
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline double __int2double_rn(int x) { return x; }
inline double __uint2double_rn(unsigned x) { return x; }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long r = 0;
  for (int i = 0; i < 64; ++i) r = r << 1 | (x >> i & 1);
  return r;
}
inline unsigned __brev(unsigned x) { return static_cast<unsigned>(__brevll(x) >> 32); }
// Only the eight bytes of x and y can be chosen; bit 3 of a selector copies the sign of its byte.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 0xf, byte = bytes >> (8 * (s & 7)) & 0xff;
    r |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
