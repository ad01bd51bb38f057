// Checks of what reaches an operator through torch.ops. The public functions in atst_fast/ops explain bad input in the
// user's words; these keep a direct call from crashing, and name the operator and the argument all the same.
#pragma once

#include "stable_shim.h"

#define ATST_CHECK(cond, ...) STD_TORCH_CHECK(cond, __VA_ARGS__)

namespace atst {

inline void check_cpu(const Tensor& t, const char* op, const char* name) {
  ATST_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* op, const char* name) {
  ATST_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
}

inline void check_contiguous(const Tensor& t, const char* op, const char* name) {
  ATST_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_dim(const Tensor& t, int64_t dim, const char* op, const char* name) {
  ATST_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " axes, got ", t.dim());
}

}  // namespace atst
