// Waveform to Kaldi's log-mel filterbank in one launch; the formula is in kaldi_fbank.h.
//
// Share of the work: log_mel_kernel's (log_mel/log_mel_kernel.cuh), whose transform, sums and tables these are. What
// differs is how a lane gets its points. It holds the pairs of samples 2 (G i + lane), i < 32, of its frame in
// registers, adds them up, and G lanes exchange their sums: the mean costs no second read. The sample before a pair is
// the second one of the lane before (one shuffle per pair), of lane 0 that of the last lane's pair before. Samples past
// the frame are zeros in the registers and in the window. There is no floor and no reflection, so tiles know nothing of
// one another; a row of the result is a frame, and the 8 lanes of a filter group write 32 bytes of it side by side.
//
// Bytes: 2 or 4 per sample, 4 n_mels per frame. Per frame at 16 kHz (W 400, n_fft 512, 128 filters): 1,280
// FFMA/FADD/FMUL a lane of eight, 10 k in all, plus 3 k of mel. Shared memory, in wavefronts of 128 bytes: samples 25
// (twice what their bytes take: frames of a warp begin in the same bank), window 16, shuffles 9, twiddles 16, exchange
// 32, powers 9, mel 53; 160 in all, which at one per cycle is the floor of this design.
#pragma once

#include "log_mel/mel_power.cuh"

namespace atst {

struct KaldiFbankArgs : MelArgs {
  const void* wave;        // [rows, samples], int16 or float32
  const int64_t* lengths;  // [rows] or null
  float* out;              // [rows, frames, n_mels]
  int64_t samples, frames;
  int items, tiles;  // tiles of all rows, and of one
  bool is_int16, remove_dc_offset;
  float preemphasis, inverse_size;  // 1 / window_size
};

// Frames of a clip: as many as its length gives, -1 where the length is impossible.
__device__ __forceinline__ int64_t frames_of(const KaldiFbankArgs& a, int64_t n) {
  if (n < 0 || n > a.samples) return -1;
  return n < a.window_size ? 0 : (n - a.window_size) / a.hop + 1;
}

// Samples that a tile stages; one more where the last pair is cut in half.
template <int G>
__device__ __forceinline__ int staged(const KaldiFbankArgs& a) {
  return (MelShape<G>::frames - 1) * a.hop + (a.window_size + 1) / 2 * 2;
}

// Samples 2 (G i + lane) and the next one of the frame at `x`, zeros past its end.
template <int G>
__device__ __forceinline__ void load_frame(const KaldiFbankArgs& a, const float* x, int lane, Complex* z) {
  const bool even_hop = a.hop % 2 == 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int n = 2 * (G * i + lane);
    z[i] = {0.0f, 0.0f};
    if (n < a.window_size) {
      const float2 v = even_hop ? *reinterpret_cast<const float2*>(x + n) : make_float2(x[n], x[n + 1]);
      z[i] = {v.x, n + 1 < a.window_size ? v.y : 0.0f};
    }
  }
}

// The mean of G lanes' samples, the quotient corrected once.
template <int G>
__device__ __forceinline__ float frame_mean(const KaldiFbankArgs& a, const Complex* z) {
  Complex part[4] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) part[i % 4] = part[i % 4] + z[i];
  const Complex both = (part[0] + part[1]) + (part[2] + part[3]);
  float sum = both.re + both.im;
#pragma unroll
  for (int d = G / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  const float mean = sum * a.inverse_size;
  return __fmaf_rn(__fmaf_rn(-mean, static_cast<float>(a.window_size), sum), a.inverse_size, mean);
}

// G lanes turn the frame at `x` into powers of its n_fft / 2 + 1 bins.
template <int G>
__device__ void frame_power(const KaldiFbankArgs& a, const MelShared<G>& s, const float* x, int frame, int lane) {
  Complex z[32];
  load_frame<G>(a, x, lane, z);
  const float mean = a.remove_dc_offset ? frame_mean<G>(a, z) : 0.0f, factor = -a.preemphasis;
  const auto* window = reinterpret_cast<const float2*>(s.window);
  float last = z[0].re - mean;  // of the pair before, where lane 0 finds it; the first sample is its own predecessor
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const Complex d = {z[i].re - mean, z[i].im - mean};
    const float other = __shfl_sync(0xffffffffu, d.im, (lane + G - 1) % G, G);
    const float before = lane == 0 ? last : other;
    last = other;
    const float2 w = window[G * i + lane];
    z[i] = {__fmaf_rn(factor, before, d.re) * w.x, __fmaf_rn(factor, d.re, d.im) * w.y};
  }
  frame_spectrum<G>(s, z, frame, lane);
}

// Logarithms of a tile's filters.
template <int G>
__device__ void mel_tile(const KaldiFbankArgs& a, const MelShared<G>& s, int64_t row, int64_t t0, int64_t valid) {
  constexpr int each = MelShape<G>::frames / 4;
  const int lane = threadIdx.x % 32, frame = lane % 4;
  for (int m = threadIdx.x / 32 * kMelGroup + lane / 4; m < a.n_mels; m += kMelThreads / 32 * kMelGroup) {
    float sum[each] = {};
    mel_sums(a, s, m, frame, sum);
    float* out = a.out + (row * a.frames + t0 + frame) * a.n_mels + m;
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const int64_t t = t0 + 4 * j + frame;
      constexpr float epsilon = 1.1920928955078125e-07f;
      const float y = 0.69314718055994530942f * __log2f(sum[j] < epsilon ? epsilon : sum[j]);
      if (t < a.frames) out[int64_t(4 * j) * a.n_mels] = t < valid ? y : 0.0f;
    }
  }
}

// What a tile holds that has no frame of its clip: zeros, or NaN where the clip's length is impossible.
template <int G>
__device__ void fill_tile(const KaldiFbankArgs& a, int64_t row, int64_t t0, float value) {
  const int64_t left = a.frames - t0;
  const int count = static_cast<int>(left < MelShape<G>::frames ? left : MelShape<G>::frames) * a.n_mels;
  float* out = a.out + (row * a.frames + t0) * a.n_mels;
  for (int i = threadIdx.x; i < count; i += kMelThreads) out[i] = value;
}

template <int G>
__global__ void __launch_bounds__(kMelThreads, 2) kaldi_fbank_kernel(const __grid_constant__ KaldiFbankArgs a) {
  const MelShared<G> s(shared_memory<float>(), a);
  make_mel_tables(a, s);
  const int frame = frame_of<G>(threadIdx.x / G), lane = threadIdx.x % G;
  for (int item = blockIdx.x; item < a.items; item += gridDim.x) {
    const int64_t row = item / a.tiles, t0 = int64_t(item % a.tiles) * MelShape<G>::frames;
    const int64_t n = a.lengths ? __ldg(a.lengths + row) : a.samples, valid = frames_of(a, n);
    if (t0 >= valid) {
      fill_tile<G>(a, row, t0, valid < 0 ? __int_as_float(0x7fc00000) : 0.0f);
      continue;
    }
    const int64_t start = t0 * a.hop;
    if (a.is_int16)
      stage_tile(static_cast<const int16_t*>(a.wave) + row * a.samples, n, start, staged<G>(a), s.samples);
    else
      stage_tile(static_cast<const float*>(a.wave) + row * a.samples, n, start, staged<G>(a), s.samples);
    __syncthreads();
    frame_power<G>(a, s, s.samples + frame * a.hop, frame, lane);
    __syncthreads();
    mel_tile<G>(a, s, row, t0, valid);
  }
}

}  // namespace atst
