#include "check.h"
#include "kaldi_fbank/kaldi_fbank.h"
#include "log_mel/mel_tables.h"
#include "scratch.h"

namespace atst {
namespace {

// waveform [R, N], window [W] and fb [n_fft/2+1, n_mels] -> [R, (N - W) / shift + 1, n_mels]
Tensor kaldi_fbank(const Tensor& waveform, const Tensor& window, const Tensor& fb, const std::optional<Tensor>& lengths,
                   int64_t shift, double preemphasis, bool remove_dc_offset) {
  const char* op = "kaldi_fbank";
  const bool is_int16 = waveform.scalar_type() == ScalarType::Short;
  ATST_CHECK(is_int16 || waveform.scalar_type() == ScalarType::Float, op, ": waveform must be float32 or int16");
  check_dim(waveform, 2, op, "waveform");
  check_dim(window, 1, op, "window");
  check_dim(fb, 2, op, "fb");
  for (auto [t, name] : {std::pair{&waveform, "waveform"}, {&window, "window"}, {&fb, "fb"}}) {
    check_cpu(*t, op, name);
    check_contiguous(*t, op, name);
  }
  check_dtype(window, ScalarType::Float, op, "window");
  check_dtype(fb, ScalarType::Float, op, "fb");
  const int64_t rows = waveform.size(0), samples = waveform.size(1), frame = window.size(0), n_mels = fb.size(1);
  const int64_t n_fft = 2 * (fb.size(0) - 1);
  ATST_CHECK(n_fft == 512 || n_fft == 1024 || n_fft == 2048, op, ": fb must have 257, 513 or 1025 rows");
  ATST_CHECK(frame >= 1 && frame <= n_fft, op, ": window must have from 1 to n_fft values");
  ATST_CHECK(shift >= 1 && shift <= frame, op, ": frame_shift must be from 1 to the window's length");
  ATST_CHECK(samples >= frame, op, ": waveform must have at least one frame of samples");
  const int64_t* valid = nullptr;
  if (lengths) {
    check_cpu(*lengths, op, "lengths");
    check_contiguous(*lengths, op, "lengths");
    check_dtype(*lengths, ScalarType::Long, op, "lengths");
    ATST_CHECK(lengths->dim() == 1 && lengths->size(0) == rows, op, ": lengths must have one entry per row");
    valid = lengths->const_data_ptr<int64_t>();
    for (int64_t r = 0; r < rows; ++r)
      ATST_CHECK(valid[r] >= 0 && valid[r] <= samples, op, ": clip ", r, " has ", valid[r], " samples");
  }

  const int64_t frames = (samples - frame) / shift + 1;
  Tensor out = torch::stable::new_empty(waveform, {rows, frames, n_mels}, ScalarType::Float);
  if (rows == 0 || n_mels == 0) return out;
  static LatestMelTables latest;
  const auto tables =
      latest.of(window.const_data_ptr<float>(), frame, fb.const_data_ptr<float>(), n_fft, n_mels, shift);
  const KaldiFbankPlan plan{tables->plan(), frame, float(preemphasis), remove_dc_offset};
  const auto tile_kernel = ATST_SELECT_SIMD(kaldi_fbank_tile);
  const int64_t scratch_floats = ATST_SELECT_SIMD(kaldi_fbank_scratch_floats)(plan);

  const char* wave = static_cast<const char*>(waveform.const_data_ptr());
  float* result = out.mutable_data_ptr<float>();
  const int64_t tiles = (frames + kTileFrames - 1) / kTileFrames;
  parallel_for(0, rows * tiles, 4, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate_scratch(scratch_floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / tiles, n = valid ? valid[r] : samples;
      const MelClip clip{wave + r * samples * (is_int16 ? 2 : 4),
                         is_int16,
                         n,
                         n < frame ? 0 : (n - frame) / shift + 1,
                         result + r * frames * n_mels,
                         frames};
      tile_kernel(plan, clip, i % tiles, scratch.get());
    }
  });
  return out;
}

}  // namespace
}  // namespace atst

STABLE_TORCH_LIBRARY_IMPL(atst_fast, CPU, m) { m.impl("kaldi_fbank", TORCH_BOX(&atst::kaldi_fbank)); }
