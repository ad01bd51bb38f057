// Softmax attention over short sequences, one sequence and head at a time, with no attention matrix in memory beyond a
// tile of query rows:
//   P = softmax(scale Q K^T),  O = P V,  lse = log sum exp of a row
//   dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = scale dS K,  dK = scale dS^T Q
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace atst {

// One sequence and head, with at least one query and one key. Row i of q is at q + i * q_stride, head_dim contiguous
// values; the same for the others.
struct AttentionItem {
  const float *q, *k, *v;
  int64_t q_stride, kv_stride, q_len, k_len;
  float* out;
  int64_t out_stride;
  float* lse;  // [q_len]
};

struct AttentionGradItem {
  AttentionItem forward;  // its out and lse are read
  const float* dout;      // rows like those of out
  float *dq, *dk, *dv;
  int64_t dq_stride, dkv_stride;
};

struct AttentionShape {
  int64_t head_dim, max_k_len;
  float scale;
};

ATST_DECLARE_SIMD(int64_t, frame_attention_scratch_floats, (const AttentionShape&, bool backward))
ATST_DECLARE_SIMD(void, frame_attention_item, (const AttentionShape&, const AttentionItem&, float* scratch))
ATST_DECLARE_SIMD(void, frame_attention_backward_item,
                  (const AttentionShape&, const AttentionGradItem&, float* scratch))

}  // namespace atst
