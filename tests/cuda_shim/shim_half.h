// __half and __nv_bfloat16: their bits, their conversions (to nearest even) and plain arithmetic, which is that of
// float rounded once: float has more than twice their digits, so the result is the nearest one.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>

namespace shim {

inline unsigned short bfloat16_bits(float f) {
  const uint32_t x = std::bit_cast<uint32_t>(f);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;  // what the GPU makes of every NaN
  return static_cast<unsigned short>((x + 0x7fff + (x >> 16 & 1)) >> 16);
}
inline float bfloat16_value(unsigned short bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline unsigned short half_bits(float f) {
  const uint32_t x = std::bit_cast<uint32_t>(f), sign = x >> 16 & 0x8000, magnitude = x & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<unsigned short>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the multiples of 2^-24, rounded, in the low bits
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<unsigned short>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<unsigned short>(sign | (rounded >> 13) - (112 << 10));
}
inline float half_value(unsigned short bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return std::bit_cast<float>(sign | (magnitude << 13) + (112u << 23));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(subnormal));
}

}  // namespace shim

struct __half_raw {
  unsigned short x;
};
struct __nv_bfloat16_raw {
  unsigned short x;
};

// Type: the scalar; to/from: the conversions of its bits
#define SHIM_SMALL_FLOAT(Type, to_bits, to_value)                                                          \
  struct alignas(2) Type {                                                                                 \
    unsigned short bits;                                                                                   \
    Type() = default;                                                                                      \
    Type(float f) : bits(shim::to_bits(f)) {}                                                              \
    Type(double d) : bits(shim::to_bits(static_cast<float>(d))) {}                                         \
    template <std::integral I>                                                                             \
    Type(I i) : bits(shim::to_bits(static_cast<float>(i))) {}                                              \
    Type(Type##_raw raw) : bits(raw.x) {}                                                                  \
    operator Type##_raw() const { return {bits}; }                                                         \
    operator float() const { return shim::to_value(bits); }                                                \
  };                                                                                                       \
  struct alignas(4) Type##2_raw { unsigned short x, y; };                                                  \
  struct alignas(4) Type##2 {                                                                              \
    Type x, y;                                                                                             \
    Type##2() = default;                                                                                   \
    Type##2(Type a, Type b) : x(a), y(b) {}                                                                \
    Type##2(Type##2_raw raw) : x(Type##_raw{raw.x}), y(Type##_raw{raw.y}) {}                               \
    operator Type##2_raw() const { return {x.bits, y.bits}; }                                              \
  };                                                                                                       \
  inline Type operator+(Type a, Type b) { return Type(float(a) + float(b)); }                              \
  inline Type operator-(Type a, Type b) { return Type(float(a) - float(b)); }                              \
  inline Type operator*(Type a, Type b) { return Type(float(a) * float(b)); }                              \
  inline Type operator/(Type a, Type b) { return Type(float(a) / float(b)); }                              \
  inline Type operator-(Type a) { return Type(Type##_raw{static_cast<unsigned short>(a.bits ^ 0x8000)}); } \
  inline Type __hadd(Type a, Type b) { return a + b; }                                                     \
  inline Type __hsub(Type a, Type b) { return a - b; }                                                     \
  inline Type __hmul(Type a, Type b) { return a * b; }                                                     \
  inline Type##2 __hadd2(Type##2 a, Type##2 b) { return {a.x + b.x, a.y + b.y}; }                          \
  inline Type##2 __hmul2(Type##2 a, Type##2 b) { return {a.x * b.x, a.y * b.y}; }
SHIM_SMALL_FLOAT(__half, half_bits, half_value)
SHIM_SMALL_FLOAT(__nv_bfloat16, bfloat16_bits, bfloat16_value)
#undef SHIM_SMALL_FLOAT
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __half __float2half_rn(float f) { return __half(f); }
inline __half __float2half(float f) { return __half(f); }
inline float __half2float(__half h) { return float(h); }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 f) { return {__half(f.x), __half(f.y)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline float2 __half22float2(__half2 h) { return {float(h.x), float(h.y)}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline float __low2float(__half2 h) { return float(h.x); }
inline float __high2float(__half2 h) { return float(h.y); }

inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline float __bfloat162float(__nv_bfloat16 b) { return float(b); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16_raw{bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {__nv_bfloat16(f.x), __nv_bfloat16(f.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {__nv_bfloat16(a), __nv_bfloat16(a)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {float(b.x), float(b.y)}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 b) { return b.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 b) { return b.y; }
inline float __low2float(__nv_bfloat162 b) { return float(b.x); }
inline float __high2float(__nv_bfloat162 b) { return float(b.y); }
