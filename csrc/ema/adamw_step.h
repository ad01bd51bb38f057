// The numbers of one AdamW step, derived in the same way on the CPU and on the GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

#if defined(__CUDACC__)
#  define ATST_HOST_DEVICE __host__ __device__
#else
#  define ATST_HOST_DEVICE
#endif

namespace atst::ema {

constexpr int kHyper = 5;  // lr, weight_decay, beta1, beta2, eps

// Position of the first of a group's numbers that is out of range, or kHyper.
ATST_HOST_DEVICE inline int first_invalid(const double* hyper) {
  const auto rate = [](double x) { return x >= 0 && x < HUGE_VAL; };
  const auto beta = [](double x) { return x >= 0 && x < 1; };
  // no loop: on a GPU the numbers are to stay in registers
  return !rate(hyper[0])   ? 0
         : !rate(hyper[1]) ? 1
         : !beta(hyper[2]) ? 2
         : !beta(hyper[3]) ? 3
         : !rate(hyper[4]) ? 4
                           : 5;
}

// Rounded here, whatever the compiler would like to fuse the product with.
ATST_HOST_DEVICE inline double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// base^t for the t-th step. By multiplications, since pow need not have the same last bit on a GPU; NaN where t is not
// a step's number. Each of the up to 2 * log2(t) products adds 2^-53 to the relative error.
ATST_HOST_DEVICE inline double power(double base, double t) {
  if (!(t >= 1 && t <= 0x1p53)) return NAN;
  auto n = static_cast<uint64_t>(t);
  if (static_cast<double>(n) != t) return NAN;
  double result = 1;
  for (; n; n >>= 1) {
    if (n & 1) result = product(result, base);
    base = product(base, base);
  }
  return result;
}

ATST_HOST_DEVICE inline AdamWStep step_of(const double* hyper, double t, bool hf) {
  const double lr = hyper[0], decay = hyper[1], beta1 = hyper[2], beta2 = hyper[3];
  const double correction1 = 1 - power(beta1, t), correction2 = sqrt(1 - power(beta2, t));
  const auto lr_decay = static_cast<float>(lr * decay);
  return {static_cast<float>(beta1),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(hf ? lr * correction2 / correction1 : lr / correction1),
          static_cast<float>(hf ? 1 : 1 / correction2),
          static_cast<float>(hyper[4]),
          hf ? 0 : lr_decay,
          hf ? lr_decay : 0};
}

}  // namespace atst::ema
