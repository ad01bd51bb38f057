// Teacher update and AdamW with the teacher update: what the boundary (ema_cpu.cpp) hands to the kernels
// (ema_simd.cpp).
#pragma once

#include <cstdint>

#include "../dispatch.h"
#include "types.h"

namespace atst::ema {

// teacher <- teacher + rest * (student - teacher) on n elements: one tensor, or a piece of one.
struct EmaItem {
  float* teacher;
  const void* student;
  int64_t n;
  Type student_type;
};

// One tensor, or a piece of one; pointers of what it does not have are null (grad: no AdamW step).
struct AdamWItem {
  float *param, *exp_avg, *exp_avg_sq, *teacher;
  const void* grad;
  uint16_t *student_shadow, *teacher_shadow;  // bfloat16
  int64_t n;
  Type grad_type;
  AdamWStep step;
};

}  // namespace atst::ema

namespace atst {

ATST_DECLARE_SIMD(void, ema_update, (const ema::EmaItem& item, float rest))
ATST_DECLARE_SIMD(void, adamw_ema, (const ema::AdamWItem& item, float grad_scale, float rest, bool stream))
ATST_DECLARE_SIMD(double, sum_of_squares, (const void* x, int64_t n, ema::Type type))

}  // namespace atst
