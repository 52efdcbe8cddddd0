// Flood fill of a pooled attention map (arXiv 2309.12578): 2n greedy walks, run in parallel.
// The specification is flood_fill_reference in spion_ds/patterns/flood_fill.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace {

// Walks cross each other: threads may set one mark at the same time, and only ever to 1.
using Marks = std::vector<std::atomic<uint8_t>>;

constexpr int64_t kStepsPerTask = 1 << 15;

// padded: (n + 1, n + 1) row-major, its last row and column 0. marks: (n, n) row-major.
void walk(const double* padded, int64_t n, double threshold, int64_t x, int64_t y, Marks& marks) {
  const int64_t stride = n + 1;
  while (x < n && y < n) {
    const double* here = padded + x * stride + y;
    const double down = here[stride];
    const double right = here[1];
    const double diagonal = here[stride + 1];
    double next = diagonal;
    if (down > right && down > diagonal) {
      next = down;
      ++x;
    } else if (down <= right && right > diagonal) {
      next = right;
      ++y;
    } else {
      ++x;
      ++y;
    }
    if (next > threshold && x < n && y < n) {
      marks[x * n + y].store(1, std::memory_order_relaxed);
    }
  }
}

// pooled: (n, n) of any floating dtype; compared in double. Returns (n, n) bool.
at::Tensor flood_fill(const at::Tensor& pooled, double threshold) {
  TORCH_CHECK(
      pooled.dim() == 2 && pooled.size(0) == pooled.size(1) && pooled.size(0) > 0,
      "flood_fill: pooled must be a square (n, n) map with n > 0, got ", pooled.sizes());
  TORCH_CHECK(
      at::isFloatingType(pooled.scalar_type()),
      "flood_fill: pooled must be floating point, got ", pooled.scalar_type());

  const int64_t n = pooled.size(0);
  const at::Tensor padded = at::constant_pad_nd(pooled.to(at::kDouble), {0, 1, 0, 1}).contiguous();
  const double* padded_data = padded.const_data_ptr<double>();
  Marks marks(n * n);

  // Walk k < n starts at (0, k), walk n + k at (k, 0); each takes fewer than 2n steps.
  const int64_t walks_per_task = std::max<int64_t>(1, kStepsPerTask / (2 * n));
  at::parallel_for(0, 2 * n, walks_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      walk(padded_data, n, threshold, i < n ? 0 : i - n, i < n ? i : 0, marks);
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
