// The CPU operator of attention maps: pooled while they are computed, in memory for tiles and
// block sums. The specification is spion_ds/attention/streaming_maps.py.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_operators.h"

namespace {

using spion_ds::kMapKeys;
using spion_ds::kMapQueries;
using spion_ds::MapProblem;
using spion_ds::MapSums;

void check(const Tensor& q, const Tensor& k, const std::optional<Tensor>& real,
           const Tensor& row_weights, int64_t block, int64_t filter_size) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                  q.size(3) == k.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "attention_map: q is (batch, heads, L, head_dim) and k (batch, kv_heads, L, ",
              "head_dim), kv_heads dividing heads; got ", q.sizes(), ", ", k.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type(), "attention_map: q and k share a dtype");
  TORCH_CHECK(row_weights.dim() == 1 && row_weights.size(0) == q.size(2) &&
                  row_weights.scalar_type() == at::kDouble,
              "attention_map: row_weights is float64 (L,)");
  TORCH_CHECK(!real || (real->scalar_type() == at::kBool && real->dim() == 2 &&
                        real->size(0) == q.size(0) && real->size(1) == q.size(2)),
              "attention_map: key_padding_mask is bool (batch, L)");
  TORCH_CHECK(1 <= block && block <= q.size(2) && q.size(2) < (int64_t{1} << 31),
              "attention_map: block is 1 to L, and L less than 2^31");
  TORCH_CHECK(filter_size >= 1 && filter_size % 2 == 1, "attention_map: filter_size is odd");
}

// The tasks of the second pass: kMapQueries queries with a span of keys, whole tiles that are
// together at least a block, so that the sums of all tasks have the size of the result.
struct Tasks {
  Tasks(const MapProblem& m, bool moments) {
    const int64_t length = m.attention.queries;
    const int64_t span = ceil_div(m.block, kMapKeys) * kMapKeys;
    int64_t total = 0;
    for (int64_t query = 0; query < length; query += kMapQueries) {
      for (int64_t key = 0; key < length; key += span) {
        Task task{query, key, std::min(key + span, length), total, {}};
        reach(m, query, std::min(query + kMapQueries, length), task.sums.first_row,
              task.sums.rows);
        reach(m, key, task.end, task.sums.first_column, task.sums.columns);
        total += task.sums.rows * task.sums.columns;
        tasks.push_back(task);
      }
    }
    blocks.resize(total);
    powers.resize(moments ? 2 * tasks.size() : 0);
    for (size_t number = 0; number < tasks.size(); ++number) {
      tasks[number].sums.blocks = blocks.data() + tasks[number].place;
      tasks[number].sums.moments = moments ? powers.data() + 2 * number : nullptr;
    }
  }

  // The blocks that tokens from `begin` to `end` reach when they are shifted.
  static void reach(const MapProblem& m, int64_t begin, int64_t end, int64_t& first,
                    int64_t& count) {
    first = std::max<int64_t>(0, begin - m.half) / m.block;
    count = std::min(m.attention.queries - 1, end - 1 + m.half) / m.block - first + 1;
  }

  struct Task {
    int64_t query, key, end, place;
    MapSums sums;
  };

  std::vector<Task> tasks;
  std::vector<double> blocks;
  std::vector<double> powers;
};

std::tuple<Tensor, Tensor> add_up(const Tasks& tasks, int64_t n, bool moments) {
  const auto options = at::TensorOptions().dtype(at::kDouble);
  Tensor total = at::zeros({n, n}, options);
  Tensor powers = at::zeros({moments ? 2 : 0}, options);
  double* to = total.mutable_data_ptr<double>();
  // In the order of the tasks, whichever thread did them.
  for (const Tasks::Task& task : tasks.tasks) {
    const MapSums& sums = task.sums;
    for (int64_t row = 0; row < sums.rows; ++row) {
      for (int64_t column = 0; column < sums.columns; ++column) {
        to[(sums.first_row + row) * n + sums.first_column + column] +=
            sums.blocks[row * sums.columns + column];
      }
    }
    for (int64_t power = 0; moments && power < 2; ++power) {
      powers.mutable_data_ptr<double>()[power] += sums.moments[power];
    }
  }
  return {total, powers};
}

std::tuple<Tensor, Tensor> pooled(const Tensor& q_in, const Tensor& k_in,
                                  const std::optional<Tensor>& key_padding_mask,
                                  const Tensor& row_weights_in, int64_t block,
                                  int64_t filter_size, double scale, bool causal,
                                  std::optional<double> mean) {
  check(q_in, k_in, key_padding_mask, row_weights_in, block, filter_size);
  const Tensor q = unit_stride(q_in), k = unit_stride(k_in);
  const Tensor row_weights = row_weights_in.contiguous();
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2);
  Tensor statistics = at::empty({2, batch, heads, length}, q.options().dtype(at::kFloat));

  MapProblem m{};
  Problem& p = m.attention;
  p.dtype = dtype_of(q);
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = k.size(1);
  p.queries = p.keys = length;
  p.head_dim = q.size(3);
  p.block = kMapQueries;
  p.causal = causal;
  p.scale = static_cast<float>(scale);
  p.q = tokens_of(q);
  p.k = tokens_of(k);
  Tensor real, seen;
  if (key_padding_mask) {
    real = key_padding_mask->contiguous();
    seen = at::empty({batch, length + 1}, real.options().dtype(at::kInt));
    const bool* is_real = real.const_data_ptr<bool>();
    for (int64_t b = 0; b < batch; ++b) {
      count_seen(is_real + b * length, length,
                 seen.mutable_data_ptr<int32_t>() + b * (length + 1));
    }
    p.real = reinterpret_cast<const uint8_t*>(is_real);
    p.seen = seen.const_data_ptr<int32_t>();
  }
  m.block = block;
  m.half = filter_size / 2;
  m.mean = mean.value_or(0.0);
  m.row_weights = row_weights.const_data_ptr<double>();
  m.top = statistics.mutable_data_ptr<float>();
  m.inverse = m.top + batch * heads * length;

  const Kernels& run = kernels();
  const int64_t floats = run.map_workspace_floats(m);
  const int64_t strips = ceil_div(length, kMapQueries);
  run_tasks(batch * heads * strips, floats, [&](int64_t number, float* workspace) {
    // From the last strip on: with causality it is the longest.
    const int64_t query = (strips - 1 - number % strips) * kMapQueries;
    run.map_softmax(m, number / strips / heads, number / strips % heads, query, workspace);
  });
  const Tasks tasks(m, mean.has_value());
  const int64_t count = static_cast<int64_t>(tasks.tasks.size());
  run_tasks(count, floats, [&](int64_t number, float* workspace) {
    const Tasks::Task& task = tasks.tasks[count - 1 - number];
    for (int64_t key = task.key; key < task.end; key += kMapKeys) {
      run.map_tile(m, task.query, key, task.sums, workspace);
    }
  });
  return add_up(tasks, ceil_div(length, block), mean.has_value());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spion_ds, m) {
  m.def(
      "attention_map_pooled(Tensor q, Tensor k, Tensor? key_padding_mask, Tensor row_weights, "
      "int block, int filter_size, float scale, bool causal, float? mean=None) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(spion_ds, CPU, m) { m.impl("attention_map_pooled", &pooled); }
