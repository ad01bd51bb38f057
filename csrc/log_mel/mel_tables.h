// The tables that a MelPlan points to, made of a window and a dense filterbank.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "log_mel/mel_plan.h"

namespace atst {

class MelTables {
 public:
  // window [window_size], followed by zeros up to n_fft; fb [n_fft / 2 + 1, n_mels]
  MelTables(const float* window, int64_t window_size, const float* fb, int64_t n_fft, int64_t n_mels, int64_t hop);
  bool made_from(const float* window, int64_t window_size, const float* fb, int64_t n_fft, int64_t n_mels,
                 int64_t hop) const;
  MelPlan plan() const;

 private:
  int64_t n_fft_, hop_;
  std::vector<float> window_, fb_;                                      // as given, to recognise them by
  std::vector<int32_t> column_, first_bin_, n_weights_, first_weight_;  // the filterbank as its nonzero runs
  std::vector<float> weights_, half_window_;
};

// An operator's last tables, kept and recognised by their values, which takes a few microseconds; making them takes as
// long as half a second of audio.
class LatestMelTables {
 public:
  std::shared_ptr<const MelTables> of(const float* window, int64_t window_size, const float* fb, int64_t n_fft,
                                      int64_t n_mels, int64_t hop);

 private:
  std::mutex mutex_;
  std::shared_ptr<const MelTables> last_;
};

}  // namespace atst
