// Elementwise passes over [rows, dim] after a matrix product, each one read and one write of every value.
//
//   bias_gelu:   out = z Phi(z), z = h + bias;             dh = grad (Phi(z) + z phi(z)),  dbias = sum of dh over rows
//   add_branch:  out = x + alpha (y + bias);               dy = alpha grad,                dbias = sum of dy over rows
//   batch_norm_relu:  out = max(c scale + bias, 0),        dx = scale (g - average) - c slope
//
// where c = x - mean, and g is grad where out > 0 (epilogue.h says what the other rows of parameters are).
//
// Phi, the normal distribution function, is 0.5 erfc(-z / sqrt 2). With t = 1 / (1 + 0.38 |z| / sqrt 2), its lower tail
// Phi(-|z|) is exp(-z^2 / 2) t P(t): what is left after the exponential is so smooth in t that a polynomial of degree 8
// (a minimax fit) is within 2e-8 of it, relative, for every z whose tail float32 can hold. The exponential is the
// density phi as well, so the gradient needs no second one. Bytes: 8 per value forward, 12 backward.
//
// The moments of a piece of rows are taken in two passes, the second out of the cache: no difference of large sums.
#include "../simd.h"
#include "epilogue.h"

namespace atst::ATST_ISA {
namespace {

struct Normal {
  vf distribution, density;
};

// 1 / x for 1 <= x < 2^100: an estimate of 14 bits and one Newton step, which is faster than dividing.
ATST_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf y = __builtin_ia32_rcp14ps512_mask(x, x, -1);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

ATST_INLINE Normal normal(vf z) {
  vf magnitude = bits_as_float(float_as_bits(z) & 0x7fffffff);
  magnitude = magnitude < 1e20f ? magnitude : splat(1e20f);  // infinity has no reciprocal; a NaN is in e as well
  const vf t = reciprocal(1.0f + magnitude * 0.268700577f);
  vf p = splat(2.943704464e-02f);
  p = p * t - 1.309046000e-01f;
  p = p * t + 1.814183742e-01f;
  p = p * t - 8.011057228e-02f;
  p = p * t + 1.145584956e-01f;
  p = p * t + 6.953150034e-02f;
  p = p * t + 1.018965989e-01f;
  p = p * t + 1.069682389e-01f;
  p = p * t + 1.072049364e-01f;
  const vf e = exp2_of_negative(z * z * -0.721347520f);  // e^(-z^2 / 2)
  const vf tail = e * (t * p);
  return {z > 0.0f ? 1.0f - tail : tail, e * 0.398942280f};
}

// f(i, n) for every piece of n = kLanes values, and once more for the n < kLanes that are left.
template <class F>
ATST_INLINE void for_lanes(int64_t dim, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) f(i, kLanes);
  if (i < dim) f(i, static_cast<int>(dim - i));
}

#define ATST_EACH [&](int64_t i, int n) __attribute__((always_inline))

// f(first row, Count<R>) for groups of R = 4 rows, and once more for the 1 to 3 that are left: what is read per column
// is read once per group.
template <int R>
struct Count {
  static constexpr int rows = R;
};

template <class F>
ATST_INLINE void for_rows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(r, Count<4>{});
  if (rows - r == 3) f(r, Count<3>{});
  if (rows - r == 2) f(r, Count<2>{});
  if (rows - r == 1) f(r, Count<1>{});
}

}  // namespace

void bias_gelu(const float* h, const float* bias, float* out, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r, h += dim, out += dim)
    for_lanes(
        dim, ATST_EACH {
          const vf z = load(h + i, n) + load(bias + i, n);
          store(out + i, z * normal(z).distribution, n);
        });
}

void bias_gelu_backward(const float* grad, const float* h, const float* bias, float* dh, float* dbias, int64_t rows,
                        int64_t dim) {
  for (int64_t r = 0; r < rows; ++r, h += dim, grad += dim, dh += dim)
    for_lanes(
        dim, ATST_EACH {
          const vf z = load(h + i, n) + load(bias + i, n);
          const Normal f = normal(z);
          const vf d = load(grad + i, n) * (f.distribution + z * f.density);
          store(dh + i, d, n);
          store(dbias + i, load(dbias + i, n) + d, n);
        });
}

void add_branch(const float* x, const float* y, const float* bias, float alpha, float* out, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r, x += dim, y += dim, out += dim)
    for_lanes(dim, ATST_EACH { store(out + i, load(x + i, n) + (load(y + i, n) + load(bias + i, n)) * alpha, n); });
}

void add_branch_backward(const float* grad, float alpha, float* dy, float* dbias, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r, grad += dim, dy += dim)
    for_lanes(
        dim, ATST_EACH {
          const vf d = load(grad + i, n) * alpha;
          store(dy + i, d, n);
          store(dbias + i, load(dbias + i, n) + d, n);
        });
}

void add_rows(const float* from, float* sum, int64_t rows, int64_t dim) {
  for_rows(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    const float* row = from + r * dim;
    for_lanes(
        dim, ATST_EACH {
          vf total = load(sum + i, n);
          for (int k = 0; k < count.rows; ++k) total += load(row + k * dim + i, n);
          store(sum + i, total, n);
        });
  });
}

void column_moments(const float* x, float* mean, float* squares, int64_t rows, int64_t dim) {
  add_rows(x, mean, rows, dim);
  const vf share = splat(1.0f / static_cast<float>(rows));
  for_lanes(dim, ATST_EACH { store(mean + i, load(mean + i, n) * share, n); });
  for_rows(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    const float* from = x + r * dim;
    for_lanes(
        dim, ATST_EACH {
          const vf m = load(mean + i, n);
          vf sum = load(squares + i, n);
          for (int k = 0; k < count.rows; ++k) {
            const vf c = load(from + k * dim + i, n) - m;
            sum = fma(c, c, sum);
          }
          store(squares + i, sum, n);
        });
  });
}

void batch_norm_relu(const float* x, const BatchNorm& p, float* out, int64_t rows, int64_t dim) {
  for_rows(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    const float* from = x + r * dim;
    float* to = out + r * dim;
    for_lanes(
        dim, ATST_EACH {
          const vf mean = load(p.mean + i, n), scale = load(p.scale + i, n), bias = load(p.bias + i, n);
          for (int k = 0; k < count.rows; ++k) {
            const vf z = fma(load(from + k * dim + i, n) - mean, scale, bias);
            store(to + k * dim + i, z <= 0.0f ? vf{} : z, n);
          }
        });
  });
}

void batch_norm_relu_sums(const float* grad, const float* x, const BatchNorm& p, float* sums, int64_t rows,
                          int64_t dim) {
  for_rows(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    const float *g = grad + r * dim, *from = x + r * dim;
    for_lanes(
        dim, ATST_EACH {
          const vf mean = load(p.mean + i, n), scale = load(p.scale + i, n), bias = load(p.bias + i, n);
          vf sum = load(sums + i, n), product = load(sums + dim + i, n);
          for (int k = 0; k < count.rows; ++k) {
            const vf c = load(from + k * dim + i, n) - mean, d = load(g + k * dim + i, n);
            const vf passed = fma(c, scale, bias) <= 0.0f ? vf{} : d;
            sum += passed;
            product = fma(passed, c, product);
          }
          store(sums + i, sum, n);
          store(sums + dim + i, product, n);
        });
  });
}

void batch_norm_relu_backward(const float* grad, const float* x, const BatchNorm& p, float* dx, int64_t rows,
                              int64_t dim) {
  for_rows(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
    const float *g = grad + r * dim, *from = x + r * dim;
    float* to = dx + r * dim;
    for_lanes(
        dim, ATST_EACH {
          const vf mean = load(p.mean + i, n), scale = load(p.scale + i, n), bias = load(p.bias + i, n);
          const vf average = load(p.average + i, n), slope = load(p.slope + i, n);
          for (int k = 0; k < count.rows; ++k) {
            const vf c = load(from + k * dim + i, n) - mean, d = load(g + k * dim + i, n);
            const vf passed = fma(c, scale, bias) <= 0.0f ? vf{} : d;
            store(to + k * dim + i, fma(passed - average, scale, -(c * slope)), n);
          }
        });
  });
}

}  // namespace atst::ATST_ISA
