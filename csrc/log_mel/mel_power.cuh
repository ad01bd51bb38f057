// Steps of the kernels from samples to mel filters, log_mel_kernel and kaldi_fbank_kernel: samples to shared memory,
// the transform of windowed frames, sums over filters. How the work is shared out and what it costs:
// log_mel_kernel.cuh.
#pragma once

#include "log_mel/mel_tables.cuh"

namespace atst {

__device__ __forceinline__ float as_sample(float x) { return x; }
__device__ __forceinline__ float as_sample(int16_t x) { return static_cast<float>(x) * (1.0f / 32768); }

// Samples [start, start + count) of a clip of n, reflected at both ends; zeros where even that does not reach (frames
// past the last one). All of a thread's are loaded, from an index that is always in range, before the first is used.
template <bool kInside, class T>
__device__ __forceinline__ void stage_samples(const T* wave, int64_t n, int64_t start, int count, float* to) {
  constexpr int batch = 16;
  wave += start;
  // where the clip begins and ends, seen from the tile
  const int first = start < 0 ? static_cast<int>(-start) : 0,
            end = n - start < count ? static_cast<int>(n - start) : count;
  for (int base = threadIdx.x; base < count; base += batch * kMelThreads) {
    T v[batch];
    bool reached[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      int i = min(base + j * kMelThreads, count - 1);
      if constexpr (!kInside) {
        i = i < first ? 2 * first - i : i;
        i = i >= end ? 2 * (end - 1) - i : i;
        reached[j] = i >= first && i < end;
        i = reached[j] ? i : first;
      }
      v[j] = __ldg(wave + i);
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const int i = base + j * kMelThreads;
      if (i < count) to[i] = kInside || reached[j] ? as_sample(v[j]) : 0.0f;
    }
  }
}

template <class T>
__device__ __forceinline__ void stage_tile(const T* wave, int64_t n, int64_t start, int count, float* to) {
  if (start >= 0 && start + count <= n)
    stage_samples<true>(wave, n, start, count, to);
  else
    stage_samples<false>(wave, n, start, count, to);
}

// Where the powers of a tile's frame start. In step 2 the frames of a warp store side by side, so they lie G banks
// apart; in step 3 a warp reads 8 filters of four successive frames, which lie 8 banks apart.
template <int G>
__device__ __forceinline__ float* power_row(const MelShared<G>& s, int frame) {
  return s.region + frame * MelShape<G>::region + 8 * (frame % 4) + MelShape<G>::power_front;
}

// The frame that G lanes take: for G = 16 the two of a warp must lie 16 banks apart.
template <int G>
__device__ __forceinline__ int frame_of(int slot) {
  return G == 16 ? slot / 4 * 4 + slot % 2 * 2 + slot / 2 % 2 : slot;
}

// Powers of bins k and P - k, from Z[k], Z[P - k] and e^(-2 pi i k / n_fft).
__device__ __forceinline__ void pair_power(Complex zk, Complex zn, Complex w, float* power, int k, int mirror) {
  const Complex even = {zk.re + zn.re, zk.im - zn.im}, odd = {zk.im + zn.im, zn.re - zk.re};
  const Complex turned = w * odd, x = even + turned, y = even - turned;
  power[k] = __fmaf_rn(x.re, x.re, x.im * x.im);
  power[mirror] = __fmaf_rn(y.re, y.re, y.im * y.im);
}

__device__ __forceinline__ Complex select(bool first, Complex a, Complex b) {
  return {first ? a.re : b.re, first ? a.im : b.im};
}

// Rows k1 = lane and 32 - lane (lane 0: 0 and 16), transformed: power of all their bins.
template <int G>
__device__ __forceinline__ void pair_rows(const Complex* a, const Complex* b, const Complex* root, int lane,
                                          float* power) {
  constexpr int P = 32 * G;
#pragma unroll
  for (int s = 0; s < G; ++s) {
    const bool low = s < G / 2, special = lane == 0;
    const Complex zk = low ? a[s] : select(special, b[s], a[s]);
    const Complex zn = low ? select(special, a[(G - s) % G], b[G - 1 - s]) : b[G - 1 - s];
    const int k = lane + 32 * s + (!low && special ? 16 : 0);
    pair_power(zk, zn, rotate32(root[low ? 0 : 1], s * (16 / G)), power, k, P - k);
  }
  if (lane == 0) power[P / 2] = 4 * __fmaf_rn(a[G / 2].re, a[G / 2].re, a[G / 2].im * a[G / 2].im);
}

// Rows k1 and 32 - k1 of lanes that have no exception.
template <int G>
__device__ __forceinline__ void pair_plain_rows(const Complex* a, const Complex* b, Complex root, int k1,
                                                float* power) {
#pragma unroll
  for (int s = 0; s < G; ++s)
    pair_power(a[s], b[G - 1 - s], rotate32(root, s * (16 / G)), power, k1 + 32 * s, 32 * G - k1 - 32 * s);
}

// One row per lane: the partner, row 32 - lane, is another lane's.
__device__ __forceinline__ void pair_lanes(const Complex* a, const Complex* root, int lane, float* power) {
#pragma unroll
  for (int s = 0; s < 16; ++s) {
    const Complex partner = {__shfl_sync(0xffffffffu, a[31 - s].re, (32 - lane) & 31),
                             __shfl_sync(0xffffffffu, a[31 - s].im, (32 - lane) & 31)};
    const int k = lane + 32 * s;
    pair_power(a[s], select(lane == 0, a[(32 - s) % 32], partner), rotate32(root[s % 2], s / 2), power, k, 1024 - k);
  }
  if (lane == 0) power[512] = 4 * __fmaf_rn(a[16].re, a[16].re, a[16].im * a[16].im);
}

// G lanes turn their points of a windowed frame, z[i] the samples 2 (G i + lane) and the next one, into powers of its
// n_fft / 2 + 1 bins.
template <int G>
__device__ __forceinline__ void frame_spectrum(const MelShared<G>& s, Complex* z, int frame, int lane) {
  using Shape = MelShape<G>;
  Complex y[32];
  fft<32>(z, y);
  const auto* twiddle = reinterpret_cast<const float2*>(s.twiddle);
  float2* exchange = reinterpret_cast<float2*>(s.region + frame * Shape::region + (G == 8 ? 16 * (frame & 1) : 0));
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    const float2 w = twiddle[k * G + lane];
    const Complex turned = k == 0 ? y[0] : y[k] * Complex{w.x, w.y};
    exchange[k * Shape::row + lane] = make_float2(turned.re, turned.im);
  }
  __syncwarp();
  // rows of this lane: first the pair (k1, 32 - k1), for G = 8 a second one
  const int rows[4] = {lane, lane == 0 ? 16 : 32 - lane, lane == 0 ? 8 : 16 - lane, lane == 0 ? 24 : 16 + lane};
#pragma unroll
  for (int r = 0; r < 32 / G; ++r) {
#pragma unroll
    for (int i = 0; i < G; ++i) {
      const float2 v = exchange[rows[r] * Shape::row + i];
      z[r * G + i] = {v.x, v.y};
    }
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 32 / G; ++r) fft<G>(z + r * G, y + r * G);
  const auto* root = reinterpret_cast<const float2*>(s.roots) + lane;
  const Complex roots[3] = {{root[0].x, root[0].y}, {root[G].x, root[G].y}, {root[2 * G].x, root[2 * G].y}};
  float* power = power_row(s, frame);
  if constexpr (G == 32) {
    pair_lanes(y, roots, lane, power);
  } else {
    pair_rows<G>(y, y + G, roots, lane, power);
    if constexpr (G == 8) pair_plain_rows<G>(y + 2 * G, y + 3 * G, roots[2], rows[2], power);
  }
  if (lane < Shape::power_front) power[lane - Shape::power_front] = 0.0f;
  if (lane < Shape::power_back) power[Shape::points + 1 + lane] = 0.0f;
}

// Filter m of every fourth frame from `frame` on.
template <int G>
__device__ __forceinline__ void mel_sums(const MelArgs& a, const MelShared<G>& s, int m, int frame, float* sum) {
  using Shape = MelShape<G>;
  constexpr int distance = 4 * Shape::region, each = Shape::frames / 4;
  const MelRun run(s, m);
  const float* power = power_row(s, frame) + run.start;
  if (s.flags[0]) {
    for (int k = s.first[m]; k <= s.last[m]; ++k) {
      const float w = __ldg(a.fb + int64_t(k) * a.n_mels + m);
#pragma unroll
      for (int j = 0; j < each; ++j) sum[j] = __fmaf_rn(power[j * distance + k - run.start], w, sum[j]);
    }
    return;
  }
  const float* weights = s.weights + s.offset[m / kMelGroup] + m % kMelGroup * 4;
  for (int i = 0; i < run.count; i += 4) {
    const float4 w = *reinterpret_cast<const float4*>(weights + kMelGroup * i);
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const float* p = power + j * distance + i;
      sum[j] = __fmaf_rn(p[0], w.x, sum[j]);
      sum[j] = __fmaf_rn(p[1], w.y, sum[j]);
      sum[j] = __fmaf_rn(p[2], w.z, sum[j]);
      sum[j] = __fmaf_rn(p[3], w.w, sum[j]);
    }
  }
}

}  // namespace atst
