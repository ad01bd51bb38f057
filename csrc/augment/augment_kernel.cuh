// The CUDA kernel of augment; augment.h has the maths, augment_simd.cpp the same steps for the CPU.
//
// A block makes a tile of one view, tile.bins x tile.frames:
//   0. its first thread reads the draws of the clip and plans the tile
//   1. the rows and columns of the crop that the tile reads are mixed, once, into shared memory
//   2. each row is resampled in time, in place, if the crop is not as wide as the view
//   3. the view's rows are made from four rows each, or are those rows if the crop is as high as the view
// A warp owns every warps-th row, its lanes neighbouring columns: a global access is 128 consecutive bytes, a shared
// one has no bank conflict, and no barrier is needed between 1 and 2. Rows of 1001 frames start at any multiple of 4
// bytes, so a lane's accesses are 4 bytes wide; what keeps memory busy is that each thread has eight in flight. Taps
// are computed once per row and column of the tile. Every element is written by one thread in one order, so the bits do
// not depend on how blocks are scheduled.
//
// Grid: one block per tile, tiles of a clip next to each other, so that sectors which two tiles share meet in the L2
// cache. Where all bins fit into a tile (64 do, and 128 on a canvas no wider than the view) a value is read and mixed
// once in the whole view, but for five columns next to a tile that is resampled in time.
//
// Floor: clip and partner are read, the view is written: 12 bytes a value, 26 us for 144 clips of 64 x 1001 at
// 4.3 TB/s. Instructions, counted in the machine code for a full tile of 64 bins: 26 a value in step 1, 18 in step 3,
// 10 for plan, taps and loops, which is 17 us of an H200's issue slots (shared memory 12 us, exp2 and log2 units 8 us):
// memory bounds it. Five blocks of 256 threads or ten of 128 with 8 loads of a thread in flight are 40 KiB on the way
// to a multiprocessor, half as much again as 4.3 TB/s and 800 ns ask for. Times: not measured.
// Numbers: __expf and __logf, 3 ulp each for arguments and results between -1.5 and 1.5, 7e-7 in sum, times 1.4 per
// resampled axis, stay within the operator's 2e-6; expf and logf would make step 1 twice as long.
#pragma once

#include <cmath>

#include "device.cuh"

namespace atst {

constexpr int kAugmentFrames = 64;  // of the widest tile: two columns a lane
constexpr int kAugmentBatch = 2;    // rows that a warp loads before it mixes them

struct AugmentTile {
  int bins, frames;            // of the view
  int bin_tiles, frame_tiles;  // in a clip
  int stride;                  // of a row in shared memory: the most columns that a tile reads
};

struct AugmentArgs {
  const float* mel;             // [clips, bins, frames]
  const float* bank;            // [slots, bins, bank_frames]
  const int64_t* bank_lengths;  // [slots]
  const int64_t* partner;       // [clips]
  const int64_t* start;         // [clips]
  const float* alpha;           // [clips]
  const int64_t* crop;          // [clips, 4]
  float* view;                  // [clips, bins, frames]
  int64_t clips, slots, bank_frames;
  int bins, frames, canvas_bins, canvas_frames;
  AugmentTile tile;
};

namespace {

// Samples of an axis.
struct Span {
  int first, count;

  __device__ int end() const { return first + count; }

  // What of [begin, end) lies in this span, counted from its first sample.
  __device__ Span part(int begin, int end) const {
    begin = begin < first ? 0 : begin - first < count ? begin - first : count;
    end = end - first < count ? end - first : count;
    return {begin, end > begin ? end - begin : 0};
  }
};

struct __align__(16) Taps {
  int at[4];
  float weight[4];
};

// One axis of the crop, `in` samples, resampled to the `out` of the view.
struct Axis {
  int in, out;
  float scale;

  __device__ bool resampled() const { return in != out; }

  // Rounded to float32 by itself, as upstream does: contracted into a difference it would keep more digits.
  __device__ float position(int i) const { return __fmul_rn(scale, float(i)); }

  __device__ int clamped(int at) const { return at < 0 ? 0 : at > in - 1 ? in - 1 : at; }

  // What outputs [begin, begin + count) read.
  __device__ Span span(int begin, int count) const {
    if (!resampled()) return {begin, count};
    const int first = clamped(int(position(begin)) - 1);
    return {first, clamped(int(position(begin + count - 1)) + 2) + 1 - first};
  }

  // What output i reads: samples counted from `first`, times `stride`.
  __device__ Taps taps(int i, int first, int stride) const {
    const float at = position(i);
    const int whole = int(at);
    const float t = at - float(whole), a = -0.75f;
    const float u = 1.0f - t, t1 = t + 1.0f, u1 = u + 1.0f;
    Taps r;
    r.weight[0] = ((a * t1 - 5 * a) * t1 + 8 * a) * t1 - 4 * a;
    r.weight[1] = ((a + 2) * t - (a + 3)) * t * t + 1;
    r.weight[2] = ((a + 2) * u - (a + 3)) * u * u + 1;
    r.weight[3] = ((a * u1 - 5 * a) * u1 + 8 * a) * u1 - 4 * a;
    for (int k = 0; k < 4; ++k) r.at[k] = (clamped(whole - 1 + k) - first) * stride;
    return r;
  }
};

__device__ inline Axis make_axis(int in, int out) { return {in, out, out > 1 ? float(in - 1) / float(out - 1) : 0.0f}; }

// What a block is to do, the same for all of its threads.
struct __align__(16) AugmentPlan {
  int64_t clip;
  bool valid;        // all draws of the clip are in range
  int bin, frame;    // of the view, where the tile begins
  int bins, frames;  // of the tile
  Axis vertical, horizontal;
  Span rows, columns;                // of the crop, that the tile reads; what follows counts from their first ones
  Span rows_within, columns_within;  // the clip; the rest of the canvas is 0
  Span columns_met;                  // by the partner; empty without one
  int64_t source;                    // where row 0, column 0 would lie in mel
  int64_t partner;                   // and in what the partner is read from, the bank if it is banked, or mel
  int64_t partner_stride;            // from row to row
  bool mixed, banked;
  float alpha;
};

// Fills in the plan but for the tile's place. False if a draw of the clip is out of range: they may have been made on
// the device, where the host does not look at them.
__device__ inline bool plan_source(const AugmentArgs& a, AugmentPlan& p) {
  const int64_t* box = a.crop + 4 * p.clip;
  const int64_t i = box[0], j = box[1], h = box[2], w = box[3], who = a.partner[p.clip], start = a.start[p.clip];
  p.alpha = a.alpha[p.clip];
  const bool cut = i >= 0 && j >= 0 && h > 0 && w > 0 && h <= a.canvas_bins && w <= a.canvas_frames &&
                   i <= a.canvas_bins - h && j <= a.canvas_frames - w;
  if (!cut || who < -1 || who >= a.slots + a.clips) return false;
  p.vertical = make_axis(int(h), a.bins);
  p.horizontal = make_axis(int(w), a.frames);
  p.rows = p.vertical.span(p.bin, p.bins);
  p.columns = p.horizontal.span(p.frame, p.frames);
  const int top = (a.canvas_bins - a.bins) / 2 - int(i), left = (a.canvas_frames - a.frames) / 2 - int(j);
  p.rows_within = p.rows.part(top, top + a.bins);
  p.columns_within = p.columns.part(left, left + a.frames);
  const int64_t bin = p.rows.first - top, frame = p.columns.first - left;
  p.source = (p.clip * a.bins + bin) * a.frames + frame;

  p.mixed = who >= 0;
  p.banked = p.mixed && who < a.slots;
  p.columns_met = {0, 0};
  p.partner = p.partner_stride = 0;
  if (!p.mixed) return true;
  const int64_t width = p.banked ? a.bank_lengths[who] : a.frames;
  if (width < 1 || (p.banked && width > a.bank_frames)) return false;
  const bool shorter = width < a.frames;
  if (start < 0 || start > (shorter ? a.frames - width : width - a.frames)) return false;
  const int from = shorter ? int(start) : 0, to = shorter ? int(start + width) : a.frames;
  p.columns_met = p.columns.part(left + from, left + to);
  p.partner_stride = p.banked ? a.bank_frames : a.frames;
  p.partner = ((p.banked ? who : who - a.slots) * a.bins + bin) * p.partner_stride + frame + (shorter ? -start : start);
  return true;
}

__device__ inline void plan_tile(const AugmentArgs& a, AugmentPlan& p) {
  const unsigned tiles = unsigned(a.tile.bin_tiles) * a.tile.frame_tiles, tile = blockIdx.x % tiles;
  p.clip = blockIdx.x / tiles;
  p.bin = int(tile / a.tile.frame_tiles) * a.tile.bins;
  p.frame = int(tile % a.tile.frame_tiles) * a.tile.frames;
  p.bins = a.bins - p.bin < a.tile.bins ? a.bins - p.bin : a.tile.bins;
  p.frames = a.frames - p.frame < a.tile.frames ? a.frames - p.frame : a.tile.frames;
  p.valid = plan_source(a, p);
}

// Two columns, 32 apart, of a clip and its partner on their way into shared memory, for the rows of one warp.
struct Columns {
  const float* x;
  const float* z;
  float* out;
  int x_step, z_step, out_step;  // from row to row
  float alpha;
  bool within[2], met[2];  // columns of the clip; with a partner

  // The next kRows rows. All are loaded before one is mixed. kWhole: the partner meets both columns of every lane.
  template <bool kMixed, bool kWhole, int kRows>
  __device__ __forceinline__ void mix() {
    float own[kRows][2], other[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r, x += x_step, z += kMixed ? z_step : 0) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        own[r][k] = kWhole || within[k] ? x[32 * k] : 0.0f;
        if constexpr (kMixed) other[r][k] = kWhole || met[k] ? z[32 * k] : 0.0f;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r, out += out_step) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        constexpr float kEps = 1.1920929e-07f;
        float value = own[r][k];
        if constexpr (kMixed) {
          const float weight = kWhole || met[k] ? alpha : 0.0f;
          value = __logf(__expf(value) * (1.0f - weight) + (__expf(other[r][k]) * weight + kEps));
        }
        if (kWhole || within[k]) out[32 * k] = value;
      }
    }
  }

  template <bool kMixed, bool kWhole>
  __device__ __forceinline__ void mix(int row, int end, int warps) {
    for (; row + (kAugmentBatch - 1) * warps < end; row += kAugmentBatch * warps) mix<kMixed, kWhole, kAugmentBatch>();
    for (; row < end; row += warps) mix<kMixed, kWhole, 1>();
  }
};

// Step 1.
__device__ __forceinline__ void mix_rows(const AugmentArgs& a, const AugmentPlan& p, float* rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, stride = a.tile.stride;
  const Span within = p.columns_within, met = p.columns_met;
  const int count = p.rows.count, columns = p.columns.count, begin = p.rows_within.first, end = p.rows_within.end();
  if (p.rows_within.count < count || within.count < columns) {
    for (int row = warp; row < count; row += warps) {
#pragma unroll 1
      for (int column = lane; column < columns; column += 32) rows[row * stride + column] = 0.0f;
    }
  }
  int row = warp;  // the first of this warp's rows that lies in the clip
  while (row < begin) row += warps;
  const int64_t x = p.source + int64_t(row) * a.frames + lane, z = p.partner + row * p.partner_stride + lane;
  for (int base = 0; base < columns; base += 64) {
    Columns c{a.mel + (x + base), (p.banked ? a.bank : a.mel) + (z + base), rows + row * stride + base + lane};
    c.x_step = warps * a.frames;
    c.z_step = warps * int(p.partner_stride);
    c.out_step = warps * stride;
    c.alpha = p.alpha;
    if (met.first <= base && base + 64 <= met.end()) {
      c.mix<true, true>(row, end, warps);
      continue;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int column = base + lane + 32 * k;
      c.within[k] = column >= within.first && column < within.end();
      c.met[k] = column >= met.first && column < met.end();
    }
    if (p.mixed) {
      c.mix<true, false>(row, end, warps);
    } else {
      c.mix<false, false>(row, end, warps);
    }
  }
}

// Step 2. A warp reads all taps of a row before it writes the row's first columns.
__device__ __forceinline__ void resample_frames(const AugmentPlan& p, int stride, float* rows) {
  constexpr int kColumns = kAugmentFrames / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int count = p.rows.count, frames = p.frames;
  Taps taps[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const int column = lane + 32 * k;
    taps[k] = p.horizontal.taps(p.frame + (column < frames ? column : 0), p.columns.first, 1);
  }
  __syncwarp();
  for (int r = warp; r < count; r += warps) {
    float* row = rows + r * stride;
    float sum[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      sum[k] = 0.0f;
      for (int i = 0; i < 4; ++i) sum[k] += row[taps[k].at[i]] * taps[k].weight[i];
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (lane + 32 * k < frames) row[lane + 32 * k] = sum[k];
    }
  }
}

// Step 3. view: of the tile, its rows `pitch` apart.
__device__ __forceinline__ void write_view(const AugmentPlan& p, const Taps* taps, const float* rows, int pitch,
                                           float* view) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int bins = p.bins, frames = p.frames;
  const bool resampled = p.vertical.resampled();
  const char* column = reinterpret_cast<const char*>(rows + lane);
  float* out = view + int64_t(warp) * pitch + lane;
  for (int bin = warp; bin < bins; bin += warps, out += int64_t(warps) * pitch) {
    const Taps t = taps[bin];
    const float* q[4];
    for (int i = 0; i < 4; ++i) q[i] = reinterpret_cast<const float*>(column + t.at[i]);
#pragma unroll
    for (int k = 0; k < kAugmentFrames; k += 32) {
      if (lane + k >= frames) break;
      float value = q[1][k];
      if (resampled) {
        value = q[0][k] * t.weight[0] + value * t.weight[1] + q[2][k] * t.weight[2] + q[3][k] * t.weight[3];
      }
      out[k] = value;
    }
  }
}

// Shared memory: the plan, the taps of the tile's bins, the rows.
__global__ void __launch_bounds__(256, 5) augment_kernel(const AugmentArgs a) {
  AugmentPlan& p = *shared_memory<AugmentPlan>();
  Taps* taps = reinterpret_cast<Taps*>(&p + 1);
  float* rows = reinterpret_cast<float*>(taps + a.tile.bins);
  if (threadIdx.x == 0) plan_tile(a, p);
  __syncthreads();
  float* view = a.view + ((p.clip * a.bins + p.bin) * a.frames + p.frame);
  if (!p.valid) {
    for (int i = threadIdx.x; i < p.bins * p.frames; i += blockDim.x) {
      view[int64_t(i / p.frames) * a.frames + i % p.frames] = NAN;
    }
    return;
  }
  for (int i = threadIdx.x; i < p.bins; i += blockDim.x) {
    taps[i] = p.vertical.taps(p.bin + i, p.rows.first, a.tile.stride * sizeof(float));
  }
  mix_rows(a, p, rows);
  if (p.horizontal.resampled()) resample_frames(p, a.tile.stride, rows);
  __syncthreads();
  write_view(p, taps, rows, a.frames, view);
}

}  // namespace
}  // namespace atst
