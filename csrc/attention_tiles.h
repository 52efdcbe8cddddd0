// How the kernels of block-sparse attention cut their work, and what they share.
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

// The tokens of a block, which may end past the sequence.
struct Range {
  int64_t first;
  int64_t end;
};

SPION_DS_INLINE Range keys_of(const Problem& p, int64_t column) {
  return {column * p.block, (column + 1) * p.block};
}

// The queries of a row of blocks, numbered as they lie in q.
SPION_DS_INLINE Range queries_of(const Problem& p, int64_t row) {
  const int64_t before = p.query_offset % p.block;
  return {row == 0 ? 0 : row * p.block - before, (row + 1) * p.block - before};
}

// Calls visit(piece) for the pieces of a block's tokens before `end`, in ascending order.
template <class Visit>
SPION_DS_INLINE void for_pieces(const Range& tokens, int64_t end, Visit visit) {
  end = smaller(tokens.end, end);
  for (int64_t first = tokens.first; first < end; first += kPiece) {
    visit(Piece{first, smaller(kPiece, end - first)});
  }
}

// Those of a block's tokens that for_pieces leaves out: from `end` on, of `count` in all blocks.
inline Piece rest_of_block(const Range& tokens, int64_t end, int64_t count) {
  const int64_t first = end > tokens.first ? end : tokens.first;
  const int64_t last = smaller(tokens.end, count);
  return {first, last > first ? last - first : 0};
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

// Keys without a real one among them are left out everywhere.
inline bool all_padding(const Problem& p, int64_t b, const Piece& keys) {
  return real_keys(p, b, keys.first, keys.first + keys.count) == 0;
}

inline bool some_padding(const Problem& p, int64_t b, const Piece& keys) {
  return real_keys(p, b, keys.first, keys.first + keys.count) < keys.count;
}

// Whether every key of a piece comes after every query of the other.
SPION_DS_INLINE bool all_in_future(const Problem& p, const Piece& queries, const Piece& keys) {
  return p.causal && keys.first >= p.query_offset + queries.first + queries.count;
}

SPION_DS_INLINE bool some_in_future(const Problem& p, const Piece& queries, const Piece& keys) {
  return p.causal && keys.first + keys.count - 1 > p.query_offset + queries.first;
}

inline uint32_t row_key(const Problem& p, int64_t b, int64_t h, int64_t query) {
  const uint32_t sample = static_cast<uint32_t>(p.dropout_key[b]);
  return combine(combine(sample, static_cast<uint32_t>(h)), static_cast<uint32_t>(query));
}

// The words of a piece's columns; past the piece they are nobody's.
SPION_DS_INLINE void fill_column_words(const Piece& keys, uint32_t (&words)[kPiece]) {
  for (int64_t j = 0; j < kPiece; ++j) words[j] = column_word(static_cast<uint32_t>(keys.first + j));
}

// What the lanes of a piece of queries need besides their values.
struct QueryLanes {
  QueryLanes(const Problem& p, int64_t b, int64_t h, const Piece& queries, int64_t width) {
    const int64_t row = (b * p.heads + h) * p.queries + queries.first;
    for (int64_t i = 0; i < width; ++i) {
      const bool there = i < queries.count;
      keys[i] = there && p.dropout_key != nullptr ? row_key(p, b, h, queries.first + i) : 0;
      multipliers[i] = row_multiplier(keys[i]);
      // A lane past the last query acts as a row that keeps nothing.
      negative_lse2[i] = there && p.grad.data != nullptr ? -p.lse[row + i] * kLog2e : -kInfinity;
      delta[i] = there && p.grad.data != nullptr ? p.delta[row + i] : 0.0f;
    }
  }

  uint32_t keys[kPiece];  // of dropout
  uint32_t multipliers[kPiece];
  float negative_lse2[kPiece];
  float delta[kPiece];
};

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

}  // namespace
