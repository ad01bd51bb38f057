// Complex transforms of 4, 8, 16 and 32 points in the registers of one thread. Every index is a compile-time constant
// once the loops are unrolled, so arrays are registers, permutations are free and twiddles are immediate operands.
// Operations (additions and multiplications, fused ones once): 16, 56, 160, 432.
#pragma once

#include "device.cuh"

namespace atst {

struct Complex {
  float re, im;
};

__device__ __forceinline__ Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ __forceinline__ Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
__device__ __forceinline__ Complex operator*(Complex a, Complex b) {
  return {__fmaf_rn(a.re, b.re, -(a.im * b.im)), __fmaf_rn(a.re, b.im, a.im * b.re)};
}

// cos(2 pi k / 32)
__device__ __forceinline__ constexpr float cos32(int k) {
  constexpr float c1 = 0.98078528040323044913f, c2 = 0.92387953251128675613f, c3 = 0.83146961230254523708f,
                  c4 = 0.70710678118654752440f, c5 = 0.55557023301960222474f, c6 = 0.38268343236508977173f,
                  c7 = 0.19509032201612826785f;
  const int half = k & 31 & 16 ? 32 - (k & 31) : k & 31;
  const int j = half > 8 ? 16 - half : half;
  const float c = j == 0   ? 1.0f
                  : j == 1 ? c1
                  : j == 2 ? c2
                  : j == 3 ? c3
                  : j == 4 ? c4
                  : j == 5 ? c5
                  : j == 6 ? c6
                  : j == 7 ? c7
                           : 0.0f;
  return half > 8 ? -c : c;
}

// z e^(-2 pi i k / 32)
__device__ __forceinline__ Complex rotate32(Complex z, int k) {
  k &= 31;
  if (k == 0) return z;
  if (k == 8) return {z.im, -z.re};
  const float c = cos32(k), s = cos32(k - 8);
  if (k == 4) return {(z.re + z.im) * c, (z.im - z.re) * c};
  if (k == 12) return {(z.im - z.re) * s, (z.re + z.im) * -s};
  return {__fmaf_rn(z.re, c, z.im * s), __fmaf_rn(z.im, c, -(z.re * s))};
}

// z[0], z[S], z[2S], z[3S] in place, results in order
template <int S>
__device__ __forceinline__ void fft4(Complex* z) {
  const Complex a = z[0] + z[2 * S], b = z[0] - z[2 * S];
  const Complex c = z[S] + z[3 * S], d = rotate32(z[S] - z[3 * S], 8);
  z[0] = a + c;
  z[S] = b + d;
  z[2 * S] = a - c;
  z[3 * S] = b - d;
}

// fft of the N values z[0], z[S], ..., by a pass of radix 4; out[k] is the result of index k
template <int N, int S = 1>
__device__ __forceinline__ void fft(Complex* z, Complex* out) {
  if constexpr (N == 2) {
    out[0] = z[0] + z[S];
    out[1] = z[0] - z[S];
  } else if constexpr (N == 4) {
    fft4<S>(z);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = z[k * S];
  } else {
    constexpr int M = N / 4;
#pragma unroll
    for (int j = 0; j < M; ++j) {
      fft4<M * S>(z + j * S);
#pragma unroll
      for (int k = 1; k < 4; ++k) z[(k * M + j) * S] = rotate32(z[(k * M + j) * S], j * k * (32 / N));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Complex part[M];
      fft<M, S>(z + k * M * S, part);
#pragma unroll
      for (int j = 0; j < M; ++j) out[k + 4 * j] = part[j];
    }
  }
}

}  // namespace atst
