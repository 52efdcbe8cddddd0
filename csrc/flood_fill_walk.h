// One greedy walk of flood fill (arXiv 2309.12578), for CPUs and GPUs alike.
// The specification is flood_fill_reference in spion_ds/patterns/flood_fill.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SPION_HOST_DEVICE __host__ __device__
#else
#define SPION_HOST_DEVICE
#endif

// map: (n, n) row-major; a row and a column of zeros are thought of beside it. Walk i < n starts at
// (0, i), walk n + i at (i, 0). Calls mark(index) for each block above the threshold it steps onto.
template <typename Mark>
SPION_HOST_DEVICE void walk(const double* map, int64_t n, double threshold, int64_t i, Mark mark) {
  int64_t x = i < n ? 0 : i - n;
  int64_t y = i < n ? i : 0;
  while (x < n && y < n) {
    const double* here = map + x * n + y;
    const bool last_row = x + 1 == n;
    const bool last_column = y + 1 == n;
    const double down = last_row ? 0.0 : here[n];
    const double right = last_column ? 0.0 : here[1];
    const double diagonal = last_row || last_column ? 0.0 : here[n + 1];
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
      mark(x * n + y);
    }
  }
}
