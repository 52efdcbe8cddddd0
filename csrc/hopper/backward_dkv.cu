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
using DkvRing = Ring<kHeadDim, kStatisticsBytes, kHeadDim == 64 ? 8 : 5>;

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

template <typename T, int kHeadDim>
__device__ __forceinline__ void consume(const HopperProblem& problem, const CUtensorMap* k_map,
                                        const CUtensorMap* v_map, const DkvTensors& tensors,
                                        const HopperWork& work, const DkvRing<kHeadDim>& ring,
                                        uint32_t own_tiles, uint32_t own_barrier) {
  using R = DkvRing<kHeadDim>;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int warpgroup = warpgroup_index();
  const int row_in_block = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int blocks = (problem.keys + 63) / 64;
  const float scale = problem.scale * 1.4426950408889634f;
  const uint32_t lane_offset = lane % 4 * 16;
  uint32_t base = 0, seen = R::kWindow - 1, own_parity = 0;
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
      EntryWalk walk(work.entries + item.first, item.count, warpgroup, lane);
      int position, partner;
      barrier_wait(own_barrier, own_parity);
      own_parity ^= 1;
      // dK's product runs on past the end of a step, whose stage it then holds: at head_dim 64 until
      // the next scores are asked for, at 128, where a product takes twice as long, beside them.
      constexpr bool kBeside = kHeadDim == 128;
      uint32_t held = 0;
      bool holds = false;
      while (walk.next(position, partner)) {
        const uint32_t step = base + position;
        // The stage ahead can be the one that is held: let go before a long wait.
        if (holds && step - held >= R::kStages - 1) {
          wgmma_wait<0>();
          ring.release(held, lane);
          holds = false;
        }
        const uint32_t statistics = ring.extra(step) + lane_offset;
        float probs[32], dprobs[32];
        ring.wait_full(step, seen);
        if constexpr (!kBeside) {
          wgmma_wait<0>();
          if (holds) {
            ring.release(held, lane);
          }
        }
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
        if constexpr (kBeside) {
          wgmma_wait<1>();  // dV's product, whose operand's registers are free then
        }
        held = step;
        holds = true;
      }
      wgmma_wait<0>();
      if (holds) {
        ring.release(held, lane);
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
  // Own tiles, ring, barriers. Nothing else is in shared memory, so that it starts aligned.
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t own_tiles = shared_address(shared);
  const uint32_t tiles = own_tiles + kOwners * 2 * DkvRing<kHeadDim>::kTileBytes;
  const uint32_t barriers = tiles + DkvRing<kHeadDim>::kBytes;
  const uint32_t own_barriers = barriers + 8 * DkvRing<kHeadDim>::kBarrierWords;
  const DkvRing<kHeadDim> ring(tiles, barriers);
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

// One workgroup a split block, copy, gradient and 8 columns.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(128)
    block_sparse_attention_bwd_reduce_kernel(const HopperProblem problem, const DkvTensors tensors,
                                             const HopperSplits splits) {
  constexpr int kGroups = kHeadDim / 8;
  const int group = blockIdx.x % kGroups, index = blockIdx.x / (2 * kGroups);
  const bool is_key = blockIdx.x / kGroups % 2 == 0;
  const int split = index % splits.split_count, copy = index / splits.split_count;
  const int block = __ldg(splits.splits + split * 3);
  const int first = __ldg(splits.splits + split * 3 + 1);
  const int parts = __ldg(splits.splits + split * 3 + 2);
  const int thread = threadIdx.x, lane = thread % 32;
  const int blocks = (problem.keys + 63) / 64;
  const Place where = place(copy, block, problem.kv_heads, blocks, problem.per_head);
  const int64_t slot = (int64_t(copy) * tensors.slot_count + first) * kSlotFloats<kHeadDim> +
                       (is_key ? 0 : kSlotFloats<kHeadDim> / 2);
  const float4* source =
      reinterpret_cast<const float4*>(tensors.workspace + slot) + group * 128 + thread;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int part = 0; part < parts; ++part) {
    const float4 x = source[part * (kSlotFloats<kHeadDim> / 4)];
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  const uint64_t bits = key_bits(problem, where.batch, block % blocks);
  const HopperTensor& target = is_key ? tensors.dk : tensors.dv;
  const float factor = is_key ? problem.scale : 1.0f;
  const int row_in_block = thread / 32 * 16 + lane / 4, column = group * 8 + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int inside = row_in_block + half * 8;
    const int row = block % blocks * kBlock + inside;
    if (row < problem.keys) {
      // Not by a factor of 0: probabilities of a key that nobody attends to may be infinite.
      const bool real = bits >> inside & 1;
      const float low = real ? (half ? sum.z : sum.x) * factor : 0.0f;
      const float high = real ? (half ? sum.w : sum.y) * factor : 0.0f;
      *reinterpret_cast<uint32_t*>(head_of<T>(target, where.batch, where.head) +
                                   int64_t(row) * target.token_stride + column) = pack<T>(low, high);
    }
  }
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
  using R = DkvRing<kHeadDim>;
  constexpr int kOwners = Roles<kHeadDim>::kOwners;
  constexpr int kShared =
      kOwners * 2 * R::kTileBytes + R::kBytes + 8 * (R::kBarrierWords + kOwners);
  static_assert(kShared <= 232448);
  const cudaError_t error =
      launch(block_sparse_attention_bwd_dkv_kernel<T, kHeadDim>, work.workgroups,
             Roles<kHeadDim>::kThreads, kShared, stream, q_map, grad_map, k_map, v_map, problem, tensors, work);
  if (error != cudaSuccess) {
    return error;
  }
  return launch(block_sparse_attention_bwd_reduce_kernel<T, kHeadDim>,
                int64_t(splits.split_count) * copies * (kHeadDim / 4), 128, 0, stream, problem, tensors, splits);
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
