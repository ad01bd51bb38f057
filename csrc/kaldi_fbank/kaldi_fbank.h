// Waveform to Kaldi's log-mel filterbank, fused: frames and spectrum never reach memory.
//
// For frame t (x its W samples from t*shift on) and filter m of a clip:
//   d[n] = x[n] - mean(x) (or x[n]),   e[n] = window[n] (d[n] - preemphasis d[max(n - 1, 0)])
//   y[t, m] = ln max(sum_k fb[k, m] |sum_n e[n] e^(-2 pi i k n / n_fft)|^2, 2^-23)
//
// Source of the maths: torchaudio.compliance.kaldi.fbank.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "log_mel/mel_plan.h"

namespace atst {

struct KaldiFbankPlan {
  MelPlan mel;
  int64_t frame;  // W
  float preemphasis;
  bool remove_dc_offset;
};

constexpr float kKaldiEpsilon = 1.1920928955078125e-07f;

ATST_DECLARE_SIMD(int64_t, kaldi_fbank_scratch_floats, (const KaldiFbankPlan&))
// The rows [tile * kTileFrames, ...) of clip.out [stride, n_mels]; zeros past the clip's frames.
ATST_DECLARE_SIMD(void, kaldi_fbank_tile, (const KaldiFbankPlan&, const MelClip&, int64_t tile, float* scratch))

}  // namespace atst
