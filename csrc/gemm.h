// Small single-precision matrix products out of cache, for *_simd.cpp files: C (+)= A B with B packed once in panels.
//
// A microtile of C is kRows x kPanel values in registers (24 accumulators of 32 with AVX-512, 12 of 16 otherwise), so
// that each loaded vector of B serves kRows multiply-adds and each broadcast value of A serves kVectors. A is read in
// place with any two strides: transposing it costs nothing.
#pragma once

#include "simd.h"

namespace atst::ATST_ISA {
namespace {

constexpr int kRows = 6;
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kVectors * kLanes;

ATST_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Floats of a packed B with `depth` rows and `columns` columns.
ATST_INLINE int64_t packed_floats(int64_t depth, int64_t columns) { return depth * round_up(columns, kPanel); }

// Rows are often further apart than hardware prefetchers look.
ATST_INLINE void prefetch_row(const float* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(row + i);
}
constexpr int kRowsAhead = 8;

// packed[panel][k][j] = b[k * row_stride + (panel * kPanel + j) * column_stride], zeros past the last column.
void pack(const float* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t columns,
          float* __restrict packed) {
  for (int64_t j0 = 0; j0 < columns; j0 += kPanel) {
    const int64_t width = columns - j0 < kPanel ? columns - j0 : kPanel;
    float* panel = packed + j0 * depth;
    if (column_stride == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        const float* from = b + k * row_stride + j0;
        prefetch_row(from + kRowsAhead * row_stride, width);
        for (int64_t j = 0; j < width; ++j) panel[k * kPanel + j] = from[j];
      }
    } else {
      for (int64_t j = 0; j < width; ++j) {
        const float* from = b + (j0 + j) * column_stride;
        prefetch_row(from + kRowsAhead * column_stride, depth);
        for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + j] = from[k * row_stride];
      }
    }
    for (int64_t k = 0; width < kPanel && k < depth; ++k)
      for (int64_t j = width; j < kPanel; ++j) panel[k * kPanel + j] = 0.0f;
  }
}

template <int R>
ATST_INLINE void microtile(const float* a, int64_t a_row, int64_t a_column, const float* panel, int64_t depth, float* c,
                           int64_t c_row, bool add) {
  vf sum[R][kVectors];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j] = add ? load(c + i * c_row + j * kLanes) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf b[kVectors];
    for (int j = 0; j < kVectors; ++j) b[j] = load(panel + k * kPanel + j * kLanes);
    for (int i = 0; i < R; ++i) {
      const vf x = splat(a[i * a_row + k * a_column]);
      for (int j = 0; j < kVectors; ++j) sum[i][j] += x * b[j];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * kLanes, sum[i][j]);
}

// C [rows, columns rounded up to kPanel] = A [rows, depth] B, or += with `add`.
void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
          const float* packed, float* c, int64_t c_row, bool add) {
  for (int64_t j0 = 0; j0 < columns; j0 += kPanel) {
    const float* panel = packed + j0 * depth;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
      microtile<kRows>(a + i * a_row, a_row, a_column, panel, depth, c + i * c_row + j0, c_row, add);
    const float* rest = a + i * a_row;
    float* to = c + i * c_row + j0;
    switch (rows - i) {
      case 5:
        microtile<5>(rest, a_row, a_column, panel, depth, to, c_row, add);
        break;
      case 4:
        microtile<4>(rest, a_row, a_column, panel, depth, to, c_row, add);
        break;
      case 3:
        microtile<3>(rest, a_row, a_column, panel, depth, to, c_row, add);
        break;
      case 2:
        microtile<2>(rest, a_row, a_column, panel, depth, to, c_row, add);
        break;
      case 1:
        microtile<1>(rest, a_row, a_column, panel, depth, to, c_row, add);
        break;
      default:
        break;
    }
  }
}

}  // namespace
}  // namespace atst::ATST_ISA
