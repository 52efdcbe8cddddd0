// The backward pass in one launch: items of queries (dQ) and of keys (dK, dV). Those of keys need delta
// of their head's queries, which the items of queries leave; hopper_plan.py puts these a head ahead, so
// that the wait is short, and what both read is still in the L2 cache.

#include "backward_columns.cuh"
#include "backward_rows.cuh"
#include "tensor_map.h"

namespace spion_hopper {
namespace {

// All lanes of the producer warp call it: waits until rows of ``heads`` heads have left their delta.
__device__ __forceinline__ void wait_for_rows(const int* done, int heads, int arrivals, int lane) {
  for (int head = lane; head < heads; head += 32) {
    Patience patience;
    while (load_acquire_global(done + head) < arrivals) {
      patience.spin(head, arrivals);
      __nanosleep(100);
    }
  }
  __syncwarp();
  copy_engine_fence();
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Roles<kHeadDim>::kThreads, 1)
    block_sparse_attention_bwd_kernel(const __grid_constant__ CUtensorMap q_map,
                                      const __grid_constant__ CUtensorMap k_map,
                                      const __grid_constant__ CUtensorMap v_map,
                                      const __grid_constant__ CUtensorMap grad_map,
                                      const HopperProblem problem, const RowTensors rows,
                                      const ColumnTensors columns, const HopperWork work) {
  using R = BackwardRing<kHeadDim>;
  constexpr int kOwners = Roles<kHeadDim>::kOwners;
  // Own tiles, ring, barriers. Nothing else is in shared memory, so that it starts aligned.
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t own_tiles = shared_address(shared);
  const uint32_t tiles = own_tiles + kOwners * 2 * R::kTileBytes;
  const uint32_t barriers = tiles + R::kBytes;
  const uint32_t own_barriers = barriers + 8 * R::kBarrierWords;
  const R ring(tiles, barriers);
  if (threadIdx.x == 0) {
    ring.init();
    for (int owner = 0; owner < kOwners; ++owner) {
      barrier_init(own_barriers + 8 * owner, 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int query_blocks = (problem.queries + 63) / 64, key_blocks = (problem.keys + 63) / 64;
  const int group = problem.heads / problem.kv_heads;
  if (threadIdx.x >= kOwners * 128) {
    shrink_registers<Roles<kHeadDim>::kProducerRegisters>();
    if (threadIdx.x < kOwners * 128 + 32) {
      produce(
          ring, work,
          [&](const Item& item) {
            if (item.kind == kRows) {
              return place(item.copy, item.own[0], problem.heads, query_blocks, problem.per_head);
            }
            const Place where =
                place(item.copy, item.own[0], problem.kv_heads, key_blocks, problem.per_head);
            wait_for_rows(rows.done + where.batch * problem.heads + where.head * group, group,
                          kArrivals * query_blocks, threadIdx.x % 32);
            return where;
          },
          [&](const Item& item, const Place& where, int partner, uint32_t step, uint32_t full) {
            if (item.kind == kRows) {
              const int head = where.head / group;
              barrier_expect(full, 2 * R::kTileBytes);
              copy_tile<kHeadDim>(ring.tile(step, 0), &k_map, full, partner, head, where.batch);
              copy_tile<kHeadDim>(ring.tile(step, 1), &v_map, full, partner, head, where.batch);
              return;
            }
            const int head = where.head * group + partner / query_blocks;
            const int block = partner % query_blocks;
            const int64_t row =
                (int64_t(where.batch) * problem.heads + head) * query_blocks + block;
            barrier_expect(full, 2 * R::kTileBytes + R::kExtraBytes);
            copy_tile<kHeadDim>(ring.tile(step, 0), &q_map, full, block, head, where.batch);
            copy_tile<kHeadDim>(ring.tile(step, 1), &grad_map, full, block, head, where.batch);
            copy_bytes(ring.extra(step), rows.statistics + row * 2 * kBlock, kStatisticsBytes,
                       full);
          });
    }
    return;
  }
  grow_registers<Roles<kHeadDim>::kConsumerRegisters>();
  const int warpgroup = warpgroup_index();
  uint32_t base = 0, seen = R::kWindow - 1, own_parity = 0;
  const int end = __ldg(work.starts + blockIdx.x + 1);
  for (int index = __ldg(work.starts + blockIdx.x); index < end; ++index) {
    const Item item = load_item(work.items, index);
    const int own = warpgroup == 0 ? item.own[0] : warpgroup == 1 ? item.own[1] : item.own[2];
    const int* entries = work.entries + item.first;
    if (own >= 0 && item.kind == kRows) {
      consume_rows<T, kHeadDim>(problem, rows, item, own, entries, ring, base, seen);
    } else if (own >= 0) {
      consume_columns<T, kHeadDim>(problem, &k_map, &v_map, columns, item, own, entries, ring,
                                   own_tiles + warpgroup * 2 * R::kTileBytes,
                                   own_barriers + 8 * warpgroup, base, seen, own_parity);
    }
    base += item.count;
  }
}

template <typename T, int kHeadDim>
int run(const HopperProblem& problem, const HopperTensor& k, const HopperTensor& v,
        const RowTensors& rows, const ColumnTensors& columns, const HopperWork& work,
        cudaStream_t stream) {
  CUtensorMap q_map, k_map, v_map, grad_map;
  if (!make_map(&q_map, rows.q, problem, problem.heads, problem.queries) ||
      !make_map(&k_map, k, problem, problem.kv_heads, problem.keys) ||
      !make_map(&v_map, v, problem, problem.kv_heads, problem.keys) ||
      !make_map(&grad_map, rows.grad, problem, problem.heads, problem.queries)) {
    return cudaErrorInvalidValue;
  }
  using R = BackwardRing<kHeadDim>;
  constexpr int kOwners = Roles<kHeadDim>::kOwners;
  constexpr int kShared =
      kOwners * 2 * R::kTileBytes + R::kBytes + 8 * (R::kBarrierWords + kOwners);
  static_assert(kShared <= 232448);
  return launch_together(block_sparse_attention_bwd_kernel<T, kHeadDim>, work.workgroups,
                         Roles<kHeadDim>::kThreads, kShared, stream, q_map, k_map, v_map, grad_map,
                         problem, rows, columns, work);
}

}  // namespace
}  // namespace spion_hopper

extern "C" int hopper_backward(const HopperProblem* problem, const HopperTensor* q,
                               const HopperTensor* k, const HopperTensor* v,
                               const HopperTensor* out, const HopperTensor* grad,
                               const HopperTensor* dq, const HopperTensor* dk,
                               const HopperTensor* dv, const float* lse, float* statistics,
                               int32_t* done, const HopperWork* work, const HopperParts* parts,
                               cudaStream_t stream) {
  using namespace spion_hopper;
  const auto kernel = problem->is_half
                          ? (problem->head_dim == 64 ? run<__half, 64> : run<__half, 128>)
                          : (problem->head_dim == 64 ? run<__nv_bfloat16, 64>
                                                     : run<__nv_bfloat16, 128>);
  return kernel(*problem, *k, *v, RowTensors{*q, *out, *grad, *dq, lse, statistics, done},
                ColumnTensors{*dk, *dv, *parts}, *work, stream);
}
