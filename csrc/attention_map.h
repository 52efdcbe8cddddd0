// The kernels of attention maps: a tile of the map, summed over samples and heads, goes into block
// sums and is forgotten. Queries are lanes, as in the other kernels.

#pragma once

#include "attention_forward.h"

namespace {

using spion_ds::kMapKeys;
using spion_ds::kMapQueries;
using spion_ds::MapProblem;
using spion_ds::MapSums;

static_assert(kMapQueries == kPiece && kMapKeys % kPiece == 0, "a tile is made of whole pieces");

// The buffers of one thread: those of a block of kPiece tokens, and a tile's sums.
struct MapWorkspace : Workspace {
  MapWorkspace(const MapProblem& m, float* memory)
      : Workspace(m.attention, memory),
        sums(memory + total),
        doubles(reinterpret_cast<double*>(sums + kMapKeys * kMapQueries)) {
    total += 3 * kMapKeys * kMapQueries;
  }

  float* sums;      // (keys, width)
  double* doubles;  // (keys, width)
};

inline int64_t map_workspace_floats(const MapProblem& m) { return MapWorkspace(m, nullptr).total; }

inline Piece queries_from(const Problem& p, int64_t query) {
  return {query, smaller(kMapQueries, p.queries - query)};
}

// Queries of a piece as lanes, scaled to scores in base 2.
inline void pack_queries(const Problem& p, int64_t b, int64_t h, const Piece& queries,
                         int64_t width, const Workspace& w) {
  pack_owner(p, p.q, b, h, queries, width, w.partner[0], w.owner[0]);
  for (int64_t i = 0; i < p.head_dim * width; i += kLanes) {
    store(w.owner[0] + i, load(w.owner[0] + i) * (p.scale * kLog2e));
  }
}

// Calls visit(keys, scores) for the pieces of the keys from `first` to `end` that some query sees;
// scores (keys, width) are -inf where a key is excluded.
template <class Visit>
SPION_DS_INLINE void for_scores(const Problem& p, int64_t b, int64_t h, const Piece& queries,
                                int64_t width, int64_t first, int64_t end, const Workspace& w,
                                Visit visit) {
  const int64_t kv_head = h / (p.heads / p.kv_heads);
  for (; first < end; first += kPiece) {
    const Piece keys{first, smaller(kPiece, end - first)};
    if (all_in_future(p, queries, keys)) return;
    if (real_keys(p, b, first, first + keys.count) == 0) continue;
    const Rows k = partner_rows(p, p.k, b, kv_head, keys, false, w.partner[0]);
    multiply<false, false>(keys.count, width, p.head_dim, k.data, k.stride, w.owner[0], width,
                           w.tile[0], width);
    mask_scores(p, b, queries, keys, width, w.tile[0]);
    visit(keys, w.tile[0]);
  }
}

inline void map_softmax(const MapProblem& m, int64_t b, int64_t h, int64_t query, float* memory) {
  const Problem& p = m.attention;
  const MapWorkspace w(m, memory);
  const Piece queries = queries_from(p, query);
  const int64_t width = round_up(queries.count, kLanes);
  float top[kPiece], total[kPiece];
  fill(top, width, kLowest);
  fill(total, width, 0.0f);
  pack_queries(p, b, h, queries, width, w);
  for_scores(p, b, h, queries, width, 0, p.keys, w, [&](const Piece& keys, const float* scores) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats old_top = load(top + i);
      const Floats new_top = maximum(old_top, column_maximum(scores + i, keys.count, width));
      Floats added = {};
      for (int64_t j = 0; j < keys.count; ++j) {
        added += exp2_of_negative(load(scores + j * width + i) - new_top);
      }
      store(top + i, new_top);
      store(total + i, multiply_add(load(total + i), exp2_of_negative(old_top - new_top), added));
    }
  });
  const int64_t row = (b * p.heads + h) * p.queries + query;
  for (int64_t i = 0; i < queries.count; ++i) {
    const bool counts = total[i] != 0.0f && is_real(p, b, query + i);
    // Above every score: the probabilities of a row that is left out are 0, not infinity times 0.
    m.top[row + i] = counts ? top[i] : -kLowest;
    m.inverse[row + i] = counts ? 1.0f / total[i] : 0.0f;
  }
}

// sums (keys, width) += the probabilities of one head of one sample.
inline void add_probabilities(const MapProblem& m, int64_t b, int64_t h, const Piece& queries,
                              int64_t width, int64_t key, int64_t end, const MapWorkspace& w) {
  const Problem& p = m.attention;
  const int64_t row = (b * p.heads + h) * p.queries + queries.first;
  float top[kPiece] = {}, inverse[kPiece] = {};
  std::memcpy(top, m.top + row, queries.count * sizeof(float));
  std::memcpy(inverse, m.inverse + row, queries.count * sizeof(float));
  pack_queries(p, b, h, queries, width, w);
  for_scores(p, b, h, queries, width, key, end, w, [&](const Piece& keys, const float* scores) {
    float* sums = w.sums + (keys.first - key) * width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats of_top = load(top + i), of_inverse = load(inverse + i);
      for (int64_t j = i; j < keys.count * width; j += width) {
        const Floats weight = exp2_of_negative(load(scores + j) - of_top);
        store(sums + j, multiply_add(weight, of_inverse, load(sums + j)));
      }
    }
  });
}

// Moves sums into doubles.
inline void widen(const MapWorkspace& w, int64_t count) {
  for (int64_t i = 0; i < count; i += kDoubleLanes) {
    const auto added = __builtin_convertvector(load_as<HalfFloats>(w.sums + i), Doubles);
    store_as(w.doubles + i, load_as<Doubles>(w.doubles + i) + added);
  }
  fill(w.sums, count, 0.0f);
}

// values (keys, width) *= the weights of the rows.
inline void weigh(const MapProblem& m, const Piece& queries, int64_t width, int64_t keys,
                  double* values) {
  double weights[kPiece] = {};
  for (int64_t i = 0; i < queries.count; ++i) weights[i] = m.row_weights[queries.first + i];
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < width; i += kDoubleLanes) {
      double* value = values + j * width + i;
      store_as(value, load_as<Doubles>(value) * load_as<Doubles>(weights + i));
    }
  }
}

inline void add_moments(const MapProblem& m, int64_t queries, int64_t width, int64_t keys,
                        const double* values, double* moments) {
  double squares[kPiece] = {}, cubes[kPiece] = {};
  for (int64_t i = 0; i < width; i += kDoubleLanes) {
    Doubles square = {}, cube = {};
    for (int64_t j = 0; j < keys; ++j) {
      const Doubles distance = load_as<Doubles>(values + j * width + i) - m.mean;
      square += distance * distance;
      cube += distance * distance * distance;
    }
    store_as(squares + i, square);
    store_as(cubes + i, cube);
  }
  for (int64_t i = 0; i < queries; ++i) {
    moments[0] += squares[i];
    moments[1] += cubes[i];
  }
}

// How far each lane's query may be shifted by f, from low to high, to be in a row of blocks:
// query - f in [begin, end) and |f| <= half.
struct Shifts {
  Shifts(const Piece& queries, int64_t half, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < kPiece; ++i) {
      const int64_t query = queries.first + i;
      low[i] = static_cast<double>(query - end + 1 > -half ? query - end + 1 : -half);
      high[i] = static_cast<double>(smaller(query - begin, half));
    }
  }

  double low[kPiece];
  double high[kPiece];
};

// The sum over a tile's keys from `key` to `end`, and its lanes from `lane` to `last`, of values
// times the number of shifts that take the entry into the block: |[low, high] and
// [key - last column, key - first column]|.
SPION_DS_INLINE double block_sum(const Shifts& shifts, int64_t lane, int64_t last, int64_t width,
                                 int64_t key, int64_t end, int64_t first_column,
                                 int64_t last_column, const double* values) {
  double total = 0.0;
  for (; lane < last; lane += kDoubleLanes) {
    const Doubles low = load_as<Doubles>(shifts.low + lane);
    const Doubles high = load_as<Doubles>(shifts.high + lane) + 1.0;
    Doubles sum = {};
    for (int64_t c = key; c < end; ++c) {
      const Doubles from = Doubles{} + static_cast<double>(c - last_column);
      const Doubles to = Doubles{} + static_cast<double>(c - first_column + 1);
      const Doubles count = (high < to ? high : to) - (low > from ? low : from);
      sum += (count > 0.0 ? count : Doubles{}) * load_as<Doubles>(values + c * width + lane);
    }
    for (int64_t i = 0; i < kDoubleLanes; ++i) total += sum[i];
  }
  return total;
}

// Adds a tile's entries to the blocks that they reach.
inline void add_blocks(const MapProblem& m, const Piece& queries, int64_t width, int64_t key,
                       int64_t end, const double* values, const MapSums& to) {
  const int64_t length = m.attention.queries;
  values -= key * width;
  for (int64_t row = 0; row < to.rows; ++row) {
    const int64_t top = (to.first_row + row) * m.block;
    const int64_t bottom = smaller(top + m.block, length);
    const Shifts shifts(queries, m.half, top, bottom);
    const int64_t above = top - m.half - queries.first;
    const int64_t lane = above > 0 ? above / kDoubleLanes * kDoubleLanes : 0;
    const int64_t last = smaller(width, bottom + m.half - queries.first);
    for (int64_t column = 0; column < to.columns; ++column) {
      const int64_t left = (to.first_column + column) * m.block;
      const int64_t right = smaller(left + m.block, length);
      const int64_t from = left - m.half > key ? left - m.half : key;
      to.blocks[row * to.columns + column] +=
          block_sum(shifts, lane, last, width, from, smaller(end, right + m.half), left, right - 1,
                    values);
    }
  }
}

inline void map_tile(const MapProblem& m, int64_t query, int64_t key, const MapSums& to,
                     float* memory) {
  const Problem& p = m.attention;
  const MapWorkspace w(m, memory);
  const Piece queries = queries_from(p, query);
  const int64_t width = round_up(queries.count, kLanes);
  const int64_t end = smaller(key + kMapKeys, p.keys);
  const int64_t count = (end - key) * width;
  const bool empty = all_in_future(p, queries, Piece{key, end - key});
  if (empty && to.moments == nullptr) return;
  fill(w.sums, count, 0.0f);
  for (int64_t i = 0; i < count; ++i) w.doubles[i] = 0.0;
  const int64_t heads = empty ? 0 : p.batch * p.heads;
  for (int64_t bh = 0; bh < heads; ++bh) {
    add_probabilities(m, bh / p.heads, bh % p.heads, queries, width, key, end, w);
    // float32 for the heads of a sample, float64 from there on: after rounding, the sum over a batch is
    // the same in whatever shares it is made.
    if (bh % p.heads == p.heads - 1) widen(w, count);
  }
  weigh(m, queries, width, end - key, w.doubles);
  if (to.moments != nullptr) {
    add_moments(m, queries.count, width, end - key, w.doubles, to.moments);
  }
  if (!empty) add_blocks(m, queries, width, key, end, w.doubles, to);
}

}  // namespace
