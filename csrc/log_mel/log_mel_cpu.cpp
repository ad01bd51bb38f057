#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numbers>

#include "check.h"
#include "log_mel/log_mel.h"
#include "scratch.h"

namespace atst {

void log_mel_twiddles(int64_t n_fft, float* out) {
  const int64_t points = n_fft / 2, radix = points / 64;
  auto put = [&](int64_t k, int64_t n) {
    const double angle = -2.0 * std::numbers::pi * double(k) / double(n);
    *out++ = float(std::cos(angle));
    *out++ = float(std::sin(angle));
  };
  for (int64_t j = 0; j < 64; ++j)
    for (int64_t r = 0; r < radix; ++r) put(j * r, points);
  for (int64_t j = 0; j < 8; ++j)
    for (int64_t r = 0; r < 8; ++r) put(j * r, 64);
  for (int64_t k = 0; k <= points / 2; ++k) put(k, n_fft);
}

namespace {

const float* twiddles(int64_t n_fft) {
  auto make = [](int64_t n) {
    std::vector<float> t(log_mel_twiddle_floats(n));
    log_mel_twiddles(n, t.data());
    return t;
  };
  static const std::vector<float> t512 = make(512), t1024 = make(1024), t2048 = make(2048);
  return (n_fft == 512 ? t512 : n_fft == 1024 ? t1024 : t2048).data();
}

// What the kernel reads of window [n_fft], filterbank [n_bins, n_mels] and hop: the filterbank as its nonzero runs.
struct Tables {
  int64_t hop;
  std::vector<float> window, fb;  // as given, to recognise them by
  std::vector<int32_t> column, first_bin, n_weights, first_weight;
  std::vector<float> weights, half_window;

  Tables(const Tensor& window_tensor, const Tensor& fb_tensor, int64_t hop)
      : hop(hop),
        window(window_tensor.const_data_ptr<float>(), window_tensor.const_data_ptr<float>() + window_tensor.numel()),
        fb(fb_tensor.const_data_ptr<float>(), fb_tensor.const_data_ptr<float>() + fb_tensor.numel()) {
    const int64_t n_fft = window_tensor.size(0), n_bins = fb_tensor.size(0), n_mels = fb_tensor.size(1);
    first_bin.assign(n_mels, 0);
    std::vector<int32_t> end(n_mels, 0);
    for (int64_t k = 0; k < n_bins; ++k) {
      for (int64_t m = 0; m < n_mels; ++m) {
        if (fb[k * n_mels + m] == 0.0f) continue;
        if (!end[m]) first_bin[m] = int32_t(k);
        end[m] = int32_t(k + 1);
      }
    }
    for (int64_t m = 0; m < n_mels; ++m) {
      n_weights.push_back(end[m] ? end[m] - first_bin[m] : 0);
      first_weight.push_back(int32_t(weights.size()));
      for (int64_t k = first_bin[m]; k < end[m]; ++k) weights.push_back(fb[k * n_mels + m]);
    }
    const int64_t n_columns = log_mel_columns(n_fft, hop);
    for (int64_t n = 0; n < n_fft; ++n) {
      column.push_back(int32_t(n % hop * n_columns + n / hop));
      // the unpacking of the real transform halves every value: halve the window instead, which is exact
      half_window.push_back(0.5f * window[n]);
    }
  }

  bool made_from(const Tensor& window_tensor, const Tensor& fb_tensor, int64_t hop_length) const {
    auto same = [](const std::vector<float>& a, const Tensor& b) {
      return int64_t(a.size()) == b.numel() &&
             !std::memcmp(a.data(), b.const_data_ptr<float>(), a.size() * sizeof(float));
    };
    return hop == hop_length && same(window, window_tensor) && same(fb, fb_tensor);
  }

  LogMelPlan plan() const {
    return {int64_t(window.size()),    hop,
            int64_t(first_bin.size()), column.data(),
            half_window.data(),        twiddles(int64_t(window.size())),
            first_bin.data(),          n_weights.data(),
            first_weight.data(),       weights.data()};
  }
};

// The last tables are kept and recognised by their values, which takes a few microseconds; making them takes as long as
// half a second of audio.
std::shared_ptr<const Tables> tables_for(const Tensor& window, const Tensor& fb, int64_t hop) {
  static std::mutex mutex;
  static std::shared_ptr<const Tables> last;
  std::shared_ptr<const Tables> found;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    found = last;
  }
  if (found && found->made_from(window, fb, hop)) return found;
  found = std::make_shared<const Tables>(window, fb, hop);
  const std::lock_guard<std::mutex> lock(mutex);
  last = found;
  return found;
}

float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }

// waveform [R, N], window [n_fft] and fb [n_fft/2+1, n_mels] -> [R, n_mels, N / hop + 1]; `group` consecutive rows
// share a floor.
Tensor log_mel(const Tensor& waveform, const Tensor& window, const Tensor& fb, const std::optional<Tensor>& lengths,
               int64_t hop, std::optional<double> top_db, double scale, double bias, int64_t group) {
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
  const auto tables = tables_for(window, fb, hop);
  const LogMelPlan plan = tables->plan();
  const auto tile_kernel = ATST_SELECT_SIMD(log_mel_tile);
  const auto finish_kernel = ATST_SELECT_SIMD(log_mel_finish);
  const int64_t scratch_floats = ATST_SELECT_SIMD(log_mel_scratch_floats)(plan);

  const char* wave = static_cast<const char*>(waveform.const_data_ptr());
  float* result = out.mutable_data_ptr<float>();
  auto clip = [&](int64_t r) {
    const int64_t n = valid ? valid[r] : samples;
    return LogMelClip{wave + r * samples * (is_int16 ? 2 : 4),
                      is_int16,
                      n,
                      n ? n / hop + 1 : 0,
                      result + r * n_mels * frames,
                      frames};
  };
  const int64_t tiles = (frames + kTileFrames - 1) / kTileFrames;
  std::vector<float> top(rows * tiles, -std::numeric_limits<float>::infinity());
  auto run_tile = [&](int64_t item, float* scratch) {
    const LogMelClip c = clip(item / tiles);
    if (item % tiles * kTileFrames < c.frames) top[item] = tile_kernel(plan, c, item % tiles, scratch);
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
