// Items of keys in the backward pass: dK and dV, summed over the query heads that share the keys. A
// warpgroup owns 64 keys; tiles are queries and output gradients. Scores are computed transposed, keys
// by queries, so that probabilities come out of the tensor cores as the register operand of the next
// product.
//
// A hot key block, kept by nearly every query block, is cut into parts of their own warpgroups. Each
// leaves float32 sums in a workspace, and whichever comes last adds them up, in the parts' order.
#pragma once

#include "stream.cuh"

namespace spion_hopper {

// lse and delta of the 64 queries of a tile, each in the order of statistics_index.
constexpr int kStatisticsBytes = 2 * kBlock * 4;

template <int kHeadDim>
using BackwardRing = Ring<kHeadDim, kStatisticsBytes, kHeadDim == 64 ? 8 : 5>;

struct ColumnTensors {
  HopperTensor dk, dv;
  HopperParts parts;
};

// Floats of dK or dV in one slot of the workspace, in the order of threads' registers.
template <int kHeadDim>
constexpr int kSlotFloats = kBlock * kHeadDim;

template <int kHeadDim>
__device__ __forceinline__ void store_slot(float* slot, const float (&values)[kHeadDim / 2],
                                           int thread) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
    reinterpret_cast<float4*>(slot)[i * 128 + thread] = make_float4(
        values[i * 4], values[i * 4 + 1], values[i * 4 + 2], values[i * 4 + 3]);
  }
}

// values = the sum over ``parts`` slots, past the first-level cache: others wrote them.
template <int kHeadDim>
__device__ __forceinline__ void add_slots(float (&values)[kHeadDim / 2], const float* slot,
                                          int parts, int thread) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    values[i] = 0.0f;
  }
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    const float4* source = reinterpret_cast<const float4*>(slot) + thread;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const float4 x = __ldcg(source + i * 128);
      values[i * 4] += x.x;
      values[i * 4 + 1] += x.y;
      values[i * 4 + 2] += x.z;
      values[i * 4 + 3] += x.w;
    }
    slot += 2 * kSlotFloats<kHeadDim>;
  }
}

// Leaves a part's sums in its slot. Returns the sums of the block's parts in the warpgroup that comes
// last for it, null in others.
template <int kHeadDim>
__device__ __forceinline__ const float* leave_part(const HopperParts& parts, int copy, int slot,
                                                   int count, int first,
                                                   const float (&dk)[kHeadDim / 2],
                                                   const float (&dv)[kHeadDim / 2], int warpgroup,
                                                   int thread) {
  const int64_t copy_slots = int64_t(copy) * parts.slot_count;
  float* sums = parts.sums + (copy_slots + slot) * 2 * kSlotFloats<kHeadDim>;
  store_slot<kHeadDim>(sums, dk, thread);
  store_slot<kHeadDim>(sums + kSlotFloats<kHeadDim>, dv, thread);
  // All threads' sums are written before the one that counts releases them.
  warpgroup_sync(warpgroup);
  int* arrived = parts.arrived + copy_slots + first;
  if (!warpgroup_any(warpgroup, thread == 0 && count_up(arrived) == count - 1)) {
    return nullptr;
  }
  return sums - int64_t(slot - first) * 2 * kSlotFloats<kHeadDim>;
}

// Writes dK or dV of one block; a padded key is never attended to, so its gradients are 0.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_gradient(const HopperTensor& target, const Place& where,
                                               int own, int keys, uint64_t bits,
                                               float (&values)[kHeadDim / 2], float factor,
                                               int row_in_block, int column) {
  const bool low = bits >> row_in_block & 1, high = bits >> (row_in_block + 8) & 1;
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    // Not by a factor: probabilities of a key that nobody attends to may be infinite.
    if (!(i % 4 < 2 ? low : high)) {
      values[i] = 0.0f;
    }
  }
  store_rows<T, kHeadDim>(values, head_of<T>(target, where.batch, where.head), target.token_stride,
                          own * kBlock + row_in_block, column, keys, factor, factor);
}

// Eight of the thread's 16 values of a statistic, two loads.
__device__ __forceinline__ void load_half(float4 (&x)[2], uint32_t statistics) {
  x[0] = load_shared(statistics);
  x[1] = load_shared(statistics + 64);
}

// Probabilities of half of a tile's queries, scores * scale - lse to base 2.
template <int kFirst>
__device__ __forceinline__ void exponentials(float (&x)[32], const float4 (&lse)[2], float scale) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* p = x + kFirst + i * 8;
    p[0] = exp2_fast(fmaf(p[0], scale, -lse[i].x));
    p[1] = exp2_fast(fmaf(p[1], scale, -lse[i].y));
    p[2] = exp2_fast(fmaf(p[2], scale, -lse[i].x));
    p[3] = exp2_fast(fmaf(p[3], scale, -lse[i].y));
    p[4] = exp2_fast(fmaf(p[4], scale, -lse[i].z));
    p[5] = exp2_fast(fmaf(p[5], scale, -lse[i].w));
    p[6] = exp2_fast(fmaf(p[6], scale, -lse[i].z));
    p[7] = exp2_fast(fmaf(p[7], scale, -lse[i].w));
  }
}

template <int kFirst>
__device__ __forceinline__ void subtract(float (&x)[32], const float4 (&delta)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* p = x + kFirst + i * 8;
    p[0] -= delta[i].x;
    p[1] -= delta[i].y;
    p[2] -= delta[i].x;
    p[3] -= delta[i].y;
    p[4] -= delta[i].z;
    p[5] -= delta[i].w;
    p[6] -= delta[i].z;
    p[7] -= delta[i].w;
  }
}

template <typename T>
__device__ __forceinline__ void multiply(uint32_t (&x)[4][4], const uint32_t (&y)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    x[i / 4][i % 4] = multiply_pairs<T>(x[i / 4][i % 4], y[i / 4][i % 4]);
  }
}

// A warpgroup's part of an item whose first step in the ring is ``base``. Its keys and values come to
// ``own_tiles``; ``own_parity`` is the phase of ``own_barrier`` that they complete.
template <typename T, int kHeadDim, typename R>
__device__ __forceinline__ void consume_columns(const HopperProblem& problem,
                                                const CUtensorMap* k_map, const CUtensorMap* v_map,
                                                const ColumnTensors& tensors, const Item& item,
                                                int own, const int* item_entries, const R& ring,
                                                uint32_t own_tiles, uint32_t own_barrier,
                                                uint32_t base, uint32_t& seen,
                                                uint32_t& own_parity) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int warpgroup = warpgroup_index();
  const int row_in_block = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int blocks = (problem.keys + 63) / 64;
  const float scale = problem.scale * 1.4426950408889634f;
  const uint32_t lane_offset = lane % 4 * 16;
  const int slot = warpgroup == 0 ? item.slot[0] : warpgroup == 1 ? item.slot[1] : item.slot[2];
  const Place where = place(item.copy, own, problem.kv_heads, blocks, problem.per_head);
  own %= blocks;
  // Every warp has read the last item's keys and values.
  warpgroup_sync(warpgroup);
  if (thread == 0) {
    barrier_expect(own_barrier, 2 * R::kTileBytes);
    copy_tile<kHeadDim>(own_tiles, k_map, own_barrier, own, where.head, where.batch);
    copy_tile<kHeadDim>(own_tiles + R::kTileBytes, v_map, own_barrier, own,
                        where.head, where.batch);
  }
  float dk[kHeadDim / 2], dv[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    dk[i] = dv[i] = 0.0f;
  }
  EntryWalk walk(item_entries, item.count, warpgroup, lane);
  int position, partner;
  barrier_wait(own_barrier, own_parity);
  own_parity ^= 1;
  // At head_dim 128, where a product takes twice as long, dK's runs on beside the next step's scores, and
  // its stage is held until then. At 64 there are no registers for that beside what rows need.
  constexpr bool kBeside = kHeadDim == 128;
  uint32_t held = 0;
  bool holds = false;
  bool more = walk.next(position, partner);
  while (more) {
    const uint32_t step = base + position;
    // The stage ahead can be the one that is held: let go before a long wait.
    if (kBeside && holds && step - held >= R::kStages - 1) {
      wgmma_wait<0>();
      ring.release(held, lane);
      holds = false;
    }
    const uint32_t statistics = ring.extra(step) + lane_offset;
    float probs[32], dprobs[32];
    ring.wait_full(step, seen);
    wgmma_fence();
    multiply_transposed<T, kHeadDim>(probs, own_tiles, ring.tile(step, 0));
    wgmma_commit();
    multiply_transposed<T, kHeadDim>(dprobs, own_tiles + R::kTileBytes, ring.tile(step, 1));
    wgmma_commit();
    // Loads wait behind the products' own reads of shared memory: they start as early as they can.
    float4 values[2];
    load_half(values, statistics);
    wgmma_wait<1>();
    if constexpr (kBeside) {
      if (holds) {
        ring.release(held, lane);
      }
    }
    exponentials<0>(probs, values, scale);
    load_half(values, statistics + 128);
    exponentials<16>(probs, values, scale);
    uint32_t operand[4][4];
    to_operand<T>(operand, probs);
    wgmma_fence();
    accumulate_product<T, kHeadDim>(dv, operand, ring.tile(step, 1));
    wgmma_commit();
    load_half(values, statistics + 256);
    wgmma_wait<1>();
    subtract<0>(dprobs, values);
    load_half(values, statistics + 384);
    subtract<16>(dprobs, values);
    uint32_t dscores[4][4];
    to_operand<T>(dscores, dprobs);
    // In pairs of T: half the instructions, and no float32 probabilities in 32 registers.
    multiply<T>(dscores, operand);
    wgmma_fence();
    accumulate_product<T, kHeadDim>(dk, dscores, ring.tile(step, 0));
    wgmma_commit();
    more = walk.next(position, partner);
    if constexpr (kBeside) {
      wgmma_wait<1>();  // dV's product, whose operand's registers are free then
      held = step;
      holds = true;
    } else {
      wgmma_wait<0>();
      ring.release(step, lane);
    }
  }
  wgmma_wait<0>();
  if (holds) {
    ring.release(held, lane);
  }
  // Where the sums to write are: in registers, in the workspace, or not complete.
  const bool is_whole = slot < 0;
  int2 block_slots = make_int2(0, 0);  // the first one, how many
  const float* sums = nullptr;
  if (!is_whole) {
    block_slots = __ldg(reinterpret_cast<const int2*>(tensors.parts.slots) + slot);
    sums = leave_part<kHeadDim>(tensors.parts, item.copy, slot, block_slots.y, block_slots.x, dk, dv,
                                warpgroup, thread);
  }
  if (is_whole || sums != nullptr) {
    const uint64_t bits = key_bits(problem, where.batch, own);
    if (!is_whole) {
      add_slots<kHeadDim>(dk, sums, block_slots.y, thread);
    }
    store_gradient<T, kHeadDim>(tensors.dk, where, own, problem.keys, bits, dk, problem.scale,
                                row_in_block, column);
    if (!is_whole) {
      add_slots<kHeadDim>(dv, sums + kSlotFloats<kHeadDim>, block_slots.y, thread);
    }
    store_gradient<T, kHeadDim>(tensors.dv, where, own, problem.keys, bits, dv, 1.0f, row_in_block,
                                column);
  }
}

}  // namespace spion_hopper
