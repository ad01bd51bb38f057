// What follows the matrix products of a block or a head: bias and GELU, bias and residual, batch norm and ReLU, and
// their gradients.
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

// Per column: `scale` is weight / sqrt(variance + eps). Backward only, of the gradient g behind the ReLU: `average` the
// mean of g, `slope` the mean of g (x - mean), times scale / (variance + eps).
struct BatchNorm {
  const float *mean, *scale, *bias, *average, *slope;
};
// mean and squares (the sum of squared distances from it) of these rows; both arrays come in as zeros
ATST_DECLARE_SIMD(void, column_moments, (const float* x, float* mean, float* squares, int64_t rows, int64_t dim))
ATST_DECLARE_SIMD(void, batch_norm_relu, (const float* x, const BatchNorm& p, float* out, int64_t rows, int64_t dim))
// sums += a row with the sums of g, and a row with those of g (x - mean)
ATST_DECLARE_SIMD(void, batch_norm_relu_sums,
                  (const float* grad, const float* x, const BatchNorm& p, float* sums, int64_t rows, int64_t dim))
ATST_DECLARE_SIMD(void, batch_norm_relu_backward,
                  (const float* grad, const float* x, const BatchNorm& p, float* dx, int64_t rows, int64_t dim))
// sum += row 0 + row 1 + ..., in this order
ATST_DECLARE_SIMD(void, add_rows, (const float* from, float* sum, int64_t rows, int64_t dim))

}  // namespace atst
