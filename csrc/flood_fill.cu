// Flood fill of a pooled attention map on GPUs: a thread a walk. No PyTorch header, so that nvcc
// takes seconds; spion_ds/extension.py calls the C function.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "flood_fill_walk.h"

namespace {

// A walk waits for memory at every step: few walks a block, so that all multiprocessors have some.
constexpr int kWalksPerBlock = 32;

__global__ void flood_fill_kernel(const double* map, int64_t n, double threshold, uint8_t* marks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWalksPerBlock + threadIdx.x;
  if (i < 2 * n) {
    // Walks cross each other, and all that they write is 1.
    walk(map, n, threshold, i, [marks](int64_t block) { marks[block] = 1; });
  }
}

}  // namespace

// map: (n, n) row-major on the device. marks: (n, n) bytes, zero before. Returns a cudaError_t.
extern "C" int spion_flood_fill(int device, const double* map, int64_t n, double threshold,
                                uint8_t* marks, cudaStream_t stream) {
  const cudaError_t chosen = cudaSetDevice(device);
  if (chosen != cudaSuccess) {
    return chosen;
  }
  const auto blocks = static_cast<unsigned>((2 * n + kWalksPerBlock - 1) / kWalksPerBlock);
  flood_fill_kernel<<<blocks, kWalksPerBlock, 0, stream>>>(map, n, threshold, marks);
  return cudaGetLastError();
}
