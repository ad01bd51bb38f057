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

#include "log_mel/log_mel_tables.cuh"

namespace atst {

// Order-preserving: larger floats have larger keys, NaN the largest, and no float has key 0.
__device__ __forceinline__ uint32_t float_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float key_float(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

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

// Frames of a clip: as many as its length gives, none at length 0, -1 where the length is impossible.
template <int G>
__device__ __forceinline__ int64_t frames_of(const LogMelArgs& a, int64_t row) {
  const int64_t n = a.lengths ? __ldg(a.lengths + row) : a.samples;
  if (n == 0) return 0;
  return n > MelShape<G>::points && n <= a.samples ? n / a.hop + 1 : -1;
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

// G lanes turn the frame that starts at `x` into powers of its n_fft / 2 + 1 bins.
template <int G>
__device__ void frame_power(const MelShared<G>& s, const float* x, bool even_hop, int frame, int lane) {
  using Shape = MelShape<G>;
  Complex z[32], y[32];
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
__device__ __forceinline__ void mel_sums(const LogMelArgs& a, const MelShared<G>& s, int m, int frame, float* sum) {
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
      const float db = 3.01029995663981195214f * __log2f(sum[j] < 1e-10f ? 1e-10f : sum[j]);
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
