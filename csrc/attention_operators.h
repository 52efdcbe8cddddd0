// What the CPU operators share: which kernels run, views of tensors, and dealing out tasks.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "attention_kernels.h"

namespace {

using at::Tensor;
using spion_ds::DType;
using spion_ds::Kernels;
using spion_ds::Problem;
using spion_ds::Tokens;

inline const Kernels& choose_kernels() {
#ifdef SPION_DS_X86_KERNELS
  // PyTorch's own choice, so that ATEN_CPU_CAPABILITY steers these kernels as well.
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return spion_ds::kAvx512Kernels;
  if (capability.rfind("AVX2", 0) == 0) return spion_ds::kAvx2Kernels;
#endif
  return spion_ds::kBaselineKernels;
}

inline const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK(false, "cpu_attention: float32, bfloat16 or float16 tensors, got ",
                  x.scalar_type());
  }
}

inline Tensor unit_stride(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

inline Tokens tokens_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs task(number, workspace) for all numbers, each thread with `floats` floats of its own:
// a thread takes the next number when it is free.
template <class Task>
void run_tasks(int64_t tasks, int64_t floats, const Task& task) {
  constexpr int64_t kAlign = 16;  // floats of a cache line
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new float[floats + kAlign]);
    void* aligned = memory.get();
    size_t space = (floats + kAlign) * sizeof(float);
    std::align(kAlign * sizeof(float), floats * sizeof(float), aligned, space);
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t number = next++; number < tasks; number = next++) {
        task(number, static_cast<float*>(aligned));
      }
    }
  });
}

// How many real keys come before each of a sample's keys, into seen (keys + 1).
inline void count_seen(const bool* is_real, int64_t keys, int32_t* seen) {
  *seen = 0;
  for (int64_t key = 0; key < keys; ++key) seen[key + 1] = seen[key] + is_real[key];
}

}  // namespace
