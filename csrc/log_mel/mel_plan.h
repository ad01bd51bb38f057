// What the CPU kernels that go from samples to mel filters are given: log_mel and kaldi_fbank.
#pragma once

#include <cstdint>

namespace atst {

// Frames of a tile: staged together, so that a sample is converted and transposed once for all frames that contain it.
constexpr int64_t kTileFrames = 32;

// The kernels lay a tile's samples out as columns[n % hop][n / hop]: so many columns, a multiple of four.
constexpr int64_t tile_columns(int64_t n_fft, int64_t hop) {
  const int64_t reach = (n_fft + hop - 1) / hop;
  return (kTileFrames + reach + 3) / 4 * 4;
}

struct MelPlan {
  int64_t n_fft, hop, n_mels;
  const int32_t* column;  // [n_fft]: where sample n of frame 0 lies in columns
  const float* window;    // [n_fft], halved (see unpack_power in spectrum.h)
  const float* twiddle;   // filled by mel_twiddles
  // filter m is the n_weights[m] values from weights + first_weight[m], for the bins from first_bin[m] on
  const int32_t *first_bin, *n_weights, *first_weight;
  const float* weights;
};

// One clip: `samples` valid ones of float32, or of int16 that stand for x/32768.
struct MelClip {
  const void* wave;
  bool is_int16;
  int64_t samples;
  int64_t frames;  // that these samples make
  float* out;
  int64_t stride;  // frames that out has room for, >= frames
};

}  // namespace atst
