// What follows the matrix products of a block: bias and GELU, bias and residual, and their gradients.
#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace atst {

// Rows of `dim` floats, one after the other in every array; `bias` has one row, and so has `dbias`, to which the sum
// over these rows is added.
ATST_DECLARE_SIMD(void, bias_gelu, (const float* h, const float* bias, float* out, int64_t rows, int64_t dim))
ATST_DECLARE_SIMD(void, bias_gelu_backward,
                  (const float* grad, const float* h, const float* bias, float* dh, float* dbias, int64_t rows,
                   int64_t dim))
ATST_DECLARE_SIMD(void, add_branch,
                  (const float* x, const float* y, const float* bias, float alpha, float* out, int64_t rows,
                   int64_t dim))
ATST_DECLARE_SIMD(void, add_branch_backward,
                  (const float* grad, float alpha, float* dy, float* dbias, int64_t rows, int64_t dim))
// sum += row 0 + row 1 + ..., in this order
ATST_DECLARE_SIMD(void, add_rows, (const float* from, float* sum, int64_t rows, int64_t dim))

}  // namespace atst
