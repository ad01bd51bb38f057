// A piece of work is a block of output columns: the source columns that it reads are mixed once into scratch (two
// exponentials and a logarithm a value, about 35 vector operations), resampled in time if the crop is not as wide as
// the view, then in frequency, four rows to one. One read of clip and partner, one write of the view.
#include "augment/augment.h"
#include "simd.h"

namespace atst::ATST_ISA {
namespace {

constexpr float kEps = 1.1920929e-07f;  // of float32, as upstream

struct Taps {
  int64_t at[4];
  float weight[4];
};

// Rounded to float32 here and now: a product that is contracted into what it is used in keeps more digits than
// upstream's.
ATST_INLINE float rounded(float x) {
  __asm__("" : "+m"(x));
  return x;
}

// Where output `i` of `out` reads among `in` samples, indices clamped to them.
ATST_INLINE Taps taps(int64_t i, int64_t in, int64_t out) {
  const float scale = out > 1 ? float(in - 1) / float(out - 1) : 0.0f;
  const float position = rounded(scale * float(i));
  const int64_t whole = int64_t(position);
  const float t = position - float(whole), a = -0.75f;
  const float u = 1.0f - t, t1 = t + 1.0f, u1 = u + 1.0f;
  Taps r;
  r.weight[0] = ((a * t1 - 5 * a) * t1 + 8 * a) * t1 - 4 * a;
  r.weight[1] = ((a + 2) * t - (a + 3)) * t * t + 1;
  r.weight[2] = ((a + 2) * u - (a + 3)) * u * u + 1;
  r.weight[3] = ((a * u1 - 5 * a) * u1 + 8 * a) * u1 - 4 * a;
  for (int k = 0; k < 4; ++k) {
    const int64_t at = whole - 1 + k;
    r.at[k] = at < 0 ? 0 : at > in - 1 ? in - 1 : at;
  }
  return r;
}

// out = log((1 - alpha) e^x + alpha e^z + eps), without z log(e^x + eps)
void mix(const float* x, const float* z, float alpha, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    vf sum = exp(load(x + i, n - i));
    if (z) sum = sum * (1.0f - alpha) + exp(load(z + i, n - i)) * alpha;
    store(out + i, log(sum + kEps), n - i);
  }
}

ATST_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Columns [begin, end) of row `bin` of the clip after mixing.
void mixed_row(const AugmentClip& clip, int64_t frames, int64_t bin, int64_t begin, int64_t end, float* out) {
  const float* x = clip.mel + bin * frames;
  if (!clip.partner) {
    __builtin_memcpy(out, x + begin, (end - begin) * sizeof(float));
    return;
  }
  const float* z = clip.partner + bin * clip.partner_stride;
  if (clip.partner_frames >= frames) {
    mix(x + begin, z + clip.start + begin, clip.alpha, end - begin, out);
    return;
  }
  const int64_t from = clamp(clip.start, begin, end), to = clamp(clip.start + clip.partner_frames, from, end);
  mix(x + begin, nullptr, 0.0f, from - begin, out);
  mix(x + from, z + from - clip.start, clip.alpha, to - from, out + from - begin);
  mix(x + to, nullptr, 0.0f, end - to, out + to - begin);
}

// Columns [begin, end) of row `bin` of the canvas.
void canvas_row(const AugmentShape& s, const AugmentClip& clip, int64_t bin, int64_t begin, int64_t end, float* out) {
  const int64_t top = (s.canvas_bins - s.bins) / 2, left = (s.canvas_frames - s.frames) / 2;
  const int64_t from = clamp(left, begin, end), to = clamp(left + s.frames, from, end);
  if (bin < top || bin >= top + s.bins || from == to) {
    __builtin_memset(out, 0, (end - begin) * sizeof(float));
    return;
  }
  __builtin_memset(out, 0, (from - begin) * sizeof(float));
  mixed_row(clip, s.frames, bin - top, from - left, to - left, out + from - begin);
  __builtin_memset(out + to - begin, 0, (end - to) * sizeof(float));
}

// Most source columns that a block of output columns can read.
int64_t source_columns(const AugmentShape& s) { return kAugmentColumns * s.canvas_frames / s.frames + 8; }

}  // namespace

int64_t augment_scratch_floats(const AugmentShape& s) {
  return s.canvas_bins * kAugmentColumns + source_columns(s) + kLanes;
}

void augment_piece(const AugmentShape& s, const AugmentClip& clip, int64_t piece, float* scratch) {
  const int64_t begin = piece * kAugmentColumns;
  const int64_t end = begin + kAugmentColumns < s.frames ? begin + kAugmentColumns : s.frames, columns = end - begin;
  float* rows = scratch;                                   // [height, kAugmentColumns]
  float* source = rows + s.canvas_bins * kAugmentColumns;  // one row before it is resampled in time
  const bool resampled = clip.width != s.frames;
  const int64_t first = resampled ? taps(begin, clip.width, s.frames).at[0] : begin;
  const int64_t last = resampled ? taps(end - 1, clip.width, s.frames).at[3] + 1 : end;
  for (int64_t r = 0; r < clip.height; ++r) {
    float* row = rows + r * kAugmentColumns;
    canvas_row(s, clip, clip.first_bin + r, clip.first_frame + first, clip.first_frame + last,
               resampled ? source : row);
    for (int64_t c = 0; resampled && c < columns; ++c) {
      const Taps t = taps(begin + c, clip.width, s.frames);
      float sum = 0.0f;
      for (int k = 0; k < 4; ++k) sum += source[t.at[k] - first] * t.weight[k];
      row[c] = sum;
    }
  }
  for (int64_t bin = 0; bin < s.bins; ++bin) {
    const Taps t = taps(bin, clip.height, s.bins);
    float* out = clip.view + bin * s.frames + begin;
    if (clip.height == s.bins) {
      __builtin_memcpy(out, rows + bin * kAugmentColumns, columns * sizeof(float));
      continue;
    }
    for (int64_t c = 0; c < columns; c += kLanes) {
      vf sum = {};
      for (int k = 0; k < 4; ++k) sum += load(rows + t.at[k] * kAugmentColumns + c, columns - c) * t.weight[k];
      store(out + c, sum, columns - c);
    }
  }
}

}  // namespace atst::ATST_ISA
