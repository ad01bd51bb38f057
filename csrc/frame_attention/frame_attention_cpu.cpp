#include <limits>

#include "check.h"
#include "frame_attention/frame_attention.h"
#include "scratch.h"

namespace atst {
namespace {

// Where a sequence lies in the rows of q and of k, v. Rows of q from `computed` to `q_rows` are zero.
struct Sequence {
  int64_t q_start, q_rows, computed, k_start, k_rows, k_len;
};

// Rows of head_dim * heads contiguous values each.
struct Rows {
  float* data;
  int64_t stride;
  float* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

struct Problem {
  const char* op;
  int64_t heads, head_dim;
  float scale;
  Rows q, k, v, out;
  float* lse;  // [heads, rows of q]
  int64_t q_total;
  std::vector<Sequence> sequences;

  AttentionShape shape() const {
    int64_t longest = 1;
    for (const Sequence& s : sequences) longest = s.k_len > longest ? s.k_len : longest;
    return {head_dim, longest, scale};
  }
  AttentionItem item(const Sequence& s, int64_t head) const {
    const int64_t column = head * head_dim;
    return {q.at(s.q_start, column),
            k.at(s.k_start, column),
            v.at(s.k_start, column),
            q.stride,
            k.stride,
            s.computed,
            s.k_len,
            out.at(s.q_start, column),
            out.stride,
            lse + head * q_total + s.q_start};
  }
};

void zero_rows(const Rows& rows, int64_t begin, int64_t end, int64_t column, int64_t width) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < width; ++j) *rows.at(i, column + j) = 0.0f;
}

// Calls body(sequence, head, scratch) for all of them.
template <class Body>
void for_each_item(const Problem& p, bool backward, const Body& body) {
  const AttentionShape shape = p.shape();
  const int64_t floats = ATST_SELECT_SIMD(frame_attention_scratch_floats)(shape, backward);
  parallel_for(0, int64_t(p.sequences.size()) * p.heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate_scratch(floats);
    for (int64_t i = begin; i < end; ++i) body(shape, p.sequences[i / p.heads], i % p.heads, scratch.get());
  });
}

void run_forward(const Problem& p) {
  const auto kernel = ATST_SELECT_SIMD(frame_attention_item);
  for_each_item(p, false, [&](const AttentionShape& shape, const Sequence& s, int64_t head, float* scratch) {
    const AttentionItem item = p.item(s, head);
    if (s.k_len && s.computed) kernel(shape, item, scratch);
    const int64_t from = s.k_len ? s.computed : 0;
    zero_rows(p.out, s.q_start + from, s.q_start + s.q_rows, head * p.head_dim, p.head_dim);
    for (int64_t i = from; i < s.q_rows; ++i) item.lse[i] = -std::numeric_limits<float>::infinity();
  });
}

void run_backward(const Problem& p, const Rows& dout, const Rows& dq, const Rows& dk, const Rows& dv) {
  const auto kernel = ATST_SELECT_SIMD(frame_attention_backward_item);
  for_each_item(p, true, [&](const AttentionShape& shape, const Sequence& s, int64_t head, float* scratch) {
    const int64_t column = head * p.head_dim;
    const bool any = s.k_len && s.computed;
    if (any) {
      kernel(shape,
             {p.item(s, head), dout.at(s.q_start, column), dq.at(s.q_start, column), dk.at(s.k_start, column),
              dv.at(s.k_start, column), dq.stride, dk.stride},
             scratch);
    }
    zero_rows(dq, s.q_start + (any ? s.computed : 0), s.q_start + s.q_rows, column, p.head_dim);
    for (const Rows& rows : {dk, dv})
      zero_rows(rows, s.k_start + (any ? s.k_len : 0), s.k_start + s.k_rows, column, p.head_dim);
  });
}

void check_rows(const Tensor& t, int64_t dim, const char* op, const char* name) {
  check_cpu(t, op, name);
  check_dtype(t, ScalarType::Float, op, name);
  check_dim(t, dim, op, name);
  ATST_CHECK(t.numel() == 0 || t.stride(dim - 1) == 1 || t.size(dim - 1) <= 1, op, ": ", name,
             " must be contiguous along its last axis");
}

int64_t check_heads(int64_t width, int64_t parts, int64_t heads, const char* op) {
  ATST_CHECK(heads > 0 && width > 0 && width % (parts * heads) == 0, op, ": num_heads does not divide the width");
  const int64_t head_dim = width / parts / heads;
  ATST_CHECK(head_dim <= 256, op, ": head_dim must be at most 256");
  return head_dim;
}

const int64_t* check_index(const Tensor& t, int64_t count, const char* op, const char* name) {
  check_cpu(t, op, name);
  check_contiguous(t, op, name);
  check_dtype(t, ScalarType::Long, op, name);
  check_dim(t, 1, op, name);
  ATST_CHECK(t.size(0) == count, op, ": ", name, " has the wrong number of entries");
  return t.const_data_ptr<int64_t>();
}

Rows rows_of(const Tensor& t, int64_t offset = 0) {
  return {static_cast<float*>(t.data_ptr()) + offset, t.stride(t.dim() - 2)};
}

Problem padded_problem(const char* op, const Tensor& qkv, const std::optional<Tensor>& lengths, int64_t heads,
                       double scale, bool attend_padded) {
  check_rows(qkv, 3, op, "qkv");
  const int64_t batch = qkv.size(0), tokens = qkv.size(1);
  ATST_CHECK(batch <= 1 || tokens == 0 || qkv.stride(0) == tokens * qkv.stride(1), op,
             ": qkv must have rows of one stride");
  const int64_t head_dim = check_heads(qkv.size(2), 3, heads, op), width = heads * head_dim;
  const int64_t* valid = lengths ? check_index(*lengths, batch, op, "lengths") : nullptr;
  Problem p{
      op,      heads,          head_dim, float(scale), rows_of(qkv), rows_of(qkv, width), rows_of(qkv, 2 * width), {},
      nullptr, batch * tokens, {}};
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = valid ? valid[b] : tokens;
    ATST_CHECK(n >= 0 && n <= tokens, op, ": lengths[", b, "] = ", n, " is not from 0 to ", tokens);
    p.sequences.push_back({b * tokens, tokens, attend_padded ? tokens : n, b * tokens, tokens, n});
  }
  return p;
}

Problem packed_problem(const char* op, const Tensor& q, const Tensor& kv, const Tensor& cu_q, const Tensor& cu_k,
                       int64_t heads, double scale) {
  check_rows(q, 2, op, "q");
  check_rows(kv, 2, op, "kv");
  const int64_t head_dim = check_heads(q.size(1), 1, heads, op), batch = cu_q.size(0) - 1;
  ATST_CHECK(kv.size(1) == 2 * q.size(1), op, ": kv must be twice as wide as q");
  ATST_CHECK(batch >= 0, op, ": cu_seqlens_q must have at least one entry");
  const int64_t* starts_q = check_index(cu_q, batch + 1, op, "cu_seqlens_q");
  const int64_t* starts_k = check_index(cu_k, batch + 1, op, "cu_seqlens_k");
  const int64_t end_q = starts_q[batch], end_k = starts_k[batch];
  ATST_CHECK(starts_q[0] == 0 && end_q <= q.size(0), op, ": cu_seqlens_q must be from 0 to the rows of q");
  ATST_CHECK(starts_k[0] == 0 && end_k <= kv.size(0), op, ": cu_seqlens_k must be from 0 to the rows of kv");
  Problem p{op,      heads,     head_dim, float(scale), rows_of(q), rows_of(kv), rows_of(kv, q.size(1)), {},
            nullptr, q.size(0), {}};
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t nq = starts_q[b + 1] - starts_q[b], nk = starts_k[b + 1] - starts_k[b];
    ATST_CHECK(nq >= 0 && nk >= 0, op, ": cu_seqlens must not decrease");
    p.sequences.push_back({starts_q[b], nq, nq, starts_k[b], nk, nk});
  }
  // rows that belong to no sequence: nothing is computed there, so that they are zero
  p.sequences.push_back({end_q, q.size(0) - end_q, 0, end_k, kv.size(0) - end_k, 0});
  return p;
}

void check_saved(const Problem& p, const Tensor& dout, const Tensor& out, const Tensor& lse) {
  for (auto [t, name] : {std::pair{&dout, "grad"}, {&out, "out"}}) {
    check_rows(*t, out.dim(), p.op, name);
    check_contiguous(*t, p.op, name);
    ATST_CHECK(t->numel() == p.q_total * p.heads * p.head_dim, p.op, ": ", name, " has the wrong size");
  }
  check_dtype(lse, ScalarType::Float, p.op, "lse");
  check_contiguous(lse, p.op, "lse");
  ATST_CHECK(lse.numel() == p.q_total * p.heads, p.op, ": lse has the wrong size");
}

std::tuple<Tensor, Tensor> frame_attention(const Tensor& qkv, const std::optional<Tensor>& lengths, int64_t heads,
                                           double scale, bool attend_padded) {
  Problem p = padded_problem("frame_attention", qkv, lengths, heads, scale, attend_padded);
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), heads * p.head_dim});
  Tensor lse = torch::stable::new_empty(qkv, {heads, p.q_total});
  p.out = {out.mutable_data_ptr<float>(), heads * p.head_dim};
  p.lse = lse.mutable_data_ptr<float>();
  run_forward(p);
  return {out, lse};
}

Tensor frame_attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                const std::optional<Tensor>& lengths, int64_t heads, double scale, bool attend_padded) {
  Problem p = padded_problem("frame_attention_backward", qkv, lengths, heads, scale, attend_padded);
  check_saved(p, dout, out, lse);
  const int64_t width = heads * p.head_dim;
  p.out = {static_cast<float*>(out.data_ptr()), width};
  p.lse = static_cast<float*>(lse.data_ptr());
  Tensor dqkv = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), 3 * width});
  float* d = dqkv.mutable_data_ptr<float>();
  run_backward(p, {static_cast<float*>(dout.data_ptr()), width}, {d, 3 * width}, {d + width, 3 * width},
               {d + 2 * width, 3 * width});
  return dqkv;
}

std::tuple<Tensor, Tensor> frame_attention_packed(const Tensor& q, const Tensor& kv, const Tensor& cu_q,
                                                  const Tensor& cu_k, int64_t /*max_seqlen_q*/,
                                                  int64_t /*max_seqlen_k*/, int64_t heads, double scale) {
  Problem p = packed_problem("frame_attention_packed", q, kv, cu_q, cu_k, heads, scale);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1)});
  Tensor lse = torch::stable::new_empty(q, {heads, p.q_total});
  p.out = {out.mutable_data_ptr<float>(), q.size(1)};
  p.lse = lse.mutable_data_ptr<float>();
  run_forward(p);
  return {out, lse};
}

std::tuple<Tensor, Tensor> frame_attention_packed_backward(const Tensor& dout, const Tensor& q, const Tensor& kv,
                                                           const Tensor& out, const Tensor& lse, const Tensor& cu_q,
                                                           const Tensor& cu_k, int64_t /*max_seqlen_q*/,
                                                           int64_t /*max_seqlen_k*/, int64_t heads, double scale) {
  Problem p = packed_problem("frame_attention_packed_backward", q, kv, cu_q, cu_k, heads, scale);
  check_saved(p, dout, out, lse);
  const int64_t width = q.size(1);
  p.out = {static_cast<float*>(out.data_ptr()), width};
  p.lse = static_cast<float*>(lse.data_ptr());
  Tensor dq = torch::stable::new_empty(q, {q.size(0), width});
  Tensor dkv = torch::stable::new_empty(kv, {kv.size(0), 2 * width});
  float* d = dkv.mutable_data_ptr<float>();
  run_backward(p, {static_cast<float*>(dout.data_ptr()), width}, {dq.mutable_data_ptr<float>(), width}, {d, 2 * width},
               {d + width, 2 * width});
  return {dq, dkv};
}

}  // namespace
}  // namespace atst

STABLE_TORCH_LIBRARY_IMPL(atst_fast, CPU, m) {
  m.impl("frame_attention", TORCH_BOX(&atst::frame_attention));
  m.impl("frame_attention_backward", TORCH_BOX(&atst::frame_attention_backward));
  m.impl("frame_attention_packed", TORCH_BOX(&atst::frame_attention_packed));
  m.impl("frame_attention_packed_backward", TORCH_BOX(&atst::frame_attention_packed_backward));
}
