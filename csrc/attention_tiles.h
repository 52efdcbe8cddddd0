// Block-sparse attention, the kernels of one instruction set.
//
// A kernel owns up to kPiece tokens of one block: queries in the row kernels, keys in the column
// kernel. Owners are the lanes of vectors, and partners (tokens of the kept blocks of the other
// side, kPiece at a time) are broadcast. So the softmax over a query's keys needs no sums across
// lanes, and strided partners need no copy. Owners' values are packed as (head_dim, width).
//
// An element of dq, dk or dv is one chain of multiply_adds over its partners in ascending order,
// whichever kernel makes it, so the bits do not depend on how the work is shared out.

#pragma once

#include "attention_kernels.h"
#include "attention_matmul.h"
#include "attention_tokens.h"

namespace {

using spion_ds::Kernels;
using spion_ds::Problem;
using spion_ds::QueryGradients;

constexpr int64_t kPiece = 64;
// Below every score yet finite, so that a row that has met no key yet is no special case.
constexpr float kLowest = -3.0e38f;
constexpr float kInfinity = __builtin_inff();
// Exponentials are powers of two, whose argument needs no division into parts.
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

SPION_DS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Consecutive tokens of one block.
struct Piece {
  int64_t first;
  int64_t count;
};

// Calls visit(piece) for the pieces of a block, in ascending order.
template <class Visit>
SPION_DS_INLINE void for_pieces(int64_t block_index, int64_t block, int64_t tokens, Visit visit) {
  const int64_t end = smaller((block_index + 1) * block, tokens);
  for (int64_t first = block_index * block; first < end; first += kPiece) {
    visit(Piece{first, smaller(kPiece, end - first)});
  }
}

// The buffers of one thread.
struct Workspace {
  Workspace(const Problem& p, float* memory) {
    const int64_t wide = round_up(smaller(p.block, kPiece), kLanes);
    const int64_t packed = p.head_dim * wide;
    const int64_t rows = smaller(p.block, kPiece) * round_up(p.head_dim, kLanes);
    const int64_t scores = smaller(p.block, kPiece) * wide;
    float* next = memory;
    const auto take = [&next](int64_t floats) {
      float* taken = next;
      next += round_up(floats, 16);
      return taken;
    };
    for (float*& buffer : owner) buffer = take(packed);
    for (float*& buffer : sum) buffer = take(packed);
    for (float*& buffer : partner) buffer = take(rows);
    for (float*& buffer : tile) buffer = take(scores);
    total = next - memory;
  }

  float* owner[2];    // (head_dim, width) values of the owners
  float* sum[2];      // (head_dim, width) results of the owners
  float* partner[3];  // (count, padded head_dim) values of the partners
  float* tile[2];     // (partners, width) scores, probabilities, their gradients
  int64_t total;      // floats
};

inline int64_t layout_index(const Problem& p, int64_t h) { return p.layout_per_head ? h : 0; }

inline int64_t real_keys(const Problem& p, int64_t b, int64_t first, int64_t end) {
  if (p.seen == nullptr) return end - first;
  const int32_t* seen = p.seen + b * (p.keys + 1);
  return seen[end] - seen[first];
}

inline bool is_real(const Problem& p, int64_t b, int64_t key) {
  return p.real == nullptr || p.real[b * p.keys + key] != 0;
}

// A key block without a real key is left out everywhere.
inline bool has_real_key(const Problem& p, int64_t b, int64_t column) {
  return real_keys(p, b, column * p.block, smaller((column + 1) * p.block, p.keys)) > 0;
}

// Whether every key of a piece comes after every query of the other.
SPION_DS_INLINE bool all_in_future(const Problem& p, const Piece& queries, const Piece& keys) {
  return p.causal && keys.first >= queries.first + queries.count;
}

SPION_DS_INLINE bool some_in_future(const Problem& p, const Piece& queries, const Piece& keys) {
  return p.causal && keys.first + keys.count - 1 > queries.first;
}

inline uint32_t row_key(const Problem& p, int64_t b, int64_t h, int64_t query) {
  const uint32_t sample = static_cast<uint32_t>(p.dropout_key[b]);
  return combine(combine(sample, static_cast<uint32_t>(h)), static_cast<uint32_t>(query));
}

// All ones in the lanes that dropout keeps.
SPION_DS_INLINE Ints dropout_keeps(uint32_t threshold, Words row_keys, Words columns) {
  return (combine(row_keys, columns) >> 8) >= threshold;
}

// What the lanes of a piece of queries need besides their values.
struct QueryLanes {
  QueryLanes(const Problem& p, int64_t b, int64_t h, const Piece& queries, int64_t width) {
    const int64_t row = (b * p.heads + h) * p.queries + queries.first;
    for (int64_t i = 0; i < width; ++i) {
      const bool there = i < queries.count;
      keys[i] = there && p.dropout_key != nullptr ? row_key(p, b, h, queries.first + i) : 0;
      // A lane past the last query acts as a row that keeps nothing.
      negative_lse2[i] = there && p.grad.data != nullptr ? -p.lse[row + i] * kLog2e : -kInfinity;
      delta[i] = there && p.grad.data != nullptr ? p.delta[row + i] : 0.0f;
    }
  }

  uint32_t keys[kPiece];
  float negative_lse2[kPiece];
  float delta[kPiece];
};

// Writes -inf to the scores (keys.count, width) that padding or causality excludes.
inline void mask_scores(const Problem& p, int64_t b, const Piece& queries, const Piece& keys,
                        int64_t width, float* scores) {
  const bool causal = some_in_future(p, queries, keys);
  if (!causal && p.real == nullptr) return;
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = keys.first + j;
    // Lanes before `from` are excluded.
    int64_t from = causal && key > queries.first ? smaller(key - queries.first, width) : 0;
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
  const uint32_t threshold = p.dropout_threshold;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats old_top = load(top + i);
    const Floats new_top = maximum(old_top, column_maximum(scores + i, keys.count, width));
    const Floats shrink = exp2_of_negative(old_top - new_top);
    const Words row_keys = load_as<Words>(lanes.keys + i);
    Floats added = {};
    for (int64_t j = 0; j < keys.count; ++j) {
      Floats weight = exp2_of_negative(load(scores + j * width + i) - new_top);
      added += weight;
      if (dropout) {
        const Words column = Words{} + static_cast<uint32_t>(keys.first + j);
        weight = dropout_keeps(threshold, row_keys, column) ? weight : Floats{};
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
    const int64_t end = p.causal ? smaller(queries.first + i + 1, p.keys) : p.keys;
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
    if (total[i] == 0.0f) {
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

// Packs a piece's values as (head_dim, width).
inline void pack_owner(const Problem& p, const Tokens& x, int64_t b, int64_t h, const Piece& piece,
                       int64_t width, float* buffer, float* to) {
  const Rows rows = rows_of(p.dtype, x, b, h, piece.first, piece.count, p.head_dim, false, buffer);
  pack_transposed(rows, piece.count, width, p.head_dim, to);
}

inline Rows partner_rows(const Problem& p, const Tokens& x, int64_t b, int64_t h,
                         const Piece& piece, bool padded, float* buffer) {
  return rows_of(p.dtype, x, b, h, piece.first, piece.count, p.head_dim, padded, buffer);
}

inline void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

inline void forward_row(const Problem& p, int64_t b, int64_t h, int64_t row, float* memory) {
  const Workspace w(p, memory);
  const int64_t kv_head = h / (p.heads / p.kv_heads);
  const int32_t* pointers = p.row_ptr + layout_index(p, h) * (p.num_rows + 1) + row;
  for_pieces(row, p.block, p.queries, [&](const Piece& queries) {
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
      const int64_t column = p.col_idx[entry];
      if (!has_real_key(p, b, column)) continue;
      for_pieces(column, p.block, p.keys, [&](const Piece& keys) {
        if (all_in_future(p, queries, keys)) return;
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
}

inline void write_delta(const Problem& p, int64_t b, int64_t h, int64_t row, float* memory) {
  const Workspace w(p, memory);
  const int64_t end = smaller((row + 1) * p.block, p.queries);
  for (int64_t query = row * p.block; query < end; ++query) {
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
  explicit EntryRules(const Problem& p)
      : scale(p.scale),
        scale_log2(p.scale * kLog2e),
        dropout_scale(p.dropout_scale),
        dropout_threshold(p.dropout_threshold),
        dropout(p.dropout_key != nullptr),
        causal(p.causal),
        masked(p.causal || p.real != nullptr) {}

  float scale, scale_log2, dropout_scale;
  uint32_t dropout_threshold;
  bool dropout, causal, masked;
};

// The probability, after dropout, and the gradient of the unscaled score, of some entries.
struct Entries {
  Floats dropped;
  Floats grad_score;
};

SPION_DS_INLINE Entries entries_of(const EntryRules& rules, Floats score, Floats grad_prob,
                                   Floats negative_lse2, Floats delta, Ints allowed,
                                   Words row_keys, Words columns) {
  Floats prob = exp2_of_negative(multiply_add(score, all(rules.scale_log2), negative_lse2));
  if (rules.masked) prob = allowed ? prob : Floats{};
  Floats dropped = prob;
  if (rules.dropout) {
    const Ints keep = dropout_keeps(rules.dropout_threshold, row_keys, columns);
    dropped = keep ? prob * rules.dropout_scale : Floats{};
    grad_prob = keep ? grad_prob * rules.dropout_scale : Floats{};
  }
  return {dropped, prob * (grad_prob - delta) * rules.scale};
}

// grad_probs (keys, width) becomes the gradients of the unscaled scores.
inline void query_lane_gradients(const Problem& p, int64_t b, const QueryLanes& lanes,
                                 const Piece& queries, const Piece& keys, int64_t width,
                                 const float* scores, float* grad_probs) {
  const EntryRules rules(p);
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = keys.first + j;
    const Words column = Words{} + static_cast<uint32_t>(key);
    const Ints real = Ints{} - (is_real(p, b, key) ? 1 : 0);
    for (int64_t i = 0; i < width; i += kLanes) {
      Ints allowed = real;
      if (rules.causal) {
        const Ints query = lane_numbers() + static_cast<int32_t>(queries.first + i);
        allowed &= query >= static_cast<int32_t>(key);
      }
      const int64_t at = j * width + i;
      const Entries entries =
          entries_of(rules, load(scores + at), load(grad_probs + at), load(lanes.negative_lse2 + i),
                     load(lanes.delta + i), allowed, load_as<Words>(lanes.keys + i), column);
      store(grad_probs + at, entries.grad_score);
    }
  }
}

inline void backward_row(const Problem& p, int64_t b, int64_t h, int64_t row, float* memory) {
  const Workspace w(p, memory);
  const int64_t kv_head = h / (p.heads / p.kv_heads);
  const int32_t* pointers = p.row_ptr + layout_index(p, h) * (p.num_rows + 1) + row;
  for_pieces(row, p.block, p.queries, [&](const Piece& queries) {
    const int64_t width = round_up(queries.count, kLanes);
    const QueryLanes lanes(p, b, h, queries, width);
    pack_owner(p, p.q, b, h, queries, width, w.partner[0], w.owner[0]);
    pack_owner(p, p.grad, b, h, queries, width, w.partner[0], w.owner[1]);
    fill(w.sum[0], p.head_dim * width, 0.0f);
    for (int32_t entry = pointers[0]; entry < pointers[1]; ++entry) {
      const int64_t column = p.col_idx[entry];
      if (!has_real_key(p, b, column)) continue;
      for_pieces(column, p.block, p.keys, [&](const Piece& keys) {
        if (all_in_future(p, queries, keys)) return;
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
}

// scores (queries, width) become probabilities after dropout, grad_probs the gradients of the
// unscaled scores. real: (width) -1 for a real key, else 0.
inline void key_lane_gradients(const Problem& p, int64_t b, int64_t h, const Piece& queries,
                               const Piece& keys, int64_t width, const int32_t* real,
                               float* scores, float* grad_probs) {
  const EntryRules rules(p);
  const int64_t row = (b * p.heads + h) * p.queries + queries.first;
  for (int64_t i = 0; i < queries.count; ++i) {
    const int32_t query = static_cast<int32_t>(queries.first + i);
    const Words row_keys =
        Words{} + (rules.dropout ? row_key(p, b, h, queries.first + i) : 0u);
    const Floats negative_lse2 = all(-p.lse[row + i] * kLog2e);
    const Floats delta = all(p.delta[row + i]);
    for (int64_t j = 0; j < width; j += kLanes) {
      const Ints key = lane_numbers() + static_cast<int32_t>(keys.first + j);
      Ints allowed = load_as<Ints>(real + j);
      if (rules.causal) allowed &= key <= query;
      const int64_t at = i * width + j;
      const Entries entries = entries_of(rules, load(scores + at), load(grad_probs + at), negative_lse2,
                                         delta, allowed, row_keys, bits<Words>(key));
      store(scores + at, entries.dropped);
      store(grad_probs + at, entries.grad_score);
    }
  }
}

inline void backward_column(const Problem& p, int64_t b, int64_t kv_head, int64_t column,
                            const QueryGradients* dq, float* memory) {
  const Workspace w(p, memory);
  const int64_t group = p.heads / p.kv_heads;
  const bool visible = has_real_key(p, b, column);
  for_pieces(column, p.block, p.keys, [&](const Piece& keys) {
    const int64_t width = round_up(keys.count, kLanes);
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
        for_pieces(p.row_idx[entry], p.block, p.queries, [&](const Piece& queries) {
          if (all_in_future(p, queries, keys)) return;
          const Rows q = partner_rows(p, p.q, b, h, queries, false, w.partner[0]);
          const Rows grad = partner_rows(p, p.grad, b, h, queries, false, w.partner[1]);
          multiply<false, false>(queries.count, width, p.head_dim, q.data, q.stride, w.owner[0],
                                 width, w.tile[0], width);
          multiply<false, false>(queries.count, width, p.head_dim, grad.data, grad.stride,
                                 w.owner[1], width, w.tile[1], width);
          key_lane_gradients(p, b, h, queries, keys, width, real, w.tile[0], w.tile[1]);
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
}

inline void store_dq(const Problem& p, int64_t b, int64_t h, const float* gradients,
                     int64_t stride) {
  for (int64_t query = 0; query < p.queries; ++query) {
    store_row(p.dtype, p.dq.data, offset(p.dq, b, h, query), p.head_dim,
              gradients + query * stride);
  }
}

constexpr Kernels this_instruction_set() {
  return {[](const Problem& p) { return Workspace(p, nullptr).total; },
          [](const Problem& p) { return round_up(p.head_dim, kLanes); },
          forward_row,
          write_delta,
          backward_row,
          backward_column,
          store_dq};
}

}  // namespace
