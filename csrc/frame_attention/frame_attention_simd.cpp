// K and V of a head (64 KiB each at 250 tokens of 64) stay in the L2 cache, and so do the scores of a tile: the softmax
// is the plain one of a whole row, without rescaling, for any length, and every product is a small matrix product on
// operands packed once per head (gemm.h).
//
// Scores are kept in units of log2 (queries are scaled by log2 e as well), so that each exponential is a power of two.
//
// One item is a (sequence, head): 4 L^2 Dh operations forward (two products), 10 L^2 Dh backward (five), L^2
// exponentials each. Nothing is summed across items, so the bits do not depend on threads. Keys at or past k_len are
// never read; queries past q_len are never computed.
#include "frame_attention/frame_attention.h"
#include "gemm.h"

namespace atst::ATST_ISA {
namespace {

constexpr int64_t kTile = 24 * kRows;   // most query rows of a tile
constexpr int64_t kScores = 40 * 1024;  // floats: the scores of a tile fit into this, unless there are very many keys
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// A row stride that is no multiple of 4 KiB, so that the rows of a column do not share a cache set.
ATST_INLINE int64_t score_stride(int64_t k_len) { return round_up(k_len, kPanel) + 16; }

// Query rows of a tile: the more, the fewer times the sums over all tiles (dK, dV) go through memory.
ATST_INLINE int64_t tile_rows(int64_t k_len) {
  const int64_t most = kScores / score_stride(k_len) / kRows * kRows;
  return most > kTile ? kTile : most > 2 * kRows ? most : 2 * kRows;
}

// Scores of a tile of up to max_k_len keys.
ATST_INLINE int64_t score_floats(int64_t max_k_len) {
  const int64_t least = 2 * kRows * score_stride(max_k_len);
  return least > kScores ? least : kScores;
}

ATST_INLINE void rows_to(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float factor, float* to,
                         int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    prefetch_row(from + (i + kRowsAhead) * from_stride, columns);
    for (int64_t j = 0; j < columns; ++j) to[i * to_stride + j] = factor * from[i * from_stride + j];
  }
}

// Scores to 2^(score - max) in place, zeros past k_len; returns the sum and sets *max. A NaN makes the sum one.
float exponentials(float* row, int64_t k_len, float* max) {
  const int64_t padded = round_up(k_len, kPanel);
  for (int64_t j = k_len; j < padded; ++j) row[j] = -__builtin_inff();
  vf top[kVectors], sum[kVectors];
  for (int i = 0; i < kVectors; ++i) top[i] = splat(-__builtin_inff()), sum[i] = vf{};
  for (int64_t j = 0; j < padded; j += kPanel)
    for (int i = 0; i < kVectors; ++i) {
      const vf s = load(row + j + i * kLanes);
      top[i] = s > top[i] ? s : top[i];
    }
  for (int i = 1; i < kVectors; ++i) top[0] = top[i] > top[0] ? top[i] : top[0];
  *max = max_of_lanes(top[0]);
  for (int64_t j = 0; j < padded; j += kPanel)
    for (int i = 0; i < kVectors; ++i) {
      const vf e = exp2_of_negative(load(row + j + i * kLanes) - *max);
      store(row + j + i * kLanes, e);
      sum[i] += e;
    }
  for (int i = 1; i < kVectors; ++i) sum[0] += sum[i];
  return sum_of_lanes(sum[0]);
}

float dot(const float* a, const float* b, int64_t n) {
  vf sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  float rest = 0.0f;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum_of_lanes(sum) + rest;
}

}  // namespace

int64_t frame_attention_scratch_floats(const AttentionShape& s, bool backward) {
  const int64_t d = round_up(s.head_dim, kPanel), scores = score_floats(s.max_k_len);
  const int64_t keys = packed_floats(s.head_dim, s.max_k_len), values = packed_floats(s.max_k_len, s.head_dim);
  if (!backward) return keys + values + scores + kTile * (d + s.head_dim);
  return 2 * keys + values + 2 * scores + kTile * (3 * d + s.head_dim) + 2 * s.max_k_len * d;
}

void frame_attention_item(const AttentionShape& s, const AttentionItem& item, float* scratch) {
  const int64_t d = round_up(s.head_dim, kPanel), stride = score_stride(item.k_len);
  float* keys = scratch;                                            // K^T
  float* values = keys + packed_floats(s.head_dim, s.max_k_len);    // V
  float* scores = values + packed_floats(s.max_k_len, s.head_dim);  // [tile, stride]
  float* out = scores + score_floats(s.max_k_len);                  // [kTile, d]
  float* queries = out + kTile * d;                                 // [kTile, head_dim], scaled
  pack(item.k, 1, item.kv_stride, s.head_dim, item.k_len, keys);
  pack(item.v, item.kv_stride, 1, item.k_len, s.head_dim, values);
  const int64_t tile = tile_rows(item.k_len);
  for (int64_t q0 = 0; q0 < item.q_len; q0 += tile) {
    const int64_t rows = item.q_len - q0 < tile ? item.q_len - q0 : tile;
    rows_to(item.q + q0 * item.q_stride, item.q_stride, rows, s.head_dim, s.scale * kLog2E, queries, s.head_dim);
    gemm(rows, item.k_len, s.head_dim, queries, s.head_dim, 1, keys, scores, stride, false);
    float inverse[kTile];
    for (int64_t i = 0; i < rows; ++i) {
      float max;
      const float sum = exponentials(scores + i * stride, item.k_len, &max);
      inverse[i] = 1.0f / sum;
      item.lse[q0 + i] = max * kLn2 + log(splat(sum))[0];
    }
    gemm(rows, s.head_dim, item.k_len, scores, stride, 1, values, out, d, false);
    for (int64_t i = 0; i < rows; ++i)
      rows_to(out + i * d, d, 1, s.head_dim, inverse[i], item.out + (q0 + i) * item.out_stride, item.out_stride);
  }
}

void frame_attention_backward_item(const AttentionShape& s, const AttentionGradItem& item, float* scratch) {
  const AttentionItem& f = item.forward;
  const int64_t dim = s.head_dim, d = round_up(dim, kPanel), stride = score_stride(f.k_len);
  const int64_t by_key = packed_floats(dim, s.max_k_len), by_dim = packed_floats(s.max_k_len, dim);
  float* keys_t = scratch;            // K^T
  float* values_t = keys_t + by_key;  // V^T
  float* keys = values_t + by_key;    // K
  float* p = keys + by_dim;           // [tile, stride]
  float* ds = p + score_floats(s.max_k_len);
  float* dq = ds + score_floats(s.max_k_len);  // [kTile, d]
  float* dout = dq + kTile * d;                // packed tile of dO
  float* q_packed = dout + kTile * d;          // packed tile of scaled Q
  float* queries = q_packed + kTile * d;       // [kTile, dim], scaled
  float* dk = queries + kTile * dim;           // [k_len, d]
  float* dv = dk + s.max_k_len * d;
  pack(f.k, 1, f.kv_stride, dim, f.k_len, keys_t);
  pack(f.v, 1, f.kv_stride, dim, f.k_len, values_t);
  pack(f.k, f.kv_stride, 1, f.k_len, dim, keys);
  const int64_t tile = tile_rows(f.k_len);
  for (int64_t q0 = 0; q0 < f.q_len; q0 += tile) {
    const int64_t rows = f.q_len - q0 < tile ? f.q_len - q0 : tile;
    const float* g = item.dout + q0 * f.out_stride;
    rows_to(f.q + q0 * f.q_stride, f.q_stride, rows, dim, s.scale * kLog2E, queries, dim);
    gemm(rows, f.k_len, dim, queries, dim, 1, keys_t, p, stride, false);
    gemm(rows, f.k_len, dim, g, f.out_stride, 1, values_t, ds, stride, false);
    for (int64_t i = 0; i < rows; ++i) {
      const float delta = dot(g + i * f.out_stride, f.out + (q0 + i) * f.out_stride, dim);
      float *pi = p + i * stride, *si = ds + i * stride;
      const float lse = f.lse[q0 + i] * kLog2E;
      for (int64_t j = 0; j < f.k_len; j += kLanes) {
        // a probability is at most 1, but for the rounding of both
        const vf e = exp2_of_negative(load(pi + j) - lse);
        store(pi + j, e);
        store(si + j, e * (load(si + j) - delta));
      }
    }
    gemm(rows, dim, f.k_len, ds, stride, 1, keys, dq, d, false);
    rows_to(dq, d, rows, dim, s.scale, item.dq + q0 * item.dq_stride, item.dq_stride);
    pack(g, f.out_stride, 1, rows, dim, dout);
    pack(queries, dim, 1, rows, dim, q_packed);
    gemm(f.k_len, dim, rows, p, 1, stride, dout, dv, d, q0 > 0);
    gemm(f.k_len, dim, rows, ds, 1, stride, q_packed, dk, d, q0 > 0);
  }
  rows_to(dk, d, f.k_len, dim, kLn2, item.dk, item.dkv_stride);  // the queries had a factor of log2 e
  rows_to(dv, d, f.k_len, dim, 1.0f, item.dv, item.dkv_stride);
}

}  // namespace atst::ATST_ISA
