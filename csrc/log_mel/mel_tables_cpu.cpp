#include <cmath>
#include <cstring>
#include <numbers>

#include "log_mel/mel_tables.h"

namespace atst {
namespace {

// Of the first pass [64][radix], of a block of 64 points [8][8], of the unpacking [points / 2 + 1]; complex.
std::vector<float> make_twiddles(int64_t n_fft) {
  const int64_t points = n_fft / 2, radix = points / 64;
  std::vector<float> out;
  auto put = [&](int64_t k, int64_t n) {
    const double angle = -2.0 * std::numbers::pi * double(k) / double(n);
    out.push_back(float(std::cos(angle)));
    out.push_back(float(std::sin(angle)));
  };
  for (int64_t j = 0; j < 64; ++j)
    for (int64_t r = 0; r < radix; ++r) put(j * r, points);
  for (int64_t j = 0; j < 8; ++j)
    for (int64_t r = 0; r < 8; ++r) put(j * r, 64);
  for (int64_t k = 0; k <= points / 2; ++k) put(k, n_fft);
  return out;
}

const float* twiddles(int64_t n_fft) {
  static const std::vector<float> t512 = make_twiddles(512), t1024 = make_twiddles(1024), t2048 = make_twiddles(2048);
  return (n_fft == 512 ? t512 : n_fft == 1024 ? t1024 : t2048).data();
}

bool same(const std::vector<float>& a, const float* b, int64_t size) {
  return int64_t(a.size()) == size && (!size || !std::memcmp(a.data(), b, size * sizeof(float)));
}

}  // namespace

MelTables::MelTables(const float* window, int64_t window_size, const float* fb, int64_t n_fft, int64_t n_mels,
                     int64_t hop)
    : n_fft_(n_fft), hop_(hop), window_(window, window + window_size), fb_(fb, fb + (n_fft / 2 + 1) * n_mels) {
  first_bin_.assign(n_mels, 0);
  std::vector<int32_t> end(n_mels, 0);
  for (int64_t k = 0; k <= n_fft / 2; ++k) {
    for (int64_t m = 0; m < n_mels; ++m) {
      if (fb[k * n_mels + m] == 0.0f) continue;
      if (!end[m]) first_bin_[m] = int32_t(k);
      end[m] = int32_t(k + 1);
    }
  }
  for (int64_t m = 0; m < n_mels; ++m) {
    n_weights_.push_back(end[m] ? end[m] - first_bin_[m] : 0);
    first_weight_.push_back(int32_t(weights_.size()));
    for (int64_t k = first_bin_[m]; k < end[m]; ++k) weights_.push_back(fb[k * n_mels + m]);
  }
  const int64_t n_columns = tile_columns(n_fft, hop);
  for (int64_t n = 0; n < n_fft; ++n) {
    column_.push_back(int32_t(n % hop * n_columns + n / hop));
    // the unpacking of the real transform halves every value: halve the window instead, which is exact
    half_window_.push_back(n < window_size ? 0.5f * window[n] : 0.0f);
  }
}

bool MelTables::made_from(const float* window, int64_t window_size, const float* fb, int64_t n_fft, int64_t n_mels,
                          int64_t hop) const {
  return n_fft_ == n_fft && hop_ == hop && int64_t(first_bin_.size()) == n_mels && same(window_, window, window_size) &&
         same(fb_, fb, (n_fft / 2 + 1) * n_mels);
}

MelPlan MelTables::plan() const {
  return {n_fft_,
          hop_,
          int64_t(first_bin_.size()),
          column_.data(),
          half_window_.data(),
          twiddles(n_fft_),
          first_bin_.data(),
          n_weights_.data(),
          first_weight_.data(),
          weights_.data()};
}

std::shared_ptr<const MelTables> LatestMelTables::of(const float* window, int64_t window_size, const float* fb,
                                                     int64_t n_fft, int64_t n_mels, int64_t hop) {
  std::shared_ptr<const MelTables> found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    found = last_;
  }
  if (found && found->made_from(window, window_size, fb, n_fft, n_mels, hop)) return found;
  found = std::make_shared<const MelTables>(window, window_size, fb, n_fft, n_mels, hop);
  const std::lock_guard<std::mutex> lock(mutex_);
  last_ = found;
  return found;
}

}  // namespace atst
