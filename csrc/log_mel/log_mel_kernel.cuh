// Waveform to normalised log-mel in one launch (and the zeroing of eight bytes per clip); the formula is in log_mel.h.
//
// Share of the work. Blocks of 256 threads stay resident and walk over tiles of 256 / G frames, G = n_fft / 64 lanes to
// a frame (16 of them at n_fft 1024). Per tile:
//   1. its samples go to shared memory once, converted and reflected (each is used n_fft / hop = 6.4 times)
//   2. n_fft real samples are P = n_fft / 2 complex ones. Lane n2 takes points G n1 + n2, n1 < 32, through a transform
//      of 32 in registers, multiplies by e^(-2 pi i n2 k1 / P), and after ONE exchange through shared memory holds
//      rows k1 = lane and 32 - lane, which transforms of G points turn into Z[k1 + 32 k2]. The two rows are chosen so
//      that a pair k, P - k, from which the spectrum of the real samples comes, lies in one lane (G = 32: one row, the
//      partner's comes by shuffle; lane 0 is the exception, and selects). Power goes back to shared memory.
//   3. a warp takes 8 neighbouring filters at a time: lane 4 h + f' sums filter h for every fourth frame from f' on, so
//      that a weight serves several frames, powers come without bank conflicts (see power_row) and no lane is idle.
// The filterbank arrives dense. Each block finds its nonzero runs once and keeps them in shared memory: no table is
// cached between calls, so none can be stale, and a block that lives for a whole batch pays some 1 % for it (reckoned,
// not measured).
//
// The floor. A tile publishes the maximum of its decibels (atomic, on order-preserving integers) and keeps its minimum;
// the block that finishes the last tile of a floor group (a ticket) raises what lies below the floor, tile by tile, and
// leaves tiles alone that have nothing there. What it reads was written microseconds before: it is in L2. So the floor
// costs no pass over memory and no second launch, and the consumer gets final values.
//
// Bytes: 2 or 4 per sample, 4 n_mels per frame. Operations per frame, n_fft 1024: 1,260 FFMA/FADD/FMUL a lane, 20 k in
// all, plus 1,026 of mel. Shared memory: 237 wavefronts (128 bytes) per frame: samples 32, window 32, twiddles 31,
// exchange 64, powers 17, mel 61. At one wavefront per cycle that is the floor of this design.
//
// float32 throughout: half-precision tensor cores do not hold 80 dB.
#pragma once

#include "log_mel/mel_power.cuh"

namespace atst {

struct LogMelArgs : MelArgs {
  const void* wave;         // [rows, samples], int16 or float32
  const int64_t* lengths;   // [rows] or null
  float* out;               // [rows, n_mels, frames]
  uint32_t *peak, *ticket;  // [rows / group], zero at the start; null: no floor
  float* tile_min;          // [rows, tiles]
  int64_t samples, frames;
  int items, tiles;  // tiles of all rows, and of one
  int group;
  bool is_int16, decibels;  // without: energies
  float top_db, scale, bias;
};

// Order-preserving: larger floats have larger keys, NaN the largest, and no float has key 0.
__device__ __forceinline__ uint32_t float_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float key_float(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// Frames of a clip: as many as its length gives, none at length 0, -1 where the length is impossible.
template <int G>
__device__ __forceinline__ int64_t frames_of(const LogMelArgs& a, int64_t row) {
  const int64_t n = a.lengths ? __ldg(a.lengths + row) : a.samples;
  if (n == 0) return 0;
  return n > MelShape<G>::points && n <= a.samples ? n / a.hop + 1 : -1;
}

// G lanes turn the frame that starts at `x` into powers of its n_fft / 2 + 1 bins.
template <int G>
__device__ void frame_power(const MelShared<G>& s, const float* x, bool even_hop, int frame, int lane) {
  Complex z[32];
  const auto* window = reinterpret_cast<const float2*>(s.window);
  if (even_hop) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const float2 v = reinterpret_cast<const float2*>(x)[G * i + lane], w = window[G * i + lane];
      z[i] = {v.x * w.x, v.y * w.y};
    }
  } else {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int n = 2 * (G * i + lane);
      z[i] = {x[n] * s.window[n], x[n + 1] * s.window[n + 1]};
    }
  }
  frame_spectrum<G>(s, z, frame, lane);
}

// Step 3: decibels of a tile, scaled; the warp's largest and smallest go to shared memory.
template <int G>
__device__ void mel_tile(const LogMelArgs& a, const MelShared<G>& s, int64_t row, int64_t t0, int64_t valid) {
  using Shape = MelShape<G>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, frame = lane % 4;
  uint32_t top = 0;
  float least = __int_as_float(0x7f800000);
  for (int m = warp * kMelGroup + lane / 4; m < a.n_mels; m += kMelThreads / 32 * kMelGroup) {
    float sum[Shape::frames / 4] = {};
    mel_sums(a, s, m, frame, sum);
    float* out = a.out + (row * a.n_mels + m) * a.frames;
#pragma unroll
    for (int j = 0; j < Shape::frames / 4; ++j) {
      const int64_t t = t0 + 4 * j + frame;
      const float db = a.decibels ? 3.01029995663981195214f * __log2f(sum[j] < 1e-10f ? 1e-10f : sum[j]) : sum[j];
      if (t < valid) {
        top = max(top, float_key(db));
        least = fminf(least, db);
      }
      if (t < a.frames) out[t] = t < valid ? __fmaf_rn(db, a.scale, a.bias) : 0.0f;
    }
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    top = max(top, __shfl_xor_sync(0xffffffffu, top, d));
    least = fminf(least, __shfl_xor_sync(0xffffffffu, least, d));
  }
  if (lane == 0) s.warp_top[warp] = top, s.warp_min[warp] = least;
}

// What a tile holds that has no frame of its clip: zeros, or NaN where the clip's length is impossible.
template <int G>
__device__ void fill_tile(const LogMelArgs& a, const MelShared<G>& s, int64_t row, int64_t t0, float value) {
  constexpr int frames = MelShape<G>::frames;
  for (int i = threadIdx.x; i < a.n_mels * frames; i += kMelThreads) {
    const int64_t t = t0 + i % frames;
    if (t < a.frames) a.out[(row * a.n_mels + i / frames) * a.frames + t] = value;
  }
  if (threadIdx.x < 8) s.warp_top[threadIdx.x] = 0, s.warp_min[threadIdx.x] = __int_as_float(0x7f800000);
}

// By one thread, once all threads have written the tile: true if it was the last one of its floor group.
template <int G>
__device__ bool publish_tile(const LogMelArgs& a, const MelShared<G>& s, int item) {
  uint32_t top = 0;
  float least = s.warp_min[0];
  for (int w = 0; w < kMelThreads / 32; ++w) {
    top = max(top, s.warp_top[w]);
    least = fminf(least, s.warp_min[w]);
  }
  const int tiles = a.group * a.tiles, g = item / tiles;
  a.tile_min[item] = least;
  atomicMax(a.peak + g, top);
  __threadfence();
  return atomicAdd(a.ticket + g, 1u) == static_cast<uint32_t>(tiles - 1);
}

// max(y, floor) over a whole floor group; a warp takes a tile at a time, and only those that reach below.
template <int G>
__device__ void finish_group(const LogMelArgs& a, int g) {
  constexpr int frames = MelShape<G>::frames, step = 32 / frames;  // filters that a warp takes side by side
  __threadfence();
  const float floor = key_float(__ldcg(a.peak + g)) - a.top_db, y_floor = __fmaf_rn(floor, a.scale, a.bias);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < a.group * a.tiles; i += kMelThreads / 32) {
    const int item = g * a.group * a.tiles + i;
    const int64_t row = item / a.tiles;
    const int64_t t = int64_t(item % a.tiles) * frames + lane % frames;
    if (__ldcg(a.tile_min + item) >= floor || t >= frames_of<G>(a, row)) continue;
    // several loads in flight: a store between them could change, for all the compiler knows, what they load
    constexpr int batch = 8;
    float* out = a.out + (row * a.n_mels + lane / frames) * a.frames + t;
    const int64_t stride = step * a.frames;
    for (int m = lane / frames; m < a.n_mels; m += batch * step, out += batch * stride) {
      float y[batch];
#pragma unroll
      for (int j = 0; j < batch; ++j) y[j] = m + j * step < a.n_mels ? __ldcg(out + j * stride) : y_floor;
#pragma unroll
      for (int j = 0; j < batch; ++j)
        if (!(y[j] >= y_floor) && m + j * step < a.n_mels) out[j * stride] = y_floor;
    }
  }
}

template <int G>
__global__ void __launch_bounds__(kMelThreads, 2) log_mel_kernel(const __grid_constant__ LogMelArgs a) {
  using Shape = MelShape<G>;
  const MelShared<G> s(shared_memory<float>(), a);
  make_mel_tables(a, s);
  const int frame = frame_of<G>(threadIdx.x / G), lane = threadIdx.x % G;
  const bool even_hop = a.hop % 2 == 0;
  int before = -1;  // the tile whose maximum is still to be published
  for (int item = blockIdx.x;; item += gridDim.x) {
    const bool more = item < a.items;
    const int64_t row = item / a.tiles, t0 = int64_t(item % a.tiles) * Shape::frames;
    const int64_t valid = more ? frames_of<G>(a, row) : 0;
    const bool active = t0 < valid;
    if (active) {
      const int64_t n = a.lengths ? __ldg(a.lengths + row) : a.samples;
      const int64_t start = t0 * a.hop - Shape::points;
      const int count = (Shape::frames - 1) * a.hop + Shape::n_fft;
      if (a.is_int16)
        stage_tile(static_cast<const int16_t*>(a.wave) + row * a.samples, n, start, count, s.samples);
      else
        stage_tile(static_cast<const float*>(a.wave) + row * a.samples, n, start, count, s.samples);
    }
    __syncthreads();
    // the tile before is written: one thread says so while the others transform this one
    if (a.peak && before >= 0 && threadIdx.x == 0)
      s.flags[1] = publish_tile(a, s, before) ? before / (a.group * a.tiles) : -1;
    if (active) frame_power<G>(s, s.samples + frame * a.hop, even_hop, frame, lane);
    __syncthreads();
    if (a.peak && s.flags[1] >= 0) finish_group<G>(a, s.flags[1]);
    if (!more) return;
    if (active)
      mel_tile<G>(a, s, row, t0, valid);
    else
      fill_tile<G>(a, s, row, t0, valid < 0 ? __int_as_float(0x7fc00000) : 0.0f);
    before = item;
  }
}

}  // namespace atst
