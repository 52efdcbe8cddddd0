// Host side: tensor maps for the copy engine, and launches.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "arguments.h"

namespace spion_hopper {

// A map of a (batch, heads, tokens, head_dim) tensor in boxes of 64 tokens by 64 columns, 0 outside.
bool make_map(CUtensorMap* map, const HopperTensor& x, const HopperProblem& problem, int heads,
              int tokens);


// Launches ``kernel`` with more than 48 KiB of shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) {
    return cudaSuccess;
  }
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  kernel<<<dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace spion_hopper
