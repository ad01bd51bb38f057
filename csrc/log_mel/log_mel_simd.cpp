// The transform and the sums are in spectrum.h; here are window, decibels and floor.
#include "log_mel/log_mel.h"
#include "log_mel/spectrum.h"
#include "simd.h"

namespace atst::ATST_ISA {
namespace {

constexpr float kDbPerNeper = 4.34294481903251827651f;  // 10 / ln 10

struct Windowed {
  const MelPlan& plan;
  const float* columns;  // of the first of kLanes frames
  ATST_INLINE Complex operator()(int64_t n) const {
    return {load(columns + plan.column[n]) * plan.window[n], load(columns + plan.column[n + 1]) * plan.window[n + 1]};
  }
};

ATST_INLINE vf to_decibels(vf energy) { return log(max_nan(energy, splat(1e-10f))) * kDbPerNeper; }

}  // namespace

int64_t log_mel_scratch_floats(const MelPlan& plan) { return scratch_floats(plan); }

float log_mel_tile(const MelPlan& plan, const MelClip& clip, bool decibels, int64_t tile, float* memory) {
  const Scratch s = carve(plan, memory);
  const int64_t t0 = tile * kTileFrames;
  make_columns(plan, clip, t0 * plan.hop - plan.n_fft / 2, s);
  vf lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const vf none = splat(-__builtin_inff());
  vf top = none;
  for (int64_t lane0 = 0; lane0 < kTileFrames && t0 + lane0 < clip.frames; lane0 += kLanes) {
    powers(plan, s, Windowed{plan, s.columns + lane0});
    const int64_t t = t0 + lane0, left = clip.frames - t;
    for (int64_t m = 0; m < plan.n_mels; ++m) {
      const vf energy = mel_sum(plan, s.power, m), db = decibels ? to_decibels(energy) : energy;
      float* out = clip.out + m * clip.stride + t;
      if (left >= kLanes) {
        store(out, db);
        top = max_nan(db, top);
      } else {
        for (int64_t i = 0; i < left; ++i) out[i] = db[i];
        top = max_nan(lane < splat(left) ? db : none, top);
      }
    }
  }
  float result = top[0];
  for (int i = 1; i < kLanes; ++i) result = !(top[i] <= result) ? (result != result ? result : top[i]) : result;
  return result;
}

void log_mel_finish(const MelPlan& plan, const MelClip& clip, float floor, float scale, float bias) {
  for (int64_t m = 0; m < plan.n_mels; ++m) {
    float* row = clip.out + m * clip.stride;
    int64_t t = 0;
    for (; t + kLanes <= clip.frames; t += kLanes) store(row + t, max_nan(splat(floor), load(row + t)) * scale + bias);
    for (; t < clip.frames; ++t) {
      const float y = floor != floor || row[t] < floor ? floor : row[t];
      row[t] = y * scale + bias;
    }
    for (; t < clip.stride; ++t) row[t] = 0.0f;
  }
}

}  // namespace atst::ATST_ISA
