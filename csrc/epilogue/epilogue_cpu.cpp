// The boundary of bias_gelu, add_branch and batch_norm_relu: checks, then pieces of rows shared out among the threads.
#include <algorithm>
#include <cmath>

#include "../check.h"
#include "epilogue.h"

namespace atst {
namespace {

// Rows per piece of work. Sums over rows are made per piece and then added up in order: the bits do not depend on the
// number of threads.
constexpr int64_t kRows = 32;

int64_t pieces_of(int64_t rows) { return (rows + kRows - 1) / kRows; }
int64_t rows_of_piece(int64_t i, int64_t rows) { return std::min(kRows, rows - i * kRows); }

const float* input(const Tensor& t, const char* op, const char* name) {
  check_cpu(t, op, name);
  check_dtype(t, ScalarType::Float, op, name);
  check_contiguous(t, op, name);
  return t.const_data_ptr<float>();
}

int64_t last_axis(const Tensor& t, const char* op, const char* name) {
  ATST_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) > 0, op, ": ", name, " must have a last axis with elements");
  return t.size(t.dim() - 1);
}

const float* row_of(const Tensor& t, int64_t dim, const char* op, const char* name) {
  const float* row = input(t, op, name);
  ATST_CHECK(t.dim() == 1 && t.size(0) == dim, op, ": ", name, " must have the size of the last axis");
  return row;
}

// run(first row, rows, index of the piece)
template <class Run>
void for_pieces(int64_t rows, const Run& run) {
  parallel_for(0, pieces_of(rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i * kRows, rows_of_piece(i, rows), i);
  });
}

// The sum over all rows, of `width` values, by way of a partial sum per piece: run(first row, rows, partial sum to add
// to).
template <class Run>
Tensor sum_over_rows(const Tensor& like, int64_t rows, int64_t width, const Run& run) {
  Tensor parts = torch::stable::new_zeros(like, {pieces_of(rows), width});
  Tensor sum = torch::stable::new_zeros(like, {width});
  float* part = parts.mutable_data_ptr<float>();
  for_pieces(rows, [&](int64_t r, int64_t n, int64_t i) { run(r, n, part + i * width); });
  ATST_SELECT_SIMD(add_rows)(part, sum.mutable_data_ptr<float>(), pieces_of(rows), width);
  return sum;
}

// Items (clips) of `rows` rows each; those of the branch are the items `kept` of the residual stream, or all of them.
struct Items {
  int64_t rows, branch;
  std::vector<int64_t> kept;     // the item of the stream of each item of the branch; empty: the same
  std::vector<int64_t> to_kept;  // the item of the branch of each item of the stream, or -1; empty: the same

  int64_t in_stream(int64_t item) const { return kept.empty() ? item : kept[item]; }
  int64_t in_branch(int64_t item) const { return to_kept.empty() ? item : to_kept[item]; }

  // run(item, row within it, rows) for the stretches of [row, row + count) that lie in one item.
  template <class Run>
  void stretches(int64_t row, int64_t count, const Run& run) const {
    while (count > 0) {
      const int64_t first = row % rows, n = std::min(count, rows - first);
      run(row / rows, first, n);
      row += n, count -= n;
    }
  }
};

Items make_items(const Tensor& stream, int64_t dim, const std::optional<Tensor>& kept, const char* op) {
  const int64_t total = stream.numel() / dim, count = stream.dim() == 1 ? 1 : stream.size(0);
  Items items{count ? total / count : 0, count, {}, {}};
  if (!kept) return items;
  check_cpu(*kept, op, "kept");
  check_dtype(*kept, ScalarType::Long, op, "kept");
  check_contiguous(*kept, op, "kept");
  ATST_CHECK(kept->dim() == 1 && stream.dim() > 1, op, ": kept must be [K], items of the first of several axes");
  const auto* k = kept->const_data_ptr<int64_t>();
  items.branch = kept->size(0);
  items.to_kept.assign(count, -1);
  for (int64_t i = 0; i < items.branch; ++i) {
    ATST_CHECK(k[i] >= 0 && k[i] < count, op, ": kept[", i, "] = ", k[i], " is not from 0 to ", count - 1);
    ATST_CHECK(items.to_kept[k[i]] < 0, op, ": kept must not name an item twice");
    items.to_kept[k[i]] = i;
    items.kept.push_back(k[i]);
  }
  return items;
}

Tensor bias_gelu(Tensor h, Tensor bias) {
  const char* op = "bias_gelu";
  const float* from = input(h, op, "h");
  const int64_t dim = last_axis(h, op, "h");
  const float* b = row_of(bias, dim, op, "bias");
  Tensor out = torch::stable::empty_like(h);
  float* to = out.mutable_data_ptr<float>();
  const auto run = ATST_SELECT_SIMD(bias_gelu);
  for_pieces(h.numel() / dim, [&](int64_t r, int64_t n, int64_t) { run(from + r * dim, b, to + r * dim, n, dim); });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor h, Tensor bias) {
  const char* op = "bias_gelu_backward";
  const float *g = input(grad, op, "grad"), *from = input(h, op, "h");
  const int64_t dim = last_axis(h, op, "h");
  const float* b = row_of(bias, dim, op, "bias");
  ATST_CHECK(grad.sizes().equals(h.sizes()), op, ": grad must have the shape of h");
  Tensor dh = torch::stable::empty_like(h);
  float* to = dh.mutable_data_ptr<float>();
  const auto run = ATST_SELECT_SIMD(bias_gelu_backward);
  Tensor dbias = sum_over_rows(h, h.numel() / dim, dim, [&](int64_t r, int64_t n, float* part) {
    run(g + r * dim, from + r * dim, b, to + r * dim, part, n, dim);
  });
  return {dh, dbias};
}

// A factor per item is a GPU's way to drop samples: the public functions run the reference for it on a CPU.
void check_no_scale(const std::optional<Tensor>& scale, const char* op) {
  ATST_CHECK(!scale, op, ": scale has no kernel on a CPU");
}

Tensor add_branch(Tensor x, Tensor y, Tensor bias, double alpha, std::optional<Tensor> kept,
                  std::optional<Tensor> scale) {
  const char* op = "add_branch";
  check_no_scale(scale, op);
  const float *base = input(x, op, "x"), *from = input(y, op, "y");
  const int64_t dim = last_axis(x, op, "x");
  const float* b = row_of(bias, dim, op, "bias");
  const Items items = make_items(x, dim, kept, op);
  ATST_CHECK(last_axis(y, op, "y") == dim && y.numel() == items.branch * items.rows * dim && y.dim() == x.dim(), op,
             ": y must have the shape of the kept part of x");
  Tensor out = torch::stable::empty_like(x);
  float* to = out.mutable_data_ptr<float>();
  const auto run = ATST_SELECT_SIMD(add_branch);
  for_pieces(x.numel() / dim, [&](int64_t r, int64_t n, int64_t) {
    items.stretches(r, n, [&](int64_t item, int64_t row, int64_t count) {
      const int64_t at = (item * items.rows + row) * dim, source = items.in_branch(item);
      if (source < 0)
        std::copy_n(base + at, count * dim, to + at);
      else
        run(base + at, from + (source * items.rows + row) * dim, b, static_cast<float>(alpha), to + at, count, dim);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> add_branch_backward(Tensor grad, double alpha, std::optional<Tensor> kept,
                                               std::optional<Tensor> scale) {
  const char* op = "add_branch_backward";
  check_no_scale(scale, op);
  const float* g = input(grad, op, "grad");
  const int64_t dim = last_axis(grad, op, "grad");
  const Items items = make_items(grad, dim, kept, op);
  std::vector<int64_t> shape(grad.sizes().begin(), grad.sizes().end());
  if (kept) shape[0] = items.branch;
  Tensor dy = torch::stable::new_empty(grad, shape);
  float* to = dy.mutable_data_ptr<float>();
  const auto run = ATST_SELECT_SIMD(add_branch_backward);
  Tensor dbias = sum_over_rows(grad, items.branch * items.rows, dim, [&](int64_t r, int64_t n, float* part) {
    items.stretches(r, n, [&](int64_t item, int64_t row, int64_t count) {
      run(g + (items.in_stream(item) * items.rows + row) * dim, static_cast<float>(alpha),
          to + (item * items.rows + row) * dim, part, count, dim);
    });
  });
  return {dy, dbias};
}

// Mean and biased variance of each column, from those of the pieces.
std::tuple<Tensor, Tensor> column_moments(const Tensor& x, int64_t rows, int64_t dim) {
  const int64_t pieces = pieces_of(rows);
  Tensor parts = torch::stable::new_zeros(x, {pieces, 2, dim});
  float* part = parts.mutable_data_ptr<float>();
  const float* from = x.const_data_ptr<float>();
  const auto run = ATST_SELECT_SIMD(column_moments);
  for_pieces(rows, [&](int64_t r, int64_t n, int64_t i) {
    run(from + r * dim, part + 2 * i * dim, part + (2 * i + 1) * dim, n, dim);
  });
  Tensor mean = torch::stable::new_empty(x, {dim}), variance = torch::stable::new_empty(x, {dim});
  float *m = mean.mutable_data_ptr<float>(), *v = variance.mutable_data_ptr<float>();
  std::vector<double> sum(dim), squares(dim);
  for (int64_t i = 0; i < pieces; ++i)
    for (int64_t j = 0; j < dim; ++j) sum[j] += double(part[2 * i * dim + j]) * double(rows_of_piece(i, rows));
  for (int64_t j = 0; j < dim; ++j) sum[j] /= double(rows);
  for (int64_t i = 0; i < pieces; ++i)
    for (int64_t j = 0; j < dim; ++j) {
      const double off = part[2 * i * dim + j] - sum[j];
      squares[j] += part[(2 * i + 1) * dim + j] + off * off * double(rows_of_piece(i, rows));
    }
  for (int64_t j = 0; j < dim; ++j) m[j] = float(sum[j]), v[j] = float(squares[j] / double(rows));
  return {mean, variance};
}

// The rows of batch_norm_relu's parameters that its kernels read, and what they are computed into.
struct Columns {
  std::vector<float> scale, average, slope;
  BatchNorm p;

  Columns(const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias, double eps, int64_t dim,
          const char* op)
      : scale(dim), p{row_of(mean, dim, op, "mean"), scale.data(), row_of(bias, dim, op, "bias"), nullptr, nullptr} {
    const float *v = row_of(variance, dim, op, "variance"), *w = row_of(weight, dim, op, "weight");
    for (int64_t j = 0; j < dim; ++j) scale[j] = float(w[j] / std::sqrt(v[j] + eps));
  }
  Columns(const Columns&) = delete;
};

int64_t check_batch(const Tensor& x, const char* op) {
  input(x, op, "x");
  check_dim(x, 2, op, "x");
  ATST_CHECK(x.size(0) > 1, op, ": x must have at least 2 rows to take the variance of, got ", x.size(0));
  return last_axis(x, op, "x");
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(Tensor x, Tensor weight, Tensor bias, double eps) {
  const char* op = "batch_norm_relu";
  const int64_t dim = check_batch(x, op);
  auto [mean, variance] = column_moments(x, x.size(0), dim);
  const Columns columns(mean, variance, weight, bias, eps, dim, op);
  Tensor out = torch::stable::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const auto run = ATST_SELECT_SIMD(batch_norm_relu);
  for_pieces(x.size(0), [&](int64_t r, int64_t n, int64_t) { run(from + r * dim, columns.p, to + r * dim, n, dim); });
  return {out, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(Tensor grad, Tensor x, Tensor mean, Tensor variance,
                                                            Tensor weight, Tensor bias, double eps) {
  const char* op = "batch_norm_relu_backward";
  const int64_t dim = check_batch(x, op), rows = x.size(0);
  const float *g = input(grad, op, "grad"), *from = x.const_data_ptr<float>();
  ATST_CHECK(grad.sizes().equals(x.sizes()), op, ": grad must have the shape of x");
  Columns columns(mean, variance, weight, bias, eps, dim, op);
  const auto add = ATST_SELECT_SIMD(batch_norm_relu_sums);
  Tensor sums = sum_over_rows(x, rows, 2 * dim, [&](int64_t r, int64_t n, float* part) {
    add(g + r * dim, from + r * dim, columns.p, part, n, dim);
  });
  Tensor dweight = torch::stable::new_empty(x, {dim}), dbias = torch::stable::new_empty(x, {dim});
  float *dw = dweight.mutable_data_ptr<float>(), *db = dbias.mutable_data_ptr<float>();
  const float *sum = sums.const_data_ptr<float>(), *v = variance.const_data_ptr<float>();
  columns.average.resize(dim), columns.slope.resize(dim);
  for (int64_t j = 0; j < dim; ++j) {
    const double precision = 1 / (v[j] + eps), product = sum[dim + j];
    dw[j] = float(product * std::sqrt(precision)), db[j] = sum[j];
    columns.average[j] = float(sum[j] / double(rows));
    columns.slope[j] = float(product / double(rows) * precision * columns.scale[j]);
  }
  columns.p.average = columns.average.data(), columns.p.slope = columns.slope.data();
  Tensor dx = torch::stable::empty_like(x);
  float* to = dx.mutable_data_ptr<float>();
  const auto run = ATST_SELECT_SIMD(batch_norm_relu_backward);
  for_pieces(rows,
             [&](int64_t r, int64_t n, int64_t) { run(g + r * dim, from + r * dim, columns.p, to + r * dim, n, dim); });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace atst

STABLE_TORCH_LIBRARY_IMPL(atst_fast, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&atst::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&atst::bias_gelu_backward));
  m.impl("add_branch", TORCH_BOX(&atst::add_branch));
  m.impl("add_branch_backward", TORCH_BOX(&atst::add_branch_backward));
  m.impl("batch_norm_relu", TORCH_BOX(&atst::batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&atst::batch_norm_relu_backward));
}
