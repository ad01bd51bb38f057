// What the kernels of the CPU and those of the GPU have in common.
#pragma once

#include <cstdint>

namespace atst::ema {

enum class Type : uint8_t { f32, bf16, f16 };

// What one group of parameters shares in one step; see adamw_ema in ema_simd.cpp for the formula.
struct AdamWStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;   // factor of exp_avg / denominator
  float root_scale;  // factor of sqrt(exp_avg_sq) before eps joins it
  float eps;
  float decay_first;  // lr * weight_decay of torch's form, else 0
  float decay_last;   // lr * weight_decay of the HuggingFace form, else 0
};

}  // namespace atst::ema
