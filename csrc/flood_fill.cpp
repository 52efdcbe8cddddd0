// Flood fill of a pooled attention map on CPUs: 2n greedy walks, run in parallel.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "flood_fill_walk.h"

namespace {

// Walks cross each other: threads may set one mark at the same time, and only ever to 1.
using Marks = std::vector<std::atomic<uint8_t>>;

constexpr int64_t kStepsPerTask = 1 << 15;

// pooled: (n, n) of any floating dtype; compared in double. Returns (n, n) bool.
at::Tensor flood_fill(const at::Tensor& pooled, double threshold) {
  TORCH_CHECK(
      pooled.dim() == 2 && pooled.size(0) == pooled.size(1) && pooled.size(0) > 0,
      "flood_fill: pooled must be a square (n, n) map with n > 0, got ", pooled.sizes());
  TORCH_CHECK(
      at::isFloatingType(pooled.scalar_type()),
      "flood_fill: pooled must be floating point, got ", pooled.scalar_type());

  const int64_t n = pooled.size(0);
  const at::Tensor map = pooled.to(at::kDouble).contiguous();
  const double* map_data = map.const_data_ptr<double>();
  Marks marks(n * n);

  // Each walk takes fewer than 2n steps.
  const int64_t walks_per_task = std::max<int64_t>(1, kStepsPerTask / (2 * n));
  at::parallel_for(0, 2 * n, walks_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      walk(map_data, n, threshold, i,
           [&](int64_t block) { marks[block].store(1, std::memory_order_relaxed); });
    }
  });

  at::Tensor result = at::empty({n, n}, pooled.options().dtype(at::kBool));
  std::transform(marks.begin(), marks.end(), result.mutable_data_ptr<bool>(),
                 [](const std::atomic<uint8_t>& mark) {
                   return mark.load(std::memory_order_relaxed) != 0;
                 });
  return result;
}

}  // namespace

TORCH_LIBRARY(spion_ds, m) {
  m.def("flood_fill(Tensor pooled, float threshold) -> Tensor");
}

TORCH_LIBRARY_IMPL(spion_ds, CPU, m) {
  m.impl("flood_fill", &flood_fill);
}
