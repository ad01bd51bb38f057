// The transform and the sums are those of log_mel (log_mel/spectrum.h). What is Kaldi's happens while the first pass
// loads its samples: one more load per pair (the sample before), a subtraction each and two fused multiply-adds. The
// mean is a pass over the W columns before that, 400 loads and additions for kLanes frames at 16 kHz. Samples past the
// frame are zeros that are not loaded: there lie other frames' samples, which may be NaN.
#include "kaldi_fbank/kaldi_fbank.h"
#include "log_mel/spectrum.h"
#include "simd.h"

namespace atst::ATST_ISA {
namespace {

struct Preemphasised {
  const KaldiFbankPlan& plan;
  const float* columns;  // of the first of kLanes frames
  vf mean;
  ATST_INLINE vf centred(int64_t n) const { return load(columns + plan.mel.column[n]) - mean; }
  ATST_INLINE Complex operator()(int64_t n) const {
    if (n >= plan.frame) return {vf{}, vf{}};
    const vf factor = splat(-plan.preemphasis), here = centred(n);
    Complex z = {fma(factor, n ? centred(n - 1) : here, here) * plan.mel.window[n], vf{}};
    if (n + 1 < plan.frame) z.im = fma(factor, here, centred(n + 1)) * plan.mel.window[n + 1];
    return z;
  }
};

vf mean_of(const KaldiFbankPlan& plan, const float* columns) {
  vf sum[8] = {};
  int64_t n = 0;
  for (; n + 8 <= plan.frame; n += 8)
    for (int j = 0; j < 8; ++j) sum[j] += load(columns + plan.mel.column[n + j]);
  for (; n < plan.frame; ++n) sum[0] += load(columns + plan.mel.column[n]);
  const vf total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  return total / splat(float(plan.frame));
}

// Four neighbouring filters of kLanes frames: a row of out is a frame.
ATST_INLINE void store_four(const vf* y, float* out, int64_t n_mels) {
  const Quads q = transpose_quads(y[0], y[1], y[2], y[3]);
  store_part<0>(q, out, n_mels);
  store_part<1>(q, out + 4 * n_mels, n_mels);
  store_part<2>(q, out + 8 * n_mels, n_mels);
  store_part<3>(q, out + 12 * n_mels, n_mels);
}

}  // namespace

int64_t kaldi_fbank_scratch_floats(const KaldiFbankPlan& plan) { return scratch_floats(plan.mel); }

void kaldi_fbank_tile(const KaldiFbankPlan& plan, const MelClip& clip, int64_t tile, float* memory) {
  const MelPlan& mel = plan.mel;
  const int64_t n_mels = mel.n_mels, t0 = tile * kTileFrames;
  const int64_t end = t0 + kTileFrames < clip.stride ? t0 + kTileFrames : clip.stride;
  const int64_t valid = clip.frames < end ? (clip.frames > t0 ? clip.frames : t0) : end;
  if (valid > t0) {
    const Scratch s = carve(mel, memory);
    make_columns(mel, clip, t0 * mel.hop, s);
    for (int64_t t = t0; t < valid; t += kLanes) {
      const float* columns = s.columns + (t - t0);
      powers(mel, s, Preemphasised{plan, columns, plan.remove_dc_offset ? mean_of(plan, columns) : vf{}});
      const int64_t left = valid - t;
      for (int64_t m = 0; m < n_mels; m += 4) {
        vf y[4] = {};
        for (int64_t j = 0; j < 4 && m + j < n_mels; ++j)
          y[j] = log(max_nan(mel_sum(mel, s.power, m + j), splat(kKaldiEpsilon)));
        float* out = clip.out + t * n_mels + m;
        if (left >= kLanes && m + 4 <= n_mels) {
          store_four(y, out, n_mels);
        } else {
          for (int64_t j = 0; j < 4 && m + j < n_mels; ++j)
            for (int64_t i = 0; i < kLanes && i < left; ++i) out[i * n_mels + j] = y[j][i];
        }
      }
    }
  }
  for (int64_t i = valid * n_mels; i < end * n_mels; ++i) clip.out[i] = 0.0f;
}

}  // namespace atst::ATST_ISA
