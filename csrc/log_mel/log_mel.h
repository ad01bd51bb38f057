// Waveform to normalised log-mel, fused: frames and spectrum never reach memory.
//
// For frame t and filter m of a clip x, reflected at both ends by n_fft/2:
//   p[t, m] = sum_k fb[k, m] |sum_n window[n] x[t*hop + n - n_fft/2] e^(-2 pi i k n / n_fft)|^2
//   y[t, m] = max(10 log10 max(p, 1e-10), floor) * scale + bias,   floor = (maximum over the clip's group) - top_db
//
// Source of the maths: torchaudio's MelSpectrogram and AmplitudeToDB as audiossl/methods/atstframe/transform.py uses
// them.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace atst {

// Frames of a tile: staged together, so that a sample is converted and transposed once for all frames that contain it.
constexpr int64_t kTileFrames = 32;

// The kernel lays a tile's samples out as columns[n % hop][n / hop]: so many columns, a multiple of four.
constexpr int64_t log_mel_columns(int64_t n_fft, int64_t hop) {
  const int64_t reach = (n_fft + hop - 1) / hop;
  return (kTileFrames + reach + 3) / 4 * 4;
}

struct LogMelPlan {
  int64_t n_fft, hop, n_mels;
  const int32_t* column;  // [n_fft]: where sample n of frame 0 lies in columns
  const float* window;    // [n_fft]
  const float* twiddle;   // filled by log_mel_twiddles
  // filter m is the n_weights[m] values from weights + first_weight[m], for the bins from first_bin[m] on
  const int32_t *first_bin, *n_weights, *first_weight;
  const float* weights;
};

// One clip: `samples` valid ones of float32, or of int16 that stand for x/32768.
struct LogMelClip {
  const void* wave;
  bool is_int16;
  int64_t samples;
  int64_t frames;  // samples / hop + 1, or 0 where samples is 0
  float* out;      // [n_mels, stride]
  int64_t stride;  // frames of a row of out, >= frames
};

constexpr int64_t log_mel_twiddle_floats(int64_t n_fft) {
  const int64_t points = n_fft / 2;
  return 2 * points + 2 * 64 + 2 * (points / 2 + 1);
}
void log_mel_twiddles(int64_t n_fft, float* out);

ATST_DECLARE_SIMD(int64_t, log_mel_scratch_floats, (const LogMelPlan&))
// Decibels of the frames [tile * kTileFrames, ...) into clip.out; returns their maximum (NaN if any is NaN).
ATST_DECLARE_SIMD(float, log_mel_tile, (const LogMelPlan&, const LogMelClip&, int64_t tile, float* scratch))
// max(y, floor) * scale + bias over the clip's frames (all of them NaN if floor is), zeros past them.
ATST_DECLARE_SIMD(void, log_mel_finish, (const LogMelPlan&, const LogMelClip&, float floor, float scale, float bias))

}  // namespace atst
