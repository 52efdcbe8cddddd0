// Small matrix products: c (=|+=) a @ b with the accumulators in registers.

#pragma once

#include "attention_simd.h"

namespace {

// Accumulators of a tile: rows (broadcast from a) by vectors (loaded from b). They, the vectors of
// a row of b and one broadcast fill the 16 registers of SSE and AVX2, the 32 of AVX-512.
constexpr int kTileVectors = kBytes == 64 ? 4 : 2;

constexpr int tile_rows(int vectors) {
  if (kBytes == 64) return vectors == 1 ? 14 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 8 : 6;
}

// c[m][n] of one tile. a is (rows, depth), or (depth, rows) if kTransposed.
template <int kRows, int kVectors, bool kAdd, bool kTransposed>
SPION_DS_INLINE void multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b,
                                   int64_t b_stride, float* c, int64_t c_stride) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      sum[m][n] = kAdd ? load(c + m * c_stride + n * kLanes) : Floats{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + k * b_stride + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Floats factor = all(kTransposed ? a[k * a_stride + m] : a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[m][n] = multiply_add(factor, row[n], sum[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) store(c + m * c_stride + n * kLanes, sum[m][n]);
  }
}

template <int kRows, int kVectors, bool kAdd, bool kTransposed>
void multiply_last_rows(int64_t rows, int64_t depth, const float* a, int64_t a_stride,
                        const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_tile<kRows, kVectors, kAdd, kTransposed>(depth, a, a_stride, b, b_stride, c,
                                                        c_stride);
    } else {
      multiply_last_rows<kRows - 1, kVectors, kAdd, kTransposed>(rows, depth, a, a_stride, b,
                                                                 b_stride, c, c_stride);
    }
  }
}

template <int kVectors, bool kAdd, bool kTransposed>
void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const float* b,
                   int64_t b_stride, float* c, int64_t c_stride) {
  constexpr int kRows = tile_rows(kVectors);
  const int64_t a_step = kTransposed ? 1 : a_stride;
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    multiply_tile<kRows, kVectors, kAdd, kTransposed>(depth, a + m * a_step, a_stride, b, b_stride,
                                                      c + m * c_stride, c_stride);
  }
  multiply_last_rows<kRows - 1, kVectors, kAdd, kTransposed>(
      rows - m, depth, a + m * a_step, a_stride, b, b_stride, c + m * c_stride, c_stride);
}

// c (rows, columns) = a @ b, or += if kAdd; columns is a multiple of kLanes. a is (rows, depth), or
// (depth, rows) if kTransposed; b is (depth, columns). Each element is one chain of multiply_adds in
// ascending depth, so it does not depend on how a product is cut into tiles.
template <bool kAdd, bool kTransposed>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride,
              const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  for (int64_t n = 0; n < columns; n += kTileVectors * kLanes, b += kTileVectors * kLanes,
               c += kTileVectors * kLanes) {
    const int64_t vectors = (columns - n) / kLanes;
    if (vectors >= kTileVectors) {
      multiply_rows<kTileVectors, kAdd, kTransposed>(rows, depth, a, a_stride, b, b_stride, c,
                                                     c_stride);
    } else if (vectors == 1) {
      multiply_rows<1, kAdd, kTransposed>(rows, depth, a, a_stride, b, b_stride, c, c_stride);
    } else if constexpr (kTileVectors == 4) {
      if (vectors == 2) {
        multiply_rows<2, kAdd, kTransposed>(rows, depth, a, a_stride, b, b_stride, c, c_stride);
      } else {
        multiply_rows<3, kAdd, kTransposed>(rows, depth, a, a_stride, b, b_stride, c, c_stride);
      }
    }
  }
}

}  // namespace
