#include <limits>

#include "check.h"
#include "log_mel/log_mel.h"
#include "log_mel/mel_tables.h"
#include "scratch.h"

namespace atst {
namespace {

float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }

// waveform [R, N], window [n_fft] and fb [n_fft/2+1, n_mels] -> [R, n_mels, N / hop + 1]; `group` consecutive rows
// share a floor.
Tensor log_mel(const Tensor& waveform, const Tensor& window, const Tensor& fb, const std::optional<Tensor>& lengths,
               int64_t hop, std::optional<double> top_db, double scale, double bias, int64_t group, bool decibels) {
  const char* op = "log_mel";
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
  const int64_t rows = waveform.size(0), samples = waveform.size(1), n_fft = window.size(0), n_mels = fb.size(1);
  ATST_CHECK(n_fft == 512 || n_fft == 1024 || n_fft == 2048, op, ": window must have 512, 1024 or 2048 values");
  ATST_CHECK(fb.size(0) == n_fft / 2 + 1, op, ": fb must have n_fft / 2 + 1 rows");
  ATST_CHECK(hop > 0 && hop <= n_fft, op, ": hop_length must be from 1 to n_fft");
  ATST_CHECK(group > 0 && rows % group == 0, op, ": group must divide the number of rows");
  const int64_t* valid = nullptr;
  if (lengths) {
    check_cpu(*lengths, op, "lengths");
    check_contiguous(*lengths, op, "lengths");
    check_dtype(*lengths, ScalarType::Long, op, "lengths");
    ATST_CHECK(lengths->dim() == 1 && lengths->size(0) == rows, op, ": lengths must have one entry per row");
    valid = lengths->const_data_ptr<int64_t>();
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = valid ? valid[r] : samples;
    ATST_CHECK(n <= samples && (n > n_fft / 2 || (valid && n == 0)), op, ": clip ", r, " has ", n, " samples");
  }

  const int64_t frames = samples / hop + 1;
  Tensor out = torch::stable::new_empty(waveform, {rows, n_mels, frames}, ScalarType::Float);
  if (rows == 0 || n_mels == 0) return out;
  static LatestMelTables latest;
  const auto tables = latest.of(window.const_data_ptr<float>(), n_fft, fb.const_data_ptr<float>(), n_fft, n_mels, hop);
  const MelPlan plan = tables->plan();
  const auto tile_kernel = ATST_SELECT_SIMD(log_mel_tile);
  const auto finish_kernel = ATST_SELECT_SIMD(log_mel_finish);
  const int64_t scratch_floats = ATST_SELECT_SIMD(log_mel_scratch_floats)(plan);

  const char* wave = static_cast<const char*>(waveform.const_data_ptr());
  float* result = out.mutable_data_ptr<float>();
  auto clip = [&](int64_t r) {
    const int64_t n = valid ? valid[r] : samples;
    return MelClip{wave + r * samples * (is_int16 ? 2 : 4),
                   is_int16,
                   n,
                   n ? n / hop + 1 : 0,
                   result + r * n_mels * frames,
                   frames};
  };
  const int64_t tiles = (frames + kTileFrames - 1) / kTileFrames;
  std::vector<float> top(rows * tiles, -std::numeric_limits<float>::infinity());
  auto run_tile = [&](int64_t item, float* scratch) {
    const MelClip c = clip(item / tiles);
    if (item % tiles * kTileFrames < c.frames) top[item] = tile_kernel(plan, c, decibels, item % tiles, scratch);
  };
  auto finish_group = [&](int64_t g) {
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t i = g * group * tiles; i < (g + 1) * group * tiles; ++i) highest = max_or_nan(top[i], highest);
    const float floor = top_db ? highest - float(*top_db) : -std::numeric_limits<float>::infinity();
    for (int64_t r = g * group; r < (g + 1) * group; ++r)
      finish_kernel(plan, clip(r), floor, float(scale), float(bias));
  };

  // Enough groups for the threads: each finishes what is still in its cache. Otherwise the tiles are shared out.
  const int64_t groups = rows / group, threads = torch::stable::get_num_threads();
  if (groups >= 2 * threads || threads == 1) {
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch = allocate_scratch(scratch_floats);
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t i = g * group * tiles; i < (g + 1) * group * tiles; ++i) run_tile(i, scratch.get());
        finish_group(g);
      }
    });
  } else {
    parallel_for(0, rows * tiles, 4, [&](int64_t begin, int64_t end) {
      const Scratch scratch = allocate_scratch(scratch_floats);
      for (int64_t i = begin; i < end; ++i) run_tile(i, scratch.get());
    });
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) finish_group(g);
    });
  }
  return out;
}

}  // namespace
}  // namespace atst

STABLE_TORCH_LIBRARY_IMPL(atst_fast, CPU, m) { m.impl("log_mel", TORCH_BOX(&atst::log_mel)); }
