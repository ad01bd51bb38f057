// Waveform to normalised log-mel, fused: frames and spectrum never reach memory.
//
// For frame t and filter m of a clip x, reflected at both ends by n_fft/2:
//   p[t, m] = sum_k fb[k, m] |sum_n window[n] x[t*hop + n - n_fft/2] e^(-2 pi i k n / n_fft)|^2
//   y[t, m] = p[t, m] without decibels, otherwise
//   y[t, m] = max(10 log10 max(p, 1e-10), floor) * scale + bias,   floor = (maximum over the clip's group) - top_db
//
// Source of the maths: torchaudio's MelSpectrogram and AmplitudeToDB as audiossl/methods/atstframe/transform.py uses
// them.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "log_mel/mel_plan.h"

namespace atst {

ATST_DECLARE_SIMD(int64_t, log_mel_scratch_floats, (const MelPlan&))
// A clip's frames: samples / hop + 1, or 0 where samples is 0; its out is [n_mels, stride].
// Decibels (or the energies p) of the frames [tile * kTileFrames, ...) into clip.out; returns their maximum (NaN if any
// is NaN).
ATST_DECLARE_SIMD(float, log_mel_tile, (const MelPlan&, const MelClip&, bool decibels, int64_t tile, float* scratch))
// max(y, floor) * scale + bias over the clip's frames (all of them NaN if floor is), zeros past them.
ATST_DECLARE_SIMD(void, log_mel_finish, (const MelPlan&, const MelClip&, float floor, float scale, float bias))

}  // namespace atst
