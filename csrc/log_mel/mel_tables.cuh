// For log_mel and kaldi_fbank: how a block lays out its shared memory, and the tables that it makes there first.
#pragma once

#include "log_mel/fft.cuh"

namespace atst {

constexpr int kMelThreads = 256;

// What the kernels from samples to mel filters are given in common.
struct MelArgs {
  const float *window, *fb;  // [window_size], followed by zeros up to n_fft, and [n_fft / 2 + 1, n_mels]
  int window_size, hop, n_mels;
  int weights;  // floats of shared memory for the filterbank's runs
};

// A warp computes kMelGroup neighbouring filters of all frames of a tile at a time.
constexpr int kMelGroup = 8;

template <int G>
struct MelShape {
  static constexpr int n_fft = 64 * G, points = 32 * G;
  static constexpr int frames = kMelThreads / G;  // of a tile
  static constexpr int row = G + 1;               // complex values from one row of the exchange to the next
  // floats of a frame's region: the exchange (for G = 8 shifted by half the banks in odd frames), later the powers
  static constexpr int region = (32 * row * 2 + (G == 8 ? 16 : 0) + 31) / 32 * 32;
  // zeros before the first power and after the last one, which weights of 0 meet
  static constexpr int power_front = 8, power_back = 4;
};

// Floats for the filterbank's runs: enough for 40 triangles or more (fewer are wider).
inline int mel_weights(int n_fft, int n_mels) { return (3 * (n_fft / 2 + 1) + 8 * n_mels) / 4 * 4; }

// The block's shared memory; all sizes in floats.
template <int G>
struct MelShared {
  float *region, *window, *twiddle, *roots, *weights, *samples;
  int *first, *last, *offset;  // [n_mels]: bins of a filter; where the weights of filter 8 g start in [g]
  uint32_t* warp_top;          // [8]
  float* warp_min;             // [8]
  int* flags;                  // [0]: the filterbank does not fit, [1]: the floor group to finish, or -1

  __device__ __forceinline__ MelShared(float* base, const MelArgs& a) {
    using Shape = MelShape<G>;
    region = base;
    window = region + Shape::frames * Shape::region;
    twiddle = window + Shape::n_fft;
    roots = twiddle + Shape::n_fft;
    weights = roots + 6 * G;
    warp_min = weights + a.weights;
    warp_top = reinterpret_cast<uint32_t*>(warp_min + 8);
    flags = reinterpret_cast<int*>(warp_top + 8);
    first = flags + 4;
    last = first + a.n_mels;
    offset = last + a.n_mels;
    samples = reinterpret_cast<float*>(offset + (3 * a.n_mels + 3) / 4 * 4 - 2 * a.n_mels);
  }
  static size_t bytes(int hop, int n_mels, int weights) {
    using Shape = MelShape<G>;
    const int tables = 2 * Shape::n_fft + 6 * G + weights + 20 + (3 * n_mels + 3) / 4 * 4;
    return sizeof(float) * (Shape::frames * Shape::region + tables + (Shape::frames - 1) * hop + Shape::n_fft);
  }
};

// The bins that filter m is summed over: from a start that has the filter's own remainder by 8, so that the powers of 8
// neighbouring filters lie in different banks, and a multiple of four of them.
struct MelRun {
  int start, count;
  template <int G>
  __device__ __forceinline__ MelRun(const MelShared<G>& s, int m) {
    const int first = s.first[m], last = s.last[m];
    start = first - ((first - m) & (kMelGroup - 1));
    count = last < 0 ? 0 : (last - start + 4) / 4 * 4;
  }
};

__device__ __forceinline__ Complex unit_root(int k, int n) {
  double s, c;
  sincospi(-2.0 * k / n, &s, &c);
  return {static_cast<float>(c), static_cast<float>(s)};
}

// Window (halved: the real transform's unpacking halves every value, exactly), twiddles, and the filterbank's runs.
template <int G>
__device__ void make_mel_tables(const MelArgs& a, const MelShared<G>& s) {
  using Shape = MelShape<G>;
  constexpr int bins = Shape::points + 1;
  const int tid = threadIdx.x;
  for (int m = tid; m < a.n_mels; m += kMelThreads) s.first[m] = bins, s.last[m] = -1;
  if (tid == 0) s.flags[0] = 0, s.flags[1] = -1;
  __syncthreads();
  // a thread reads one column, every `step`-th row of it: coalesced, and in few batches of loads that do not wait for
  // one another (n_fft 1024, 64 filters: 129 rows in three)
  constexpr int batch = 43;
  const int columns = a.n_mels < kMelThreads ? a.n_mels : kMelThreads, step = kMelThreads / columns;
  for (int m = tid % columns; m < a.n_mels && tid / columns < step; m += columns) {
    int first = bins, last = -1;
    for (int k0 = tid / columns; k0 < bins; k0 += batch * step) {
      float v[batch];
#pragma unroll
      for (int j = 0; j < batch; ++j) v[j] = __ldg(a.fb + int64_t(min(k0 + j * step, bins - 1)) * a.n_mels + m);
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        const int k = k0 + j * step;
        const bool used = v[j] != 0.0f && k < bins;
        first = used && k < first ? k : first;
        last = used ? k : last;
      }
    }
    atomicMin(s.first + m, first);
    atomicMax(s.last + m, last);
  }
  for (int i = tid; i < Shape::n_fft; i += kMelThreads)
    s.window[i] = i < a.window_size ? 0.5f * __ldg(a.window + i) : 0.0f;
  for (int i = tid; i < Shape::points; i += kMelThreads) {
    const Complex w = unit_root(i / G * (i % G), Shape::points);
    s.twiddle[2 * i] = w.re, s.twiddle[2 * i + 1] = w.im;
  }
  // what pair_rows, pair_lanes and pair_plain_rows start their own factors from, per lane
  for (int i = tid; i < 3 * G; i += kMelThreads) {
    const int lane = i % G, k = i < G        ? lane
                                : i >= 2 * G ? (lane == 0 ? 8 : 16 - lane)
                                : G == 32    ? lane + 32
                                : lane == 0  ? 16
                                             : lane;
    const Complex w = unit_root(k, Shape::n_fft);
    s.roots[2 * i] = w.re, s.roots[2 * i + 1] = w.im;
  }
  __syncthreads();
  const int groups = (a.n_mels + kMelGroup - 1) / kMelGroup;
  auto longest = [&](int g) {
    int most = 0;
    for (int m = g * kMelGroup; m < a.n_mels && m < (g + 1) * kMelGroup; ++m) most = max(most, MelRun(s, m).count);
    return most;
  };
  for (int g = tid; g < groups; g += kMelThreads) {
    int offset = 0;
    for (int j = 0; j < g; ++j) offset += kMelGroup * longest(j);
    s.offset[g] = offset;
    if (g == groups - 1 && offset + kMelGroup * longest(g) > a.weights) s.flags[0] = 1;
  }
  __syncthreads();
  if (s.flags[0]) return;
  for (int g = tid / 32; g < groups; g += kMelThreads / 32) {
    // four bins of the first filter, four of the second, ...: 16 bytes to a lane, in one row of the banks
    const int m = g * kMelGroup + tid % 32 / 4, count = longest(g);
    if (m >= a.n_mels) continue;
    const int start = MelRun(s, m).start + tid % 4, first = s.first[m], last = s.last[m];
    float* weights = s.weights + s.offset[g] + tid % 32;
    for (int i0 = 0; i0 < count; i0 += 4 * 16) {
      float v[16];
#pragma unroll
      for (int j = 0; j < 16; ++j)
        v[j] = __ldg(a.fb + int64_t(min(max(start + i0 + 4 * j, 0), bins - 1)) * a.n_mels + m);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int i = i0 + 4 * j, k = start + i;
        if (i < count) weights[kMelGroup * i] = k >= first && k <= last ? v[j] : 0.0f;
      }
    }
  }
}

}  // namespace atst
