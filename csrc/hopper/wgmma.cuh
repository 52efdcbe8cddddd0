// The three wgmma shapes in use, in bf16 and fp16, float32 accumulators. 64 rows a warpgroup.
//
// Operand names: A is (64, 16) from registers or shared memory, B is (16, N) from shared memory.
// kTransposeB = 0: B is stored [N][16] (K-major), 1: stored [16][N] (N contiguous).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace spion_hopper {

// Shared-memory matrix descriptor of a tile with 128-byte rows in the 128-byte swizzle.
// group_stride: bytes between groups of 8 rows; chunk_stride: bytes between 64-element chunks of
// the contiguous dimension, used only when B is transposed and wider than 64.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t chunk_stride) {
  constexpr uint64_t kGroupStride = 1024;
  constexpr uint64_t kSwizzle128B = 1ull << 62;
  return uint64_t((address & 0x3FFFF) >> 4) | (uint64_t(chunk_stride >> 4) << 16) |
         ((kGroupStride >> 4) << 32) | kSwizzle128B;
}

// Orders register writes of this warpgroup before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// The inline assembly below, in pieces. How an accumulator is tied, "+f" or "=f", is an argument.
#define SPION_HOPPER_ACC8(tie, d, i)                                                         \
  tie((d)[i]), tie((d)[(i) + 1]), tie((d)[(i) + 2]), tie((d)[(i) + 3]), tie((d)[(i) + 4]), \
      tie((d)[(i) + 5]), tie((d)[(i) + 6]), tie((d)[(i) + 7])
#define SPION_HOPPER_ACC32(tie, d, i)                                     \
  SPION_HOPPER_ACC8(tie, d, i), SPION_HOPPER_ACC8(tie, d, (i) + 8),     \
      SPION_HOPPER_ACC8(tie, d, (i) + 16), SPION_HOPPER_ACC8(tie, d, (i) + 24)
#define SPION_HOPPER_NAMES32                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, " \
  "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, "      \
  "%25, %26, %27, %28, %29, %30, %31"
#define SPION_HOPPER_NAMES64                                           \
  SPION_HOPPER_NAMES32                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
  "%57, %58, %59, %60, %61, %62, %63"

// A from registers: d = A * B, plus d if `accumulate` (an operand by its name) is not 0.
#define SPION_HOPPER_RS(shape, type, names, a, b, accumulate, transpose)                       \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                     \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, {" a "}, " b \
  ", p, 1, 1, " transpose ";\n}\n"
// A from shared memory, K-major.
#define SPION_HOPPER_SS(shape, type, names, a, b, accumulate, transpose)                       \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                     \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " a ", " b   \
  ", p, 1, 1, 0, " transpose ";\n}\n"

#define SPION_HOPPER_RS32(type) \
  SPION_HOPPER_RS("m64n64k16", type, SPION_HOPPER_NAMES32, "%32, %33, %34, %35", "%36", "%37", "%38")
#define SPION_HOPPER_RS64(type) \
  SPION_HOPPER_RS("m64n128k16", type, SPION_HOPPER_NAMES64, "%64, %65, %66, %67", "%68", "%69", "%70")
#define SPION_HOPPER_SS32(type) \
  SPION_HOPPER_SS("m64n64k16", type, SPION_HOPPER_NAMES32, "%32", "%33", "%34", "%35")

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(SPION_HOPPER_RS32("bf16")
                 : SPION_HOPPER_ACC32("+f", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB));
  } else {
    asm volatile(SPION_HOPPER_RS32("f16")
                 : SPION_HOPPER_ACC32("+f", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB));
  }
}

// d = A * B: what d held before is no input, so that the compiler may keep something else there.
template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma_rs_first(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(SPION_HOPPER_RS32("bf16")
                 : SPION_HOPPER_ACC32("=f", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(0), "n"(kTransposeB));
  } else {
    asm volatile(SPION_HOPPER_RS32("f16")
                 : SPION_HOPPER_ACC32("=f", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(0), "n"(kTransposeB));
  }
}

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(SPION_HOPPER_RS64("bf16")
                 : SPION_HOPPER_ACC32("+f", d, 0), SPION_HOPPER_ACC32("+f", d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB));
  } else {
    asm volatile(SPION_HOPPER_RS64("f16")
                 : SPION_HOPPER_ACC32("+f", d, 0), SPION_HOPPER_ACC32("+f", d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB));
  }
}

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma_ss(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(SPION_HOPPER_SS32("bf16")
                 : SPION_HOPPER_ACC32("+f", d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeB));
  } else {
    asm volatile(SPION_HOPPER_SS32("f16")
                 : SPION_HOPPER_ACC32("+f", d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeB));
  }
}

}  // namespace spion_hopper

#undef SPION_HOPPER_ACC8
#undef SPION_HOPPER_ACC32
#undef SPION_HOPPER_NAMES32
#undef SPION_HOPPER_NAMES64
#undef SPION_HOPPER_RS
#undef SPION_HOPPER_SS
#undef SPION_HOPPER_RS32
#undef SPION_HOPPER_RS64
#undef SPION_HOPPER_SS32
