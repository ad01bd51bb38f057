// One augmented view of a batch of normalised log-mel clips: mix with another clip, then crop and resize.
//   mixed = log((1 - alpha) e^x + alpha e^z + eps), z laid over x from column `start` on if it is shorter, read from
//   column `start` on if it is longer; where z does not reach, log(e^x + eps)
//   view = bicubic (A = -0.75, corners aligned) of the crop of a canvas of zeros with `mixed` in its middle
// Source: audiossl/transforms/byol_a.py (log_mixup_exp, Mixup, RandomResizeCrop).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace atst {

constexpr int64_t kAugmentColumns = 128;  // output columns of a piece of work

struct AugmentShape {
  int64_t bins, frames;                // of clip and view
  int64_t canvas_bins, canvas_frames;  // at least as large
};

struct AugmentClip {
  const float* mel;      // [bins, frames]
  const float* partner;  // [bins, partner_stride], or null: no mixing
  int64_t partner_stride, partner_frames, start;
  float alpha;                                    // weight of the partner
  int64_t first_bin, first_frame, height, width;  // the crop, in canvas coordinates
  float* view;                                    // [bins, frames]
};

ATST_DECLARE_SIMD(int64_t, augment_scratch_floats, (const AugmentShape&))
// Columns [piece * kAugmentColumns, ...) of the view.
ATST_DECLARE_SIMD(void, augment_piece, (const AugmentShape&, const AugmentClip&, int64_t piece, float* scratch))

}  // namespace atst
