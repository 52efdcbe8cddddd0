// Plain C interface of the Hopper kernels: what the binding passes and the kernels read.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {

// A (batch, heads, tokens, head_dim) tensor; strides in elements, that of head_dim is 1.
struct HopperTensor {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
};

struct HopperProblem {
  int32_t batch, heads, kv_heads, queries, keys, head_dim;
  int32_t is_half;      // 1: fp16, 0: bf16
  int32_t pruned_zero;  // 1: a pruned valid key is a logit 0, 0: it is absent
  float scale;          // of the scores, > 0
  int32_t per_head;     // 1: one layout a head, 0: one for all
  // Padding, or null: (batch, ceil(keys / 64)) words with a bit for each real key, and their counts.
  const uint64_t* key_bits;
  const int32_t* key_counts;
};

// What the workgroups do. Workgroup i takes the items starts[i] .. starts[i + 1]. An item is 12 ints:
// first entry, entries, copy, 3 own blocks (-1: none), 3 slots of the workspace (-1: write the result
// itself), 3 unused. An entry is partner block * 8 + the warpgroups that need it. Blocks are of 64
// tokens; a copy is a (batch, head) of a shared layout, or a batch where each head has its layout.
struct HopperWork {
  const int32_t* items;
  const int32_t* entries;
  const int32_t* starts;
  int32_t workgroups;
};

// Blocks whose dK and dV come in several parts: 3 ints each: block, first slot, slots.
struct HopperSplits {
  const int32_t* splits;
  int32_t split_count, slot_count;
};

// Each returns a cudaError_t, 0 on success. lse: (batch, heads, queries rounded up to 64).
// statistics: (batch, heads, blocks of 64 queries, 2, 64), lse and delta as the dK, dV kernel reads
// them; the dQ kernel writes it.
int hopper_forward(const HopperProblem*, const HopperTensor* q, const HopperTensor* k,
                   const HopperTensor* v, const HopperTensor* out, float* lse, const HopperWork*,
                   cudaStream_t);
int hopper_backward_dq(const HopperProblem*, const HopperTensor* q, const HopperTensor* k,
                       const HopperTensor* v, const HopperTensor* out, const HopperTensor* grad,
                       const HopperTensor* dq, const float* lse, float* statistics,
                       const HopperWork*,
                       cudaStream_t);
int hopper_backward_dkv(const HopperProblem*, const HopperTensor* q, const HopperTensor* k,
                        const HopperTensor* v, const HopperTensor* grad, const HopperTensor* dk,
                        const HopperTensor* dv, const float* statistics, const HopperWork*, const HopperSplits*, float* workspace, cudaStream_t);
int hopper_pack_padding(const uint8_t* mask, int32_t batch, int32_t keys, uint64_t* key_bits,
                        int32_t* key_counts, cudaStream_t);
}
