// The CPU operators of block-sparse attention: checks, and who computes what.
// The specification is spion_ds/attention/reference.py; attention_tiles.h tells how the
// kernels work.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_operators.h"

namespace {

using spion_ds::QueryGradients;

// The share of threads that must be busy for the backward pass to hand out whole heads. Then it
// computes each score once instead of twice: 5 matrix products a block instead of 7.
constexpr double kWholeHeadsFrom = 0.75;

struct Layout {
  const Tensor& row_ptr;
  const Tensor& col_idx;
  const Tensor& col_ptr;
  const Tensor& row_idx;
};

struct Settings {
  int64_t block;
  double scale;
  bool causal;
  bool pruned_zero;
  double dropout_p;
  bool zero_padded_queries;
  int64_t query_offset;
};

// keep_threshold of spion_ds/attention/dropout.py.
int32_t keep_threshold(double p) {
  // nearbyint rounds ties to even, as Python's round does.
  const double words = std::min(std::nearbyint(std::ldexp(p, 32)), 4294967295.0);
  return static_cast<int32_t>(static_cast<int64_t>(words) - (int64_t{1} << 31));
}

// How many rows of blocks the queries stand in.
int64_t count_rows(const Tensor& q, const Settings& settings) {
  return ceil_div(settings.query_offset % settings.block + q.size(2), settings.block);
}

// Throws unless pointers (heads, blocks + 1) and indices describe blocks of a layout that exist.
void check_index(const char* name, const Tensor& pointers, const Tensor& indices, int64_t heads,
                 int64_t blocks, int64_t partners) {
  TORCH_CHECK(pointers.scalar_type() == at::kInt && indices.scalar_type() == at::kInt &&
                  pointers.is_contiguous() && indices.is_contiguous() && pointers.dim() == 2 &&
                  indices.dim() == 1,
              "cpu_attention: the ", name, " of a layout are contiguous int32, pointers (heads, ",
              "blocks + 1) and indices (kept,)");
  TORCH_CHECK((pointers.size(0) == 1 || pointers.size(0) == heads) &&
                  pointers.size(1) == blocks + 1,
              "cpu_attention: the layout has pointers of ", name, " ", pointers.sizes(),
              ", expected (1 or ", heads, ", ", blocks + 1, ")");
  const int32_t* pointer = pointers.const_data_ptr<int32_t>();
  const int32_t* index = indices.const_data_ptr<int32_t>();
  const bool ordered = pointer[0] == 0 && std::is_sorted(pointer, pointer + pointers.numel()) &&
                       pointer[pointers.numel() - 1] == indices.numel();
  const bool inside = std::all_of(index, index + indices.numel(),
                                  [&](int32_t i) { return i >= 0 && i < partners; });
  TORCH_CHECK(ordered && inside, "cpu_attention: the layout's ", name,
              " point outside its ", indices.numel(), " kept blocks or ", partners, " partners");
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Layout& layout,
           const std::optional<Tensor>& real, const std::optional<Tensor>& dropout_key,
           const Settings& settings) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
                  q.size(3) == k.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "cpu_attention: q is (batch, heads, L, head_dim), k and v (batch, kv_heads, M, ",
              "head_dim), kv_heads dividing heads; got ", q.sizes(), ", ", k.sizes(), ", ",
              v.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "cpu_attention: q, k and v share a dtype");
  TORCH_CHECK(settings.block >= 1 && std::max(q.size(2), k.size(2)) < (int64_t{1} << 31),
              "cpu_attention: block is at least 1 and a sequence shorter than 2^31");
  TORCH_CHECK(settings.dropout_p >= 0.0 && settings.dropout_p < 1.0,
              "cpu_attention: dropout_p is in [0, 1), got ", settings.dropout_p);
  TORCH_CHECK(settings.query_offset >= 0 && settings.query_offset < (int64_t{1} << 31) - q.size(2),
              "cpu_attention: query_offset is 0 or more, and positions less than 2^31; got ",
              settings.query_offset);
  const int64_t rows = count_rows(q, settings);
  const int64_t columns = ceil_div(k.size(2), settings.block);
  check_index("rows", layout.row_ptr, layout.col_idx, q.size(1), rows, columns);
  check_index("columns", layout.col_ptr, layout.row_idx, q.size(1), columns, rows);
  TORCH_CHECK(layout.row_ptr.size(0) == layout.col_ptr.size(0) &&
                  layout.col_idx.numel() == layout.row_idx.numel(),
              "cpu_attention: the layout's rows and columns describe different blocks");
  TORCH_CHECK(!real || (real->scalar_type() == at::kBool && real->dim() == 2 &&
                        real->size(0) == k.size(0) && real->size(1) == k.size(2)),
              "cpu_attention: key_padding_mask is bool (batch, M)");
  TORCH_CHECK(!settings.zero_padded_queries ||
                  (real && q.size(2) == k.size(2) && settings.query_offset == 0),
              "cpu_attention: zero_padded_queries takes a key_padding_mask, as many queries as ",
              "keys, and no query_offset");
  TORCH_CHECK(settings.dropout_p == 0.0 ||
                  (dropout_key && dropout_key->scalar_type() == at::kInt &&
                   dropout_key->dim() == 1 && dropout_key->size(0) == q.size(0)),
              "cpu_attention: dropout takes a dropout_key, int32 (batch,)");
}

// A Problem and the tensors it points into.
struct Call {
  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Layout& layout,
       const std::optional<Tensor>& real_in, const std::optional<Tensor>& dropout_key_in,
       const Settings& settings)
      : q(unit_stride(q_in)), k(unit_stride(k_in)), v(unit_stride(v_in)) {
    check(q, k, v, layout, real_in, dropout_key_in, settings);
    problem = Problem{};
    problem.dtype = dtype_of(q);
    problem.batch = q.size(0);
    problem.heads = q.size(1);
    problem.kv_heads = k.size(1);
    problem.queries = q.size(2);
    problem.keys = k.size(2);
    problem.head_dim = q.size(3);
    problem.block = settings.block;
    problem.num_rows = count_rows(q, settings);
    problem.num_cols = ceil_div(k.size(2), settings.block);
    problem.layout_per_head = layout.row_ptr.size(0) > 1;
    problem.query_offset = settings.query_offset;
    problem.causal = settings.causal;
    problem.pruned_zero = settings.pruned_zero;
    problem.scale = static_cast<float>(settings.scale);
    problem.row_ptr = layout.row_ptr.const_data_ptr<int32_t>();
    problem.col_idx = layout.col_idx.const_data_ptr<int32_t>();
    problem.col_ptr = layout.col_ptr.const_data_ptr<int32_t>();
    problem.row_idx = layout.row_idx.const_data_ptr<int32_t>();
    problem.dropout_scale = static_cast<float>(1.0 / (1.0 - settings.dropout_p));
    problem.q = tokens_of(q);
    problem.k = tokens_of(k);
    problem.v = tokens_of(v);
    problem.zero_padded_queries = settings.zero_padded_queries;
    key_ends.assign(problem.batch, static_cast<int32_t>(problem.keys));
    query_ends.assign(problem.batch, static_cast<int32_t>(problem.queries));
    if (real_in) count_real(*real_in);
    problem.key_ends = key_ends.data();
    problem.query_ends = query_ends.data();
    if (settings.dropout_p > 0.0) {
      dropout_key = dropout_key_in->contiguous();
      problem.dropout_key = dropout_key.const_data_ptr<int32_t>();
      problem.dropout_threshold = keep_threshold(settings.dropout_p);
    }
  }

  void count_real(const Tensor& real_in) {
    real = real_in.contiguous();
    seen = at::empty({problem.batch, problem.keys + 1}, real.options().dtype(at::kInt));
    const bool* is_real = real.const_data_ptr<bool>();
    int32_t* count = seen.mutable_data_ptr<int32_t>();
    for (int64_t b = 0; b < problem.batch; ++b) {
      int32_t* seen_keys = count + b * (problem.keys + 1);
      count_seen(is_real + b * problem.keys, problem.keys, seen_keys);
      // The first place before which all real keys have been seen.
      const int32_t* end = std::lower_bound(seen_keys, seen_keys + problem.keys,
                                            seen_keys[problem.keys]);
      key_ends[b] = static_cast<int32_t>(end - seen_keys);
    }
    if (problem.zero_padded_queries) query_ends = key_ends;
    problem.real = reinterpret_cast<const uint8_t*>(real.const_data_ptr<bool>());
    problem.seen = seen.const_data_ptr<int32_t>();
  }

  Tensor q, k, v, real, seen, dropout_key;
  std::vector<int32_t> key_ends, query_ends;
  Problem problem;
};

// Returns, for each layout, its blocks with those that have most partners first.
std::vector<std::vector<int32_t>> longest_first(const int32_t* pointers, int64_t layouts,
                                                int64_t blocks) {
  std::vector<std::vector<int32_t>> orders(layouts, std::vector<int32_t>(blocks));
  for (std::vector<int32_t>& order : orders) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return pointers[a + 1] - pointers[a] > pointers[b + 1] - pointers[b];
    });
    pointers += blocks + 1;
  }
  return orders;
}

// How much a head of a sample costs, as far as the layout is even: entries before the padding.
int64_t entries(const Problem& problem, int64_t b) {
  return int64_t{problem.query_ends[b]} * problem.key_ends[b];
}

// Returns the samples, those that cost most first.
std::vector<int64_t> costly_first(const Problem& problem) {
  std::vector<int64_t> samples(problem.batch);
  std::iota(samples.begin(), samples.end(), 0);
  std::stable_sort(samples.begin(), samples.end(), [&](int64_t a, int64_t b) {
    return entries(problem, a) > entries(problem, b);
  });
  return samples;
}

// Runs task(b, head, block, workspace) for all blocks of all heads. Heads one after the other, so
// that threads share what they read; inside a head, long blocks first, so that none is left last.
template <class Task>
void run_blocks(const Problem& problem, const int32_t* pointers, int64_t heads, int64_t blocks,
                const Task& task) {
  const int64_t layouts = problem.layout_per_head ? problem.heads : 1;
  const auto orders = longest_first(pointers, layouts, blocks);
  const auto samples = costly_first(problem);
  // The order of a key head is that of its first query head.
  const int64_t group = problem.heads / heads;
  const int64_t floats = kernels().workspace_floats(problem);
  run_tasks(problem.batch * heads * blocks, floats, [&](int64_t number, float* workspace) {
    const int64_t head = number / blocks % heads;
    const auto& order = orders[layouts == 1 ? 0 : head * group];
    task(samples[number / blocks / heads], head, order[number % blocks], workspace);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& row_ptr, const Tensor& col_idx,
                                   const Tensor& col_ptr, const Tensor& row_idx,
                                   const std::optional<Tensor>& key_padding_mask,
                                   const std::optional<Tensor>& dropout_key, int64_t block,
                                   double scale, bool causal, bool pruned_zero, double dropout_p,
                                   bool zero_padded_queries, int64_t query_offset) {
  Call call(q, k, v, {row_ptr, col_idx, col_ptr, row_idx}, key_padding_mask, dropout_key,
            {block, scale, causal, pruned_zero, dropout_p, zero_padded_queries, query_offset});
  Problem& problem = call.problem;
  Tensor out = at::empty_like(call.q);
  Tensor lse = at::empty({problem.batch, problem.heads, problem.queries},
                         call.q.options().dtype(at::kFloat));
  problem.out = tokens_of(out);
  problem.lse = lse.mutable_data_ptr<float>();
  const Kernels& run = kernels();
  run_blocks(problem, problem.row_ptr, problem.heads, problem.num_rows,
             [&](int64_t b, int64_t h, int64_t row, float* workspace) {
               run.forward_row(problem, b, h, row, workspace);
             });
  return {out, lse};
}

// dq by rows, then dk and dv by columns.
void backward_by_blocks(const Problem& problem) {
  const Kernels& run = kernels();
  run_blocks(problem, problem.row_ptr, problem.heads, problem.num_rows,
             [&](int64_t b, int64_t h, int64_t row, float* workspace) {
               run.backward_row(problem, b, h, row, workspace);
             });
  run_blocks(problem, problem.col_ptr, problem.kv_heads, problem.num_cols,
             [&](int64_t b, int64_t kv_head, int64_t column, float* workspace) {
               run.backward_column(problem, b, kv_head, column, nullptr, workspace);
             });
}

// Whether threads that each take a whole head when they are free are busy enough.
bool heads_suffice(const Problem& problem) {
  const int64_t threads = at::get_num_threads();
  std::vector<int64_t> busy(threads);  // in entries
  int64_t all = 0;
  for (const int64_t b : costly_first(problem)) {
    for (int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
      *std::min_element(busy.begin(), busy.end()) += entries(problem, b);
      all += entries(problem, b);
    }
  }
  const int64_t longest = *std::max_element(busy.begin(), busy.end());
  return static_cast<double>(all) >= kWholeHeadsFrom * static_cast<double>(threads * longest);
}

// All gradients of a (sample, key head) and its query heads by one thread, column after column.
void backward_by_heads(const Problem& problem) {
  const Kernels& run = kernels();
  const int64_t group = problem.heads / problem.kv_heads;
  const int64_t padded = run.padded_head_dim(problem);
  const bool in_place = problem.dtype == DType::kFloat32 && padded == problem.head_dim;
  const int64_t floats = in_place ? 0 : group * problem.queries * padded;
  const int64_t all = floats + run.workspace_floats(problem);
  const auto samples = costly_first(problem);
  run_tasks(problem.batch * problem.kv_heads, all, [&](int64_t number, float* memory) {
    const int64_t b = samples[number / problem.kv_heads];
    const int64_t kv_head = number % problem.kv_heads;
    const int64_t first_head = kv_head * group;
    QueryGradients dq{memory, problem.queries * padded, padded};
    if (in_place) {
      dq = {static_cast<float*>(problem.dq.data) + b * problem.dq.batch +
                first_head * problem.dq.head,
            problem.dq.head, problem.dq.token};
    } else {
      memory += floats;
    }
    for (int64_t member = 0; member < group; ++member) {
      for (int64_t query = 0; query < problem.queries; ++query) {
        std::fill_n(dq.data + member * dq.head + query * dq.token, padded, 0.0f);
      }
    }
    for (int64_t column = 0; column < problem.num_cols; ++column) {
      run.backward_column(problem, b, kv_head, column, &dq, memory);
    }
    for (int64_t member = 0; member < group && !in_place; ++member) {
      run.store_dq(problem, b, first_head + member, dq.data + member * dq.head, dq.token);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_in, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_in,
    const Tensor& lse_in, const Tensor& row_ptr, const Tensor& col_idx, const Tensor& col_ptr,
    const Tensor& row_idx, const std::optional<Tensor>& key_padding_mask,
    const std::optional<Tensor>& dropout_key, int64_t block, double scale, bool causal,
    bool pruned_zero, double dropout_p, bool zero_padded_queries, int64_t query_offset) {
  Call call(q, k, v, {row_ptr, col_idx, col_ptr, row_idx}, key_padding_mask, dropout_key,
            {block, scale, causal, pruned_zero, dropout_p, zero_padded_queries, query_offset});
  Problem& problem = call.problem;
  TORCH_CHECK(grad_in.sizes() == q.sizes() && out_in.sizes() == q.sizes() &&
                  grad_in.scalar_type() == q.scalar_type() &&
                  out_in.scalar_type() == q.scalar_type(),
              "cpu_attention: the output and its gradient have the shape and dtype of q");
  TORCH_CHECK(lse_in.sizes() == q.sizes().slice(0, 3) && lse_in.scalar_type() == at::kFloat,
              "cpu_attention: lse is float32 (batch, heads, L)");
  const Tensor grad = unit_stride(grad_in);
  const Tensor out = unit_stride(out_in);
  const Tensor lse = lse_in.contiguous();
  Tensor delta = at::empty_like(lse);
  Tensor dq = at::empty_like(call.q);
  Tensor dk = at::empty_like(call.k);
  Tensor dv = at::empty_like(call.v);
  problem.grad = tokens_of(grad);
  problem.out = tokens_of(out);
  problem.lse = lse.data_ptr<float>();
  problem.delta = delta.mutable_data_ptr<float>();
  problem.dq = tokens_of(dq);
  problem.dk = tokens_of(dk);
  problem.dv = tokens_of(dv);

  run_blocks(problem, problem.row_ptr, problem.heads, problem.num_rows,
             [&](int64_t b, int64_t h, int64_t row, float* workspace) {
               kernels().write_delta(problem, b, h, row, workspace);
             });
  if (heads_suffice(problem)) {
    backward_by_heads(problem);
  } else {
    backward_by_blocks(problem);
  }
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spion_ds, m) {
  m.def(
      "cpu_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col_idx, "
      "Tensor col_ptr, Tensor row_idx, Tensor? key_padding_mask, Tensor? dropout_key, int block, "
      "float scale, bool causal, bool pruned_zero, float dropout_p, bool zero_padded_queries, "
      "int query_offset=0) -> (Tensor, Tensor)");
  m.def(
      "cpu_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor row_ptr, Tensor col_idx, Tensor col_ptr, Tensor row_idx, Tensor? key_padding_mask, "
      "Tensor? dropout_key, int block, float scale, bool causal, bool pruned_zero, "
      "float dropout_p, bool zero_padded_queries, int query_offset=0) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(spion_ds, CPU, m) {
  m.impl("cpu_attention_fwd", &forward);
  m.impl("cpu_attention_bwd", &backward);
}
