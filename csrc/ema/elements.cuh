// Elements of tensors on the GPU: loads and stores of four or one, 16-bit formats, the step between two values.
#pragma once

#include "../device.cuh"
#include "types.h"

namespace atst::ema {
namespace {

__device__ __forceinline__ float from_bf16(unsigned h) { return __uint_as_float(h << 16); }

// Exponent and fraction moved into place and rescaled by 2^112, which makes subnormals right as well; exponent 31
// (infinity, NaN) becomes 255.
__device__ __forceinline__ float from_f16(unsigned h) {
  const unsigned magnitude = (h & 0x7fff) << 13;
  const unsigned scaled = __float_as_uint(__fmul_rn(__uint_as_float(magnitude), 0x1p112f));
  return __uint_as_float(((h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : scaled) | (h & 0x8000) << 16);
}

__device__ __forceinline__ unsigned to_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  return x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <Type T>
__device__ __forceinline__ float from_half(unsigned h) {
  return T == Type::bf16 ? from_bf16(h) : from_f16(h);
}

// Unit u of an array: kWidth elements, 4 or 1. (u is signed: what cannot wrap becomes an offset in the instruction.)
// kOnce: nobody reads them again before the caches have been refilled.
template <Type T, int kWidth, bool kOnce = false>
__device__ __forceinline__ void load(const void* p, int u, float (&x)[kWidth]) {
  if constexpr (T == Type::f32 && kWidth == 4) {
    const float4* at = static_cast<const float4*>(p) + u;
    const float4 v = kOnce ? __ldcs(at) : *at;
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else if constexpr (T == Type::f32) {
    const float* at = static_cast<const float*>(p) + u;
    x[0] = kOnce ? __ldcs(at) : *at;
  } else if constexpr (kWidth == 4) {
    const uint2* at = static_cast<const uint2*>(p) + u;
    const uint2 v = kOnce ? __ldcs(at) : *at;
    x[0] = from_half<T>(v.x & 0xffff), x[1] = from_half<T>(v.x >> 16);
    x[2] = from_half<T>(v.y & 0xffff), x[3] = from_half<T>(v.y >> 16);
  } else {
    const unsigned short* at = static_cast<const unsigned short*>(p) + u;
    x[0] = from_half<T>(kOnce ? __ldcs(at) : *at);
  }
}

template <int kWidth, bool kOnce = false>
__device__ __forceinline__ void store(float* p, int u, const float (&x)[kWidth]) {
  if constexpr (kWidth == 4) {
    float4* at = reinterpret_cast<float4*>(p) + u;
    const float4 v = make_float4(x[0], x[1], x[2], x[3]);
    if constexpr (kOnce)
      __stcs(at, v);
    else
      *at = v;
  } else if constexpr (kOnce) {
    __stcs(p + u, x[0]);
  } else {
    p[u] = x[0];
  }
}

template <int kWidth>
__device__ __forceinline__ void store_bf16(uint16_t* p, int u, const float (&x)[kWidth]) {
  if constexpr (kWidth == 4)
    reinterpret_cast<uint2*>(p)[u] =
        make_uint2(to_bf16(x[0]) | to_bf16(x[1]) << 16, to_bf16(x[2]) | to_bf16(x[3]) << 16);
  else
    p[u] = static_cast<uint16_t>(to_bf16(x[0]));
}

template <Type T>
__device__ __forceinline__ const void* advance(const void* p, int64_t elements) {
  return static_cast<const char*>(p) + elements * (T == Type::f32 ? 4 : 2);
}

// x to y by `weight` (at most 1/2), of teacher and student whichever is nearer to the result: exact where they are
// equal and at momentum 0 and 1. A rest that is NaN gives NaN.
struct Lerp {
  float weight;
  bool from_student;

  __device__ static Lerp of(float rest) { return {rest <= 0.5f ? rest : __fsub_rn(1.0f, rest), rest > 0.5f}; }

  __device__ __forceinline__ float operator()(float teacher, float student) const {
    const float x = from_student ? student : teacher, y = from_student ? teacher : student;
    return __fmaf_rn(weight, __fsub_rn(y, x), x);
  }
};

}  // namespace
}  // namespace atst::ema
