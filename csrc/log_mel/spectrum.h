// From samples to powers for kLanes frames at a time, and their sums over mel filters.
//
// The FFT is vertical: kLanes frames lie side by side in the lanes, every butterfly is straight-line code on whole
// vectors, and no shuffle is needed but for one transposition of the samples.
//
// - The hop makes that transposition cheap. Frame l reads sample n at l * hop + n, so with the samples as rows of
//   `hop` values, transposed to columns[n % hop][l + n / hop], any (n, all frames) is one contiguous load. A tile of 32
//   frames transposes each of its samples once, though each is used n_fft / hop (6.4) times.
// - n_fft real samples are n_fft/2 complex ones (even + i odd). Points = R x 64 (R 4, 8 or 16): a radix-R pass over
//   stride 64 takes window and transposed samples straight from L1, then each 64-point block is two radix-8 passes.
//   Index k of the result is index k / R of block k % R, at `position` there. So the real transform's pairs, k and
//   points - k, come from block r and block R - r alone: each such pair of blocks (16 KiB) becomes power while in L1.
// - Work per 16 frames, n_fft 1024: about 17 k vector operations of FFT, 4 k to unpack and square, 1 k of mel, 1.3 k of
//   logarithm. On two 512-bit pipes about 12 k cycles: 0.3 ms for the 1001 frames of 10 s at 2.6 GHz.
// - float32 throughout; the rounding of an FFT of this length is about 1e-7 of the frame's largest amplitude, so bins
//   80 dB below it keep a relative error of about 1e-3 (0.01 dB).
#pragma once

#include "log_mel/mel_plan.h"
#include "simd.h"

namespace atst::ATST_ISA {
namespace {

typedef float v4 __attribute__((vector_size(16)));
typedef float v4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));

struct Complex {
  vf re, im;
};
ATST_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
ATST_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
ATST_INLINE Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
ATST_INLINE Complex times(Complex a, float re, float im) { return {a.re * re - a.im * im, a.re * im + a.im * re}; }

ATST_INLINE void fft2(Complex& a, Complex& b) {
  const Complex d = a - b;
  a = a + b;
  b = d;
}

// z[0], z[S], z[2S], z[3S] in place, results in order
template <int S>
ATST_INLINE void fft4(Complex* z) {
  fft2(z[0], z[2 * S]);
  fft2(z[S], z[3 * S]);
  z[3 * S] = times_minus_i(z[3 * S]);
  fft2(z[0], z[S]);
  fft2(z[2 * S], z[3 * S]);
  const Complex t = z[S];
  z[S] = z[2 * S];
  z[2 * S] = t;
}

template <int S>
ATST_INLINE void fft8(Complex* z) {
  constexpr float h = 0.70710678118654752440f;
  // even and odd halves by decimation in frequency: sums, and differences times e^(-2 pi i j / 8)
  Complex a[4], b[4];
  for (int j = 0; j < 4; ++j) {
    a[j] = z[j * S] + z[(j + 4) * S];
    b[j] = z[j * S] - z[(j + 4) * S];
  }
  b[1] = {(b[1].re + b[1].im) * h, (b[1].im - b[1].re) * h};
  b[2] = times_minus_i(b[2]);
  b[3] = {(b[3].im - b[3].re) * h, (b[3].re + b[3].im) * -h};
  fft4<1>(a);
  fft4<1>(b);
  for (int j = 0; j < 4; ++j) {
    z[2 * j * S] = a[j];
    z[(2 * j + 1) * S] = b[j];
  }
}

ATST_INLINE void fft16(Complex* z) {
  constexpr float c1 = 0.92387953251128675613f, s1 = 0.38268343236508977173f, h = 0.70710678118654752440f;
  for (int j = 0; j < 4; ++j) fft4<4>(z + j);
  // z[4 a + j]: index a of the first factor; twiddle e^(-2 pi i a j / 16)
  z[5] = times(z[5], c1, -s1);
  z[6] = times(z[6], h, -h);
  z[7] = times(z[7], s1, -c1);
  z[9] = times(z[9], h, -h);
  z[10] = times_minus_i(z[10]);
  z[11] = times(z[11], -h, -h);
  z[13] = times(z[13], s1, -c1);
  z[14] = times(z[14], -h, -h);
  z[15] = times(z[15], -c1, s1);
  for (int a = 0; a < 4; ++a) fft4<1>(z + 4 * a);
  Complex t[16];
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b) t[a + 4 * b] = z[4 * a + b];
  for (int i = 0; i < 16; ++i) z[i] = t[i];
}

template <int R>
ATST_INLINE void fft(Complex* z) {
  if constexpr (R == 4) fft4<1>(z);
  if constexpr (R == 8) fft8<1>(z);
  if constexpr (R == 16) fft16(z);
}

// Vectors from one 64-point block to the next: two more than its 64 re and im, so that the blocks, which the first pass
// writes side by side, do not all fall into the same sets of the cache.
constexpr int64_t kBlock = 128 + 2;

// Scratch of one thread, all of it rewritten for each tile.
struct Scratch {
  float* samples;  // the tile's samples, padded to whole rows of hop
  float* columns;  // [hop rounded up to kLanes][tile_columns]
  vf* z;           // [R][kBlock]: after the first pass
  vf* pair;        // [2][kBlock]: two finished blocks
  vf* power;       // [n_fft/2 + 1]
};

int64_t aligned(int64_t floats, int64_t to = 16) { return (floats + to - 1) / to * to; }

// Samples of a tile; the last row is read in whole vectors.
int64_t samples_of(const MelPlan& plan) { return tile_columns(plan.n_fft, plan.hop) * plan.hop + kLanes; }

Scratch carve(const MelPlan& plan, float* memory) {
  Scratch s;
  const int64_t n_columns = tile_columns(plan.n_fft, plan.hop);
  s.samples = memory;
  s.columns = s.samples + aligned(samples_of(plan));
  s.z = reinterpret_cast<vf*>(s.columns + aligned(n_columns * aligned(plan.hop, kLanes)));
  s.pair = s.z + kBlock * (plan.n_fft / 128);
  s.power = s.pair + 2 * kBlock;
  return s;
}

int64_t scratch_floats(const MelPlan& plan) {
  return aligned(samples_of(plan)) + aligned(tile_columns(plan.n_fft, plan.hop) * aligned(plan.hop, kLanes)) +
         kLanes * (kBlock * (plan.n_fft / 128 + 2) + plan.n_fft / 2 + 1);
}

ATST_INLINE float sample(const MelClip& clip, int64_t i) {
  return clip.is_int16 ? static_cast<const int16_t*>(clip.wave)[i] * (1.0f / 32768.0f)
                       : static_cast<const float*>(clip.wave)[i];
}

// samples[i] = x[start + i], reflected at both ends of the clip; zeros where even the reflection has nothing.
void stage(const MelClip& clip, int64_t start, int64_t count, float* __restrict out) {
  int64_t begin = start < 0 ? -start : 0;
  int64_t end = clip.samples - start < count ? clip.samples - start : count;
  if (begin > count) begin = count;
  if (end < begin) end = begin;
  for (int64_t i = 0; i < begin; ++i) {
    const int64_t from = -(start + i);
    out[i] = from < clip.samples ? sample(clip, from) : 0.0f;
  }
  if (clip.is_int16) {
    const int16_t* wave = static_cast<const int16_t*>(clip.wave) + start;
    for (int64_t i = begin; i < end; ++i) out[i] = wave[i] * (1.0f / 32768.0f);
  } else if (end > begin) {
    __builtin_memcpy(out + begin, static_cast<const float*>(clip.wave) + start + begin, (end - begin) * sizeof(float));
  }
  for (int64_t i = end; i < count; ++i) {
    const int64_t from = 2 * (clip.samples - 1) - (start + i);
    out[i] = from >= 0 && from < clip.samples ? sample(clip, from) : 0.0f;
  }
}

// The rows of four vectors in each of their 128-bit parts, transposed: result i has element i of a, b, d and e.
struct Quads {
  vf v[4];
};
ATST_INLINE Quads transpose_quads(vf a, vf b, vf d, vf e) {
#if defined(__AVX512F__)
#  define ATST_LO32(x, y) __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#  define ATST_HI32(x, y) __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#  define ATST_LO64(x, y) __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#  define ATST_HI64(x, y) __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif defined(__AVX2__)
#  define ATST_LO32(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#  define ATST_HI32(x, y) __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
#  define ATST_LO64(x, y) __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13)
#  define ATST_HI64(x, y) __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#  define ATST_LO32(x, y) __builtin_shufflevector(x, y, 0, 4, 1, 5)
#  define ATST_HI32(x, y) __builtin_shufflevector(x, y, 2, 6, 3, 7)
#  define ATST_LO64(x, y) __builtin_shufflevector(x, y, 0, 1, 4, 5)
#  define ATST_HI64(x, y) __builtin_shufflevector(x, y, 2, 3, 6, 7)
#endif
  const vf ab_lo = ATST_LO32(a, b), ab_hi = ATST_HI32(a, b), de_lo = ATST_LO32(d, e), de_hi = ATST_HI32(d, e);
  return {{ATST_LO64(ab_lo, de_lo), ATST_HI64(ab_lo, de_lo), ATST_LO64(ab_hi, de_hi), ATST_HI64(ab_hi, de_hi)}};
#undef ATST_LO32
#undef ATST_HI32
#undef ATST_LO64
#undef ATST_HI64
}

template <int Part>
ATST_INLINE void store_part(const Quads& q, float* to, int64_t stride) {
  if constexpr (4 * Part < kLanes) {
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<v4_unaligned*>(to + i * stride) =
          __builtin_shufflevector(q.v[i], q.v[i], 4 * Part, 4 * Part + 1, 4 * Part + 2, 4 * Part + 3);
  }
}

// columns[r][c] = samples[c * hop + r], in blocks of kLanes rows and 4 columns
void transpose(const float* __restrict samples, int64_t hop, int64_t n_columns, float* __restrict columns) {
  for (int64_t r = 0; r < hop; r += kLanes) {
    for (int64_t c = 0; c < n_columns; c += 4) {
      const float* from = samples + c * hop + r;
      const Quads q = transpose_quads(load(from), load(from + hop), load(from + 2 * hop), load(from + 3 * hop));
      float* to = columns + r * n_columns + c;
      store_part<0>(q, to, n_columns);
      store_part<1>(q, to + 4 * n_columns, n_columns);
      store_part<2>(q, to + 8 * n_columns, n_columns);
      store_part<3>(q, to + 12 * n_columns, n_columns);
    }
  }
}

// The samples from `start` on that a tile reads, as columns.
void make_columns(const MelPlan& plan, const MelClip& clip, int64_t start, const Scratch& s) {
  const int64_t count = samples_of(plan);
  const float* samples = s.samples;
  if (!clip.is_int16 && start >= 0 && start + count <= clip.samples)
    samples = static_cast<const float*>(clip.wave) + start;
  else
    stage(clip, start, count, s.samples);
  transpose(samples, plan.hop, tile_columns(plan.n_fft, plan.hop), s.columns);
}

// First pass: radix R over stride 64, twiddles. windowed(n) are the windowed samples n and n + 1 of kLanes frames.
template <int R, class Windowed>
void first_pass(const MelPlan& plan, const Scratch& s, const Windowed& windowed) {
  for (int64_t j = 0; j < 64; ++j) {
    Complex z[R];
    for (int q = 0; q < R; ++q) z[q] = windowed(2 * (j + 64 * q));
    fft<R>(z);
    const float* t = plan.twiddle + 2 * R * j;
    for (int r = 0; r < R; ++r) {
      const Complex y = r ? times(z[r], t[2 * r], t[2 * r + 1]) : z[0];
      s.z[kBlock * r + 2 * j] = y.re;
      s.z[kBlock * r + 2 * j + 1] = y.im;
    }
  }
}

void fft64(const vf* __restrict from, const float* twiddle, vf* __restrict block) {
  for (int j = 0; j < 8; ++j) {
    Complex z[8];
    for (int q = 0; q < 8; ++q) z[q] = {from[2 * (j + 8 * q)], from[2 * (j + 8 * q) + 1]};
    fft8<1>(z);
    for (int r = 0; r < 8; ++r) {
      if (r) z[r] = times(z[r], twiddle[2 * (8 * j + r)], twiddle[2 * (8 * j + r) + 1]);
      block[2 * (j + 8 * r)] = z[r].re;
      block[2 * (j + 8 * r) + 1] = z[r].im;
    }
  }
  for (int r = 0; r < 8; ++r) {
    Complex z[8];
    for (int j = 0; j < 8; ++j) z[j] = {block[2 * (8 * r + j)], block[2 * (8 * r + j) + 1]};
    fft8<1>(z);
    for (int k = 0; k < 8; ++k) {
      block[2 * (8 * r + k)] = z[k].re;
      block[2 * (8 * r + k) + 1] = z[k].im;
    }
  }
}

// Where fft64 leaves index k.
ATST_INLINE int64_t position(int64_t k) { return 8 * (k % 8) + k / 8; }

// X[k] = E + W^k O and X[points - k] = conj(E - W^k O), where 2 E and 2 i O are sum and difference of Z[k] and
// conj Z[points - k]; the factor 1/2 is folded into the window by the boundary. Here a holds Z[k] for k = r + R i, and
// b the Z[points - k], at index (r ? 63 : 64) - i.
template <int R>
void unpack_power(const MelPlan& plan, int64_t r, const vf* a_block, const vf* b_block, vf* power) {
  constexpr int64_t points = 64 * R;
  const float* w = plan.twiddle + 2 * points + 2 * 64;
  for (int64_t i = 0; i < (r ? 32 : 33); ++i) {
    const int64_t k = r + R * i;
    const vf* a = a_block + 2 * position(i);
    const vf* b = b_block + 2 * position(r ? 63 - i : (64 - i) % 64);
    const Complex even = {a[0] + b[0], a[1] - b[1]};
    const Complex odd = times({a[1] + b[1], b[0] - a[0]}, w[2 * k], w[2 * k + 1]);
    const Complex x = even + odd, y = even - odd;
    power[k] = x.re * x.re + x.im * x.im;
    power[points - k] = y.re * y.re + y.im * y.im;
  }
}

template <int R, class Windowed>
void spectrum(const MelPlan& plan, const Scratch& s, const Windowed& windowed) {
  first_pass<R>(plan, s, windowed);
  const float* twiddle = plan.twiddle + 128 * R;
  vf *a = s.pair, *b = s.pair + kBlock;
  for (int64_t r = 0; r <= R / 2; ++r) {
    const bool alone = r == 0 || r == R / 2;
    fft64(s.z + kBlock * r, twiddle, a);
    if (!alone) fft64(s.z + kBlock * (R - r), twiddle, b);
    unpack_power<R>(plan, r, a, alone ? a : b, s.power);
    if (!alone) unpack_power<R>(plan, R - r, b, a, s.power);
  }
}

// Powers of all bins into s.power.
template <class Windowed>
ATST_INLINE void powers(const MelPlan& plan, const Scratch& s, const Windowed& windowed) {
  if (plan.n_fft == 512) spectrum<4>(plan, s, windowed);
  if (plan.n_fft == 1024) spectrum<8>(plan, s, windowed);
  if (plan.n_fft == 2048) spectrum<16>(plan, s, windowed);
}

// The powers of a bin range, weighted: filter m of kLanes frames.
ATST_INLINE vf mel_sum(const MelPlan& plan, const vf* power, int64_t m) {
  const vf* p = power + plan.first_bin[m];
  const float* w = plan.weights + plan.first_weight[m];
  // four sums, because one would wait four cycles for each addition
  vf sum[4] = {};
  int32_t i = 0;
  for (; i + 4 <= plan.n_weights[m]; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] += p[i + j] * w[i + j];
  for (; i < plan.n_weights[m]; ++i) sum[0] += p[i] * w[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace
}  // namespace atst::ATST_ISA
