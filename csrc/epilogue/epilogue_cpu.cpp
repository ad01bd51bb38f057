// The boundary of bias_gelu and add_branch: checks, then pieces of rows shared out among the threads.
#include <algorithm>

#include "../check.h"
#include "epilogue.h"

namespace atst {
namespace {

// Rows per piece of work. Sums over rows are made per piece and then added up in order: the bits do not depend on the
// number of threads.
constexpr int64_t kRows = 32;

int64_t pieces_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

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

const float* bias_row(const Tensor& bias, int64_t dim, const char* op) {
  const float* b = input(bias, op, "bias");
  ATST_CHECK(bias.dim() == 1 && bias.size(0) == dim, op, ": bias must have the size of the last axis");
  return b;
}

// run(first row, rows, index of the piece)
template <class Run>
void for_pieces(int64_t rows, const Run& run) {
  parallel_for(0, pieces_of(rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i * kRows, std::min(kRows, rows - i * kRows), i);
  });
}

// The sum over all rows by way of a partial sum per piece: run(first row, rows, partial sum to add to).
template <class Run>
Tensor sum_over_rows(const Tensor& like, int64_t rows, int64_t dim, const Run& run) {
  Tensor parts = torch::stable::new_zeros(like, {pieces_of(rows), dim});
  Tensor sum = torch::stable::new_zeros(like, {dim});
  float* part = parts.mutable_data_ptr<float>();
  for_pieces(rows, [&](int64_t r, int64_t n, int64_t i) { run(r, n, part + i * dim); });
  ATST_SELECT_SIMD(add_rows)(part, sum.mutable_data_ptr<float>(), pieces_of(rows), dim);
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
  const float* b = bias_row(bias, dim, op);
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
  const float* b = bias_row(bias, dim, op);
  ATST_CHECK(grad.sizes().equals(h.sizes()), op, ": grad must have the shape of h");
  Tensor dh = torch::stable::empty_like(h);
  float* to = dh.mutable_data_ptr<float>();
  const auto run = ATST_SELECT_SIMD(bias_gelu_backward);
  Tensor dbias = sum_over_rows(h, h.numel() / dim, dim, [&](int64_t r, int64_t n, float* part) {
    run(g + r * dim, from + r * dim, b, to + r * dim, part, n, dim);
  });
  return {dh, dbias};
}

Tensor add_branch(Tensor x, Tensor y, Tensor bias, double alpha, std::optional<Tensor> kept) {
  const char* op = "add_branch";
  const float *base = input(x, op, "x"), *from = input(y, op, "y");
  const int64_t dim = last_axis(x, op, "x");
  const float* b = bias_row(bias, dim, op);
  const Items items = make_items(x, dim, kept, op);
  ATST_CHECK(last_axis(y, op, "y") == dim && y.numel() == items.branch * items.rows * dim, op,
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

std::tuple<Tensor, Tensor> add_branch_backward(Tensor grad, double alpha, std::optional<Tensor> kept) {
  const char* op = "add_branch_backward";
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

}  // namespace
}  // namespace atst

STABLE_TORCH_LIBRARY_IMPL(atst_fast, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&atst::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&atst::bias_gelu_backward));
  m.impl("add_branch", TORCH_BOX(&atst::add_branch));
  m.impl("add_branch_backward", TORCH_BOX(&atst::add_branch_backward));
}
