// What the operators of block-sparse attention and their kernels share. The kernels are compiled
// once for each instruction set (attention_baseline.cpp, attention_avx2.cpp, attention_avx512.cpp).

#pragma once

#include <cstdint>

namespace spion_ds {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// A (batch, heads, tokens, head_dim) tensor; strides in elements, that of head_dim is 1.
struct Tokens {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t token = 0;
};

// One call. Of the backward pass only: grad, dq, dk, dv, delta.
struct Problem {
  DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  int64_t block, num_rows, num_cols;
  int64_t query_offset;  // position of the first query, whose block is the first of num_rows
  bool layout_per_head, causal, pruned_zero;
  float scale;

  // The layout, indexed as BlockLayout describes.
  const int32_t* row_ptr;
  const int32_t* col_idx;
  const int32_t* col_ptr;
  const int32_t* row_idx;

  const uint8_t* real;  // (batch, keys), 1 = real key; null: all are
  const int32_t* seen;  // (batch, keys + 1) how many real keys come before each; null as well
  bool zero_padded_queries;  // real is of the queries too, and padded ones give zeros
  // (batch,) how many keys and how many queries of a sample are computed: what comes after the last
  // real key, and with zero_padded_queries after the last real query, is left out.
  const int32_t* key_ends;
  const int32_t* query_ends;

  const int32_t* dropout_key;  // (batch,); null: no dropout
  int32_t dropout_threshold;   // keep when the bits are >= it
  float dropout_scale;         // 1 / (1 - p), or 1

  Tokens q, k, v, out, grad, dq, dk, dv;
  float* lse;    // (batch, heads, queries) log-sum-exp, +inf for a row that keeps nothing
  float* delta;  // (batch, heads, queries) sum over head_dim of out * grad
};

// Where backward_column adds the query gradients of a kv head's query heads: float32
// (group, queries, stride), the values past head_dim of each row unused.
struct QueryGradients {
  float* data = nullptr;
  int64_t head = 0;
  int64_t token = 0;
};

// Queries that a kernel of attention maps treats at a time, and keys of one of its tiles.
constexpr int64_t kMapQueries = 64;
constexpr int64_t kMapKeys = 256;

// A map of attention: row i is row_weights[i] times the sum over samples and heads.
struct MapProblem {
  Problem attention;  // q, k, their sizes and masks; block is kMapQueries
  int64_t block;      // of the pooling
  int64_t half;       // of the diagonal convolution: F = 2 * half + 1
  double mean;        // what the moments are about
  const double* row_weights;  // (L,)
  // The softmax of each row, (batch, heads, L): its largest score in base 2, and 1 / the sum of
  // 2^(score - largest). Rows that are left out have a number above every score, and 0.
  float* top;
  float* inverse;
};

// What a task adds up: the blocks that its part of the map reaches, (rows, columns), and the second
// and third powers of its entries' distance from the mean.
struct MapSums {
  int64_t first_row, rows, first_column, columns;
  double* blocks;
  double* moments;  // null: not wanted
};

// One instruction set's kernels. Each call is one thread's; `workspace` is that thread's own.
struct Kernels {
  // Floats that a workspace needs.
  int64_t (*workspace_floats)(const Problem&);
  // Floats of a row of QueryGradients.
  int64_t (*padded_head_dim)(const Problem&);
  // Writes out and lse of the queries of a row of blocks.
  void (*forward_row)(const Problem&, int64_t b, int64_t h, int64_t row, float* workspace);
  // Writes delta of the queries of a row of blocks.
  void (*write_delta)(const Problem&, int64_t b, int64_t h, int64_t row, float* workspace);
  // Writes dq of the queries of a row of blocks.
  void (*backward_row)(const Problem&, int64_t b, int64_t h, int64_t row, float* workspace);
  // Writes dk and dv of the keys of a column of blocks. With `dq` it also adds to the query
  // gradients what those keys give; called for all columns in ascending order, that sum has the
  // same bits as backward_row's.
  void (*backward_column)(const Problem&, int64_t b, int64_t kv_head, int64_t column,
                          const QueryGradients* dq, float* workspace);
  // Writes dq of one head from float32 query gradients, (queries, stride).
  void (*store_dq)(const Problem&, int64_t b, int64_t h, const float* gradients, int64_t stride);
  // Floats that a workspace of the two kernels below needs.
  int64_t (*map_workspace_floats)(const MapProblem&);
  // Writes top and inverse of the kMapQueries queries from `query` on.
  void (*map_softmax)(const MapProblem&, int64_t b, int64_t h, int64_t query, float* workspace);
  // Adds the entries of those queries and the kMapKeys keys from `key` on, over all samples and
  // heads, to the sums.
  void (*map_tile)(const MapProblem&, int64_t query, int64_t key, const MapSums&,
                   float* workspace);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPION_DS_X86_KERNELS 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace spion_ds
