// The backward kernels. Probabilities are drawn again from the saved log-sum-exp.

#pragma once

#include "attention_tiles.h"

namespace {

inline void write_delta(const Problem& p, int64_t b, int64_t h, int64_t row, float* memory) {
  const Workspace w(p, memory);
  const Range queries = queries_of(p, row);
  const int64_t end = smaller(queries.end, p.query_ends[b]);
  for (int64_t query = queries.first; query < end; ++query) {
    const Piece one{query, 1};
    const float* out = partner_rows(p, p.out, b, h, one, false, w.partner[0]).data;
    const float* grad = partner_rows(p, p.grad, b, h, one, false, w.partner[1]).data;
    Floats sums = {};
    int64_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) {
      sums = multiply_add(load(out + d), load(grad + d), sums);
    }
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    for (; d < p.head_dim; ++d) sum += out[d] * grad[d];
    p.delta[(b * p.heads + h) * p.queries + query] = sum;
  }
}

// What the gradients of a tile's entries need of the problem, in registers: the compiler cannot
// know that the tile does not overlap the problem.
struct EntryRules {
  EntryRules(const Problem& p, int64_t b, const Piece& queries, const Piece& keys)
      : scale(p.scale),
        scale_log2(p.scale * kLog2e),
        dropout_scale(p.dropout_scale),
        dropout_threshold(p.dropout_threshold),
        dropout(p.dropout_key != nullptr),
        causal(some_in_future(p, queries, keys)),
        masked(causal || some_padding(p, b, keys)) {}

  float scale, scale_log2, dropout_scale;
  int32_t dropout_threshold;
  bool dropout, causal, masked;
};

// The probability, after dropout, and the gradient of the unscaled score, of some entries.
struct Entries {
  Floats dropped;
  Floats grad_score;
};

SPION_DS_INLINE Entries entries_of(const EntryRules& rules, Floats score, Floats grad_prob,
                                   Floats negative_lse2, Floats delta, Ints allowed,
                                   Words row_keys, Words row_multipliers, Words column_words) {
  Floats prob = exp2_of_negative(multiply_add(score, all(rules.scale_log2), negative_lse2));
  if (rules.masked) prob = allowed ? prob : Floats{};
  Floats dropped = prob;
  if (rules.dropout) {
    const Ints keep =
        dropout_keeps(rules.dropout_threshold, row_keys, row_multipliers, column_words);
    dropped = keep ? prob * rules.dropout_scale : Floats{};
    grad_prob = keep ? grad_prob * rules.dropout_scale : Floats{};
  }
  return {dropped, prob * (grad_prob - delta) * rules.scale};
}

// grad_probs (keys, width) becomes the gradients of the unscaled scores.
inline void query_lane_gradients(const Problem& p, int64_t b, const QueryLanes& lanes,
                                 const Piece& queries, const Piece& keys, int64_t width,
                                 const float* scores, float* grad_probs) {
  const EntryRules rules(p, b, queries, keys);
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = keys.first + j;
    const Words word = Words{} + column_word(static_cast<uint32_t>(key));
    const Ints real = Ints{} - (is_real(p, b, key) ? 1 : 0);
    for (int64_t i = 0; i < width; i += kLanes) {
      Ints allowed = real;
      if (rules.causal) {
        const Ints position =
            lane_numbers() + static_cast<int32_t>(p.query_offset + queries.first + i);
        allowed &= position >= static_cast<int32_t>(key);
      }
      const int64_t at = j * width + i;
      const Entries entries =
          entries_of(rules, load(scores + at), load(grad_probs + at), load(lanes.negative_lse2 + i),
                     load(lanes.delta + i), allowed, load_as<Words>(lanes.keys + i),
                     load_as<Words>(lanes.multipliers + i), word);
      store(grad_probs + at, entries.grad_score);
    }
  }
}

inline void backward_row(const Problem& p, int64_t b, int64_t h, int64_t row, float* memory) {
  const Workspace w(p, memory);
  const int64_t kv_head = h / (p.heads / p.kv_heads);
  const int32_t* pointers = p.row_ptr + layout_index(p, h) * (p.num_rows + 1) + row;
  for_pieces(queries_of(p, row), p.query_ends[b], [&](const Piece& queries) {
    const int64_t width = round_up(queries.count, kLanes);
    const QueryLanes lanes(p, b, h, queries, width);
    pack_owner(p, p.q, b, h, queries, width, w.partner[0], w.owner[0]);
    pack_owner(p, p.grad, b, h, queries, width, w.partner[0], w.owner[1]);
    fill(w.sum[0], p.head_dim * width, 0.0f);
    for (int32_t entry = pointers[0]; entry < pointers[1]; ++entry) {
      for_pieces(keys_of(p, p.col_idx[entry]), p.key_ends[b], [&](const Piece& keys) {
        if (all_in_future(p, queries, keys) || all_padding(p, b, keys)) return;
        const Rows k = partner_rows(p, p.k, b, kv_head, keys, false, w.partner[0]);
        const Rows v = partner_rows(p, p.v, b, kv_head, keys, false, w.partner[1]);
        multiply<false, false>(keys.count, width, p.head_dim, k.data, k.stride, w.owner[0], width,
                               w.tile[0], width);
        multiply<false, false>(keys.count, width, p.head_dim, v.data, v.stride, w.owner[1], width,
                               w.tile[1], width);
        query_lane_gradients(p, b, lanes, queries, keys, width, w.tile[0], w.tile[1]);
        multiply<true, true>(p.head_dim, width, keys.count, k.data, k.stride, w.tile[1], width,
                             w.sum[0], width);
      });
    }
    store_transposed(p.dtype, p.dq, b, h, queries.first, queries.count, width, p.head_dim, w.sum[0],
                     w.partner[0]);
  });
  const Piece rest = rest_of_block(queries_of(p, row), p.query_ends[b], p.queries);
  store_zeros(p.dtype, p.dq, b, h, rest.first, rest.count, p.head_dim);
}

// scores (queries, width) become probabilities after dropout, grad_probs the gradients of the
// unscaled scores. real: (width) -1 for a real key, else 0.
inline void key_lane_gradients(const Problem& p, int64_t b, int64_t h, const Piece& queries,
                               const Piece& keys, int64_t width, const int32_t* real,
                               const uint32_t* column_words, float* scores, float* grad_probs) {
  const EntryRules rules(p, b, queries, keys);
  const int64_t row = (b * p.heads + h) * p.queries + queries.first;
  for (int64_t i = 0; i < queries.count; ++i) {
    const int32_t position = static_cast<int32_t>(p.query_offset + queries.first + i);
    const uint32_t own_key = rules.dropout ? row_key(p, b, h, queries.first + i) : 0u;
    const Words row_keys = Words{} + own_key;
    const Words multipliers = Words{} + row_multiplier(own_key);
    const Floats negative_lse2 = all(-p.lse[row + i] * kLog2e);
    const Floats delta = all(p.delta[row + i]);
    for (int64_t j = 0; j < width; j += kLanes) {
      const Ints key = lane_numbers() + static_cast<int32_t>(keys.first + j);
      Ints allowed = load_as<Ints>(real + j);
      if (rules.causal) allowed &= key <= position;
      const int64_t at = i * width + j;
      const Entries entries = entries_of(rules, load(scores + at), load(grad_probs + at), negative_lse2,
                                         delta, allowed, row_keys, multipliers,
                                         load_as<Words>(column_words + j));
      store(scores + at, entries.dropped);
      store(grad_probs + at, entries.grad_score);
    }
  }
}

inline void backward_column(const Problem& p, int64_t b, int64_t kv_head, int64_t column,
                            const QueryGradients* dq, float* memory) {
  const Workspace w(p, memory);
  const int64_t group = p.heads / p.kv_heads;
  for_pieces(keys_of(p, column), p.key_ends[b], [&](const Piece& keys) {
    const bool visible = !all_padding(p, b, keys);
    const int64_t width = round_up(keys.count, kLanes);
    uint32_t column_words[kPiece];
    fill_column_words(keys, column_words);
    int32_t real[kPiece];
    for (int64_t j = 0; j < width; ++j) {
      real[j] = j < keys.count && is_real(p, b, keys.first + j) ? -1 : 0;
    }
    pack_owner(p, p.v, b, kv_head, keys, width, w.partner[2], w.owner[1]);
    const Rows k = partner_rows(p, p.k, b, kv_head, keys, true, w.partner[2]);
    pack_transposed(k, keys.count, width, p.head_dim, w.owner[0]);
    fill(w.sum[0], p.head_dim * width, 0.0f);
    fill(w.sum[1], p.head_dim * width, 0.0f);
    for (int64_t member = 0; member < group && visible; ++member) {
      const int64_t h = kv_head * group + member;
      const int32_t* pointers = p.col_ptr + layout_index(p, h) * (p.num_cols + 1) + column;
      for (int32_t entry = pointers[0]; entry < pointers[1]; ++entry) {
        for_pieces(queries_of(p, p.row_idx[entry]), p.query_ends[b], [&](const Piece& queries) {
          if (all_in_future(p, queries, keys)) return;
          const Rows q = partner_rows(p, p.q, b, h, queries, false, w.partner[0]);
          const Rows grad = partner_rows(p, p.grad, b, h, queries, false, w.partner[1]);
          multiply<false, false>(queries.count, width, p.head_dim, q.data, q.stride, w.owner[0],
                                 width, w.tile[0], width);
          multiply<false, false>(queries.count, width, p.head_dim, grad.data, grad.stride,
                                 w.owner[1], width, w.tile[1], width);
          key_lane_gradients(p, b, h, queries, keys, width, real, column_words, w.tile[0],
                             w.tile[1]);
          multiply<true, true>(p.head_dim, width, queries.count, grad.data, grad.stride, w.tile[0],
                               width, w.sum[1], width);
          multiply<true, true>(p.head_dim, width, queries.count, q.data, q.stride, w.tile[1], width,
                               w.sum[0], width);
          if (dq == nullptr) return;
          multiply<true, false>(queries.count, round_up(p.head_dim, kLanes), keys.count, w.tile[1],
                                width, k.data, k.stride,
                                dq->data + member * dq->head + queries.first * dq->token,
                                dq->token);
        });
      }
    }
    store_transposed(p.dtype, p.dk, b, kv_head, keys.first, keys.count, width, p.head_dim, w.sum[0],
                     w.partner[0]);
    store_transposed(p.dtype, p.dv, b, kv_head, keys.first, keys.count, width, p.head_dim, w.sum[1],
                     w.partner[0]);
  });
  const Piece rest = rest_of_block(keys_of(p, column), p.key_ends[b], p.keys);
  store_zeros(p.dtype, p.dk, b, kv_head, rest.first, rest.count, p.head_dim);
  store_zeros(p.dtype, p.dv, b, kv_head, rest.first, rest.count, p.head_dim);
}

inline void store_dq(const Problem& p, int64_t b, int64_t h, const float* gradients,
                     int64_t stride) {
  for (int64_t query = 0; query < p.queries; ++query) {
    store_row(p.dtype, p.dq.data, offset(p.dq, b, h, query), p.head_dim,
              gradients + query * stride);
  }
}

}  // namespace
