// Teacher update and AdamW with the teacher update: what the boundary (ema_cpu.cpp) hands to the kernels
// (ema_simd.cpp).
#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace atst::ema {

enum class Type : int32_t { f32, bf16, f16 };

// teacher <- teacher + rest * (student - teacher) on n elements: one tensor, or a piece of one.
struct EmaItem {
  float* teacher;
  const void* student;
  int64_t n;
  Type student_type;
};

// What one group of parameters shares in one step; see adamw_ema in ema_simd.cpp for the formula.
struct AdamWStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;   // factor of exp_avg / denominator
  float root_scale;  // factor of sqrt(exp_avg_sq) before eps joins it
  float eps;
  float decay_first;  // lr * weight_decay of torch's form, else 0
  float decay_last;   // lr * weight_decay of the HuggingFace form, else 0
};

// One tensor, or a piece of one; pointers of what it does not have are null (grad: no AdamW step).
struct AdamWItem {
  float *param, *exp_avg, *exp_avg_sq, *teacher;
  const float* grad;
  uint16_t *student_shadow, *teacher_shadow;  // bfloat16
  int64_t n;
  AdamWStep step;
};

}  // namespace atst::ema

namespace atst {

ATST_DECLARE_SIMD(void, ema_update, (const ema::EmaItem& item, float rest))
ATST_DECLARE_SIMD(void, adamw_ema, (const ema::AdamWItem& item, float grad_scale, float rest, bool stream))
ATST_DECLARE_SIMD(double, sum_of_squares, (const float* x, int64_t n))

}  // namespace atst
