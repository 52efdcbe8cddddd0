// The forward kernel: a running softmax over the kept key blocks of a row of query blocks.

#pragma once

#include "attention_tiles.h"

namespace {

// Writes -inf to the scores (keys.count, width) that padding or causality excludes.
inline void mask_scores(const Problem& p, int64_t b, const Piece& queries, const Piece& keys,
                        int64_t width, float* scores) {
  const bool causal = some_in_future(p, queries, keys);
  if (!causal && !some_padding(p, b, keys)) return;
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = keys.first + j;
    // Lanes before `from` are excluded.
    const int64_t before = key - (p.query_offset + queries.first);
    int64_t from = causal && before > 0 ? smaller(before, width) : 0;
    if (!is_real(p, b, key)) from = width;
    for (int64_t i = 0; i < from; ++i) scores[j * width + i] = -kInfinity;
  }
}

// The largest of each lane's `rows` values; four chains, since one would wait for itself.
SPION_DS_INLINE Floats column_maximum(const float* values, int64_t rows, int64_t stride) {
  Floats top[4];
  for (Floats& chain : top) chain = load(values);
  int64_t row = 1;
  for (; row + 4 <= rows; row += 4) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      top[i] = maximum(top[i], load(values + (row + i) * stride));
    }
  }
  for (; row < rows; ++row) top[0] = maximum(top[0], load(values + row * stride));
  return maximum(maximum(top[0], top[1]), maximum(top[2], top[3]));
}

// Turns scores (keys, width), in base 2, into weights 2^(score - top), updating top and total (width), and
// scales sum (head_dim, width) from the old top to the new.
inline void update_softmax(const Problem& p, const QueryLanes& lanes, const Piece& keys,
                           int64_t width, float* scores, float* top, float* total, float* sum) {
  const bool dropout = p.dropout_key != nullptr;
  const int32_t threshold = p.dropout_threshold;
  uint32_t column_words[kPiece];
  if (dropout) fill_column_words(keys, column_words);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats old_top = load(top + i);
    const Floats new_top = maximum(old_top, column_maximum(scores + i, keys.count, width));
    const Floats shrink = exp2_of_negative(old_top - new_top);
    const Words row_keys = load_as<Words>(lanes.keys + i);
    const Words multipliers = load_as<Words>(lanes.multipliers + i);
    Floats added = {};
    for (int64_t j = 0; j < keys.count; ++j) {
      Floats weight = exp2_of_negative(load(scores + j * width + i) - new_top);
      added += weight;
      if (dropout) {
        const Words word = Words{} + column_words[j];
        weight = dropout_keeps(threshold, row_keys, multipliers, word) ? weight : Floats{};
      }
      store(scores + j * width + i, weight);
    }
    store(top + i, new_top);
    store(total + i, multiply_add(load(total + i), shrink, added));
    for (int64_t d = 0; d < p.head_dim; ++d) {
      store(sum + d * width + i, load(sum + d * width + i) * shrink);
    }
  }
}

// How many valid keys the queries of a piece do not keep, into pruned (queries.count).
inline void count_pruned(const Problem& p, int64_t b, int64_t h, int64_t row, const Piece& queries,
                         float* pruned) {
  const int32_t* pointers = p.row_ptr + layout_index(p, h) * (p.num_rows + 1) + row;
  for (int64_t i = 0; i < queries.count; ++i) {
    const int64_t position = p.query_offset + queries.first + i;
    const int64_t end = p.causal ? smaller(position + 1, p.keys) : p.keys;
    int64_t count = real_keys(p, b, 0, end);
    for (int32_t entry = pointers[0]; entry < pointers[1]; ++entry) {
      const int64_t first = p.col_idx[entry] * p.block;
      const int64_t last = smaller(first + p.block, end);
      if (last > first) count -= real_keys(p, b, first, last);
    }
    pruned[i] = static_cast<float>(count);
    if (!p.causal && i == 0) {
      for (int64_t other = 1; other < queries.count; ++other) pruned[other] = pruned[0];
      return;
    }
  }
}

// Divides sum (head_dim, width) by the softmax's denominator and writes the log-sum-exp.
inline void finish_softmax(const Problem& p, int64_t b, int64_t h, int64_t row,
                           const Piece& queries, int64_t width, float* top, float* total,
                           float* sum) {
  float pruned[kPiece] = {};
  if (p.pruned_zero) count_pruned(p, b, h, row, queries, pruned);
  float factor[kPiece] = {};
  float* lse = p.lse + (b * p.heads + h) * p.queries + queries.first;
  for (int64_t i = 0; i < queries.count; ++i) {
    const bool zero = p.zero_padded_queries && !is_real(p, b, queries.first + i);
    if (total[i] == 0.0f || zero) {
      // +inf makes every exp(score - lse) 0 in the backward pass.
      lse[i] = kInfinity;
      continue;
    }
    float shrink = 1.0f;
    if (pruned[i] > 0.0f) {
      // A pruned entry is a logit 0, so the shift is at least 0.
      const float new_top = top[i] > 0.0f ? top[i] : 0.0f;
      shrink = __builtin_exp2f(top[i] - new_top);
      total[i] = total[i] * shrink + pruned[i] * __builtin_exp2f(-new_top);
      top[i] = new_top;
    }
    lse[i] = (top[i] + __builtin_log2f(total[i])) * kLn2;
    factor[i] = shrink * p.dropout_scale / total[i];
  }
  for (int64_t d = 0; d < p.head_dim; ++d) {
    for (int64_t i = 0; i < width; i += kLanes) {
      store(sum + d * width + i, load(sum + d * width + i) * load(factor + i));
    }
  }
}

inline void forward_row(const Problem& p, int64_t b, int64_t h, int64_t row, float* memory) {
  const Workspace w(p, memory);
  const int64_t kv_head = h / (p.heads / p.kv_heads);
  const int32_t* pointers = p.row_ptr + layout_index(p, h) * (p.num_rows + 1) + row;
  for_pieces(queries_of(p, row), p.query_ends[b], [&](const Piece& queries) {
    const int64_t width = round_up(queries.count, kLanes);
    const QueryLanes lanes(p, b, h, queries, width);
    pack_owner(p, p.q, b, h, queries, width, w.partner[0], w.owner[0]);
    for (int64_t i = 0; i < p.head_dim * width; i += kLanes) {
      store(w.owner[0] + i, load(w.owner[0] + i) * (p.scale * kLog2e));
    }
    float top[kPiece], total[kPiece];
    fill(top, width, kLowest);
    fill(total, width, 0.0f);
    fill(w.sum[0], p.head_dim * width, 0.0f);
    for (int32_t entry = pointers[0]; entry < pointers[1]; ++entry) {
      for_pieces(keys_of(p, p.col_idx[entry]), p.key_ends[b], [&](const Piece& keys) {
        if (all_in_future(p, queries, keys) || all_padding(p, b, keys)) return;
        const Rows k = partner_rows(p, p.k, b, kv_head, keys, false, w.partner[0]);
        const Rows v = partner_rows(p, p.v, b, kv_head, keys, false, w.partner[1]);
        multiply<false, false>(keys.count, width, p.head_dim, k.data, k.stride, w.owner[0], width,
                               w.tile[0], width);
        mask_scores(p, b, queries, keys, width, w.tile[0]);
        update_softmax(p, lanes, keys, width, w.tile[0], top, total, w.sum[0]);
        multiply<true, true>(p.head_dim, width, keys.count, v.data, v.stride, w.tile[0], width,
                             w.sum[0], width);
      });
    }
    finish_softmax(p, b, h, row, queries, width, top, total, w.sum[0]);
    store_transposed(p.dtype, p.out, b, h, queries.first, queries.count, width, p.head_dim,
                     w.sum[0], w.partner[0]);
  });
  const Piece rest = rest_of_block(queries_of(p, row), p.query_ends[b], p.queries);
  store_zeros(p.dtype, p.out, b, h, rest.first, rest.count, p.head_dim);
  fill(p.lse + (b * p.heads + h) * p.queries + rest.first, rest.count, kInfinity);
}

}  // namespace
