// dK and dV. A warpgroup owns 64 keys, summed over the query heads that share them; tiles are
// queries and output gradients. Scores are computed transposed, keys by queries, so that probabilities come
// out of the tensor cores as the register operand of the next product.
//
// A hot key block, kept by nearly every query block, is cut into parts of its own warpgroups. Each
// leaves float32 sums in the workspace and a second kernel adds them in a fixed order.

#include "stream.cuh"
#include "tensor_map.h"

namespace spion_hopper {
namespace {

// lse and delta of the 64 queries of a tile, each in the order of statistics_index.
constexpr int kStatisticsBytes = 2 * kBlock * 4;

template <int kHeadDim>
using DkvRing = Ring<kHeadDim, kStatisticsBytes>;

struct DkvTensors {
  HopperTensor dk, dv;
  const float* statistics;
  float* workspace;
  int slot_count;
};

// Floats of one slot of the workspace: dK, then dV, in the order of threads' registers.
template <int kHeadDim>
constexpr int kSlotFloats = 2 * kBlock * kHeadDim;

template <int kHeadDim>
__device__ __forceinline__ void store_slot(float* slot, const float (&values)[kHeadDim / 2],
                                           int thread) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
    reinterpret_cast<float4*>(slot)[i * 128 + thread] = make_float4(
        values[i * 4], values[i * 4 + 1], values[i * 4 + 2], values[i * 4 + 3]);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void add_slot(float (&values)[kHeadDim / 2], const float* slot,
                                         int thread) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
    const float4 x = reinterpret_cast<const float4*>(slot)[i * 128 + thread];
    values[i * 4] += x.x;
    values[i * 4 + 1] += x.y;
    values[i * 4 + 2] += x.z;
    values[i * 4 + 3] += x.w;
  }
}

// Writes dK and dV of one block; a padded key is never attended to, so its gradients are 0.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_gradients(const HopperProblem& problem,
                                                const DkvTensors& tensors, const Place& where,
                                                int own, float (&dk)[kHeadDim / 2],
                                                float (&dv)[kHeadDim / 2], int row_in_block,
                                                int column) {
  const uint64_t bits = key_bits(problem, where.batch, own);
  const bool low = bits >> row_in_block & 1, high = bits >> (row_in_block + 8) & 1;
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    // Not by a factor: probabilities of a key that nobody attends to may be infinite.
    if (!(i % 4 < 2 ? low : high)) {
      dk[i] = dv[i] = 0.0f;
    }
  }
  const int row = own * kBlock + row_in_block;
  store_rows<T, kHeadDim>(dk, head_of<T>(tensors.dk, where.batch, where.head),
                          tensors.dk.token_stride, row, column, problem.keys, problem.scale,
                          problem.scale);
  store_rows<T, kHeadDim>(dv, head_of<T>(tensors.dv, where.batch, where.head),
                          tensors.dv.token_stride, row, column, problem.keys, 1.0f, 1.0f);
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void consume(const HopperProblem& problem, const CUtensorMap* k_map,
                                        const CUtensorMap* v_map, const DkvTensors& tensors,
                                        const HopperWork& work, const DkvRing<kHeadDim>& ring,
                                        uint32_t own_tiles, uint32_t own_barrier) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int warpgroup = warpgroup_index();
  const int row_in_block = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int blocks = (problem.keys + 63) / 64;
  const float scale = problem.scale * 1.4426950408889634f;
  uint32_t base = 0, seen = DkvRing<kHeadDim>::kWindow - 1, own_parity = 0;
  const int end = __ldg(work.starts + blockIdx.x + 1);
  for (int index = __ldg(work.starts + blockIdx.x); index < end; ++index) {
    const Item item = load_item(work.items, index);
    int own = warpgroup == 0 ? item.own[0] : warpgroup == 1 ? item.own[1] : item.own[2];
    if (own >= 0) {
      const int slot = warpgroup == 0 ? item.slot[0] : warpgroup == 1 ? item.slot[1] : item.slot[2];
      const Place where = place(item.copy, own, problem.kv_heads, blocks, problem.per_head);
      own %= blocks;
      // Every warp has read the last item's keys and values.
      warpgroup_sync(warpgroup);
      if (thread == 0) {
        barrier_expect(own_barrier, 2 * DkvRing<kHeadDim>::kTileBytes);
        copy_tile<kHeadDim>(own_tiles, k_map, own_barrier, own, where.head, where.batch);
        copy_tile<kHeadDim>(own_tiles + DkvRing<kHeadDim>::kTileBytes, v_map, own_barrier, own,
                            where.head, where.batch);
      }
      float dk[kHeadDim / 2], dv[kHeadDim / 2];
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) {
        dk[i] = dv[i] = 0.0f;
      }
      EntryWalk walk(work.entries + item.first, item.count, warpgroup, lane);
      int position, partner;
      barrier_wait(own_barrier, own_parity);
      own_parity ^= 1;
      while (walk.next(position, partner)) {
        const uint32_t step = base + position;
        float probs[32], dprobs[32];
        ring.wait_full(step, seen);
        wgmma_fence();
        multiply_transposed<T, kHeadDim>(probs, own_tiles, ring.tile(step, 0));
        wgmma_commit();
        multiply_transposed<T, kHeadDim>(dprobs, own_tiles + DkvRing<kHeadDim>::kTileBytes,
                                         ring.tile(step, 1));
        wgmma_commit();
        const uint32_t statistics = ring.extra(step) + column * 32;
        wgmma_wait<1>();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 lse = load_shared(statistics + i * 16);
          float* p = probs + i * 8;
          p[0] = exp2_fast(fmaf(p[0], scale, -lse.x));
          p[1] = exp2_fast(fmaf(p[1], scale, -lse.y));
          p[2] = exp2_fast(fmaf(p[2], scale, -lse.x));
          p[3] = exp2_fast(fmaf(p[3], scale, -lse.y));
          p[4] = exp2_fast(fmaf(p[4], scale, -lse.z));
          p[5] = exp2_fast(fmaf(p[5], scale, -lse.w));
          p[6] = exp2_fast(fmaf(p[6], scale, -lse.z));
          p[7] = exp2_fast(fmaf(p[7], scale, -lse.w));
        }
        uint32_t operand[4][4];
        to_operand<T>(operand, probs);
        wgmma_fence();
        accumulate_product<T, kHeadDim>(dv, operand, ring.tile(step, 1));
        wgmma_commit();
        wgmma_wait<1>();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 delta = load_shared(statistics + kBlock * 4 + i * 16);
          float* dp = dprobs + i * 8;
          dp[0] -= delta.x;
          dp[1] -= delta.y;
          dp[2] -= delta.x;
          dp[3] -= delta.y;
          dp[4] -= delta.z;
          dp[5] -= delta.w;
          dp[6] -= delta.z;
          dp[7] -= delta.w;
        }
        uint32_t dscores[4][4];
        to_operand<T>(dscores, dprobs);
        // In pairs of T: half the instructions, and no float32 probabilities in 32 registers.
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          dscores[i / 4][i % 4] = multiply_pairs<T>(dscores[i / 4][i % 4], operand[i / 4][i % 4]);
        }
        wgmma_fence();
        accumulate_product<T, kHeadDim>(dk, dscores, ring.tile(step, 0));
        wgmma_commit();
        wgmma_wait<0>();
        ring.release(step, lane);
      }
      if (slot < 0) {
        store_gradients<T, kHeadDim>(problem, tensors, where, own, dk, dv, row_in_block, column);
      } else {
        float* target = tensors.workspace +
                        (int64_t(item.copy) * tensors.slot_count + slot) * kSlotFloats<kHeadDim>;
        store_slot<kHeadDim>(target, dk, thread);
        store_slot<kHeadDim>(target + kSlotFloats<kHeadDim> / 2, dv, thread);
      }
    }
    base += item.count;
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Roles<kHeadDim>::kThreads, 1)
    block_sparse_attention_bwd_dkv_kernel(
        const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap grad_map,
        const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
        const HopperProblem problem, const DkvTensors tensors, const HopperWork work) {
  constexpr int kOwners = Roles<kHeadDim>::kOwners;
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[DkvRing<kHeadDim>::kBarrierWords + kOwners];
  const uint32_t own_tiles = (shared_address(shared) + 1023) & ~1023u;
  const uint32_t own_barriers = shared_address(barriers) + 8 * DkvRing<kHeadDim>::kBarrierWords;
  const DkvRing<kHeadDim> ring(own_tiles + kOwners * 2 * DkvRing<kHeadDim>::kTileBytes,
                               shared_address(barriers));
  if (threadIdx.x == 0) {
    ring.init();
    for (int owner = 0; owner < kOwners; ++owner) {
      barrier_init(own_barriers + 8 * owner, 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kOwners * 128) {
    shrink_registers<Roles<kHeadDim>::kProducerRegisters>();
    if (threadIdx.x < kOwners * 128 + 32) {
      const int group = problem.heads / problem.kv_heads;
      const int query_blocks = (problem.queries + 63) / 64;
      produce(ring, work, problem.kv_heads, (problem.keys + 63) / 64, problem.per_head,
              [&](int partner, const Place& where, uint32_t step, uint32_t full) {
                const int head = where.head * group + partner / query_blocks;
                const int block = partner % query_blocks;
                copy_tile<kHeadDim>(ring.tile(step, 0), &q_map, full, block, head, where.batch);
                copy_tile<kHeadDim>(ring.tile(step, 1), &grad_map, full, block, head, where.batch);
                const int64_t row =
                    (int64_t(where.batch) * problem.heads + head) * query_blocks + block;
                copy_bytes(ring.extra(step), tensors.statistics + row * 2 * kBlock,
                           kStatisticsBytes, full);
              });
    }
  } else {
    grow_registers<Roles<kHeadDim>::kConsumerRegisters>();
    const int warpgroup = warpgroup_index();
    consume<T, kHeadDim>(problem, &k_map, &v_map, tensors, work, ring,
                         own_tiles + warpgroup * 2 * DkvRing<kHeadDim>::kTileBytes,
                         own_barriers + 8 * warpgroup);
  }
}

// One workgroup a split block and copy.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(128)
    block_sparse_attention_bwd_reduce_kernel(const HopperProblem problem, const DkvTensors tensors,
                                             const HopperSplits splits) {
  const int split = blockIdx.x % splits.split_count, copy = blockIdx.x / splits.split_count;
  const int block = __ldg(splits.splits + split * 3);
  const int first = __ldg(splits.splits + split * 3 + 1);
  const int parts = __ldg(splits.splits + split * 3 + 2);
  const int thread = threadIdx.x, lane = thread % 32;
  const int blocks = (problem.keys + 63) / 64;
  const Place where = place(copy, block, problem.kv_heads, blocks, problem.per_head);
  const float* slot =
      tensors.workspace + (int64_t(copy) * tensors.slot_count + first) * kSlotFloats<kHeadDim>;
  float dk[kHeadDim / 2], dv[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    dk[i] = dv[i] = 0.0f;
  }
  for (int part = 0; part < parts; ++part, slot += kSlotFloats<kHeadDim>) {
    add_slot<kHeadDim>(dk, slot, thread);
    add_slot<kHeadDim>(dv, slot + kSlotFloats<kHeadDim> / 2, thread);
  }
  store_gradients<T, kHeadDim>(problem, tensors, where, block % blocks, dk, dv,
                               thread / 32 * 16 + lane / 4, lane % 4 * 2);
}

template <typename T, int kHeadDim>
int run(const HopperProblem& problem, const HopperTensor& q, const HopperTensor& k,
        const HopperTensor& v, const HopperTensor& grad, const DkvTensors& tensors,
        const HopperWork& work, const HopperSplits& splits, cudaStream_t stream) {
  CUtensorMap q_map, grad_map, k_map, v_map;
  if (!make_map(&q_map, q, problem, problem.heads, problem.queries) ||
      !make_map(&grad_map, grad, problem, problem.heads, problem.queries) ||
      !make_map(&k_map, k, problem, problem.kv_heads, problem.keys) ||
      !make_map(&v_map, v, problem, problem.kv_heads, problem.keys)) {
    return cudaErrorInvalidValue;
  }
  const int copies = problem.batch * (problem.per_head ? 1 : problem.kv_heads);
  const int shared =
      DkvRing<kHeadDim>::kBytes + Roles<kHeadDim>::kOwners * 2 * DkvRing<kHeadDim>::kTileBytes;
  const cudaError_t error =
      launch(block_sparse_attention_bwd_dkv_kernel<T, kHeadDim>, work.workgroups,
             Roles<kHeadDim>::kThreads, shared + 1024, stream, q_map, grad_map, k_map, v_map, problem, tensors, work);
  if (error != cudaSuccess) {
    return error;
  }
  return launch(block_sparse_attention_bwd_reduce_kernel<T, kHeadDim>,
                int64_t(splits.split_count) * copies, 128, 0, stream, problem, tensors, splits);
}

}  // namespace
}  // namespace spion_hopper

extern "C" int hopper_backward_dkv(const HopperProblem* problem, const HopperTensor* q,
                                   const HopperTensor* k, const HopperTensor* v,
                                   const HopperTensor* grad, const HopperTensor* dk,
                                   const HopperTensor* dv, const float* statistics,
                                   const HopperWork* work, const HopperSplits* splits,
                                   float* workspace, cudaStream_t stream) {
  using namespace spion_hopper;
  const auto kernel = problem->is_half
                          ? (problem->head_dim == 64 ? run<__half, 64> : run<__half, 128>)
                          : (problem->head_dim == 64 ? run<__nv_bfloat16, 64>
                                                     : run<__nv_bfloat16, 128>);
  return kernel(*problem, *q, *k, *v, *grad,
                DkvTensors{*dk, *dv, statistics, workspace, splits->slot_count}, *work, *splits,
                stream);
}
