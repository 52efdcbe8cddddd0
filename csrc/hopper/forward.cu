// Forward: out and the base-2 log-sum-exp. A warpgroup owns 64 queries; tiles are keys and values.

#include "stream.cuh"
#include "tensor_map.h"

namespace spion_hopper {
namespace {

// The running maximum rises only past this many powers of two: fewer rescalings of the sums, whose
// terms stay at or below 2^8. Which maximum is subtracted does not change the result.
constexpr float kSlack = 8.0f;

// Running softmax of the two rows of a thread: shift (base 2) and sum of the weights.
struct Softmax {
  float top[2] = {-1e30f, -1e30f};
  float total[2] = {0.0f, 0.0f};

  // Turns scores into weights 2^(score * scale - top), rescaling what was summed before.
  template <int kSums>
  __device__ __forceinline__ void update(float (&scores)[32], float (&sums)[kSums], float scale) {
    float new_top[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = scores[half * 2];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        most = fmaxf(most, fmaxf(scores[i * 4 + half * 2], scores[i * 4 + half * 2 + 1]));
      }
      const float candidate = quad_max(most) * scale;
      new_top[half] = candidate > top[half] + kSlack ? candidate : top[half];
    }
    if (__any_sync(~0u, new_top[0] != top[0] || new_top[1] != top[1])) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shrink = exp2_fast(top[half] - new_top[half]);
        top[half] = new_top[half];
        total[half] *= shrink;
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) {
          sums[i * 4 + half * 2] *= shrink;
          sums[i * 4 + half * 2 + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[i * 4 + half * 2 + j];
          score = exp2_fast(fmaf(score, scale, -top[half]));
          total[half] += score;
        }
      }
    }
  }
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void consume(const HopperProblem& problem, const HopperTensor& q,
                                        const HopperTensor& out, float* lse,
                                        const HopperWork& work,
                                        const Ring<kHeadDim>& ring) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int warpgroup = threadIdx.x / 128;
  const int row_in_block = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int blocks = (problem.queries + 63) / 64;
  const float scale = problem.scale * 1.4426950408889634f;
  const int64_t total_work =
      int64_t(work.item_count) * problem.batch * (problem.per_head ? 1 : problem.heads);

  uint32_t base = 0, seen = 0;
  for (int round = 0; int64_t(round) * gridDim.x < total_work; ++round) {
    const int64_t index = work_index(round);
    if (index >= total_work) {
      continue;
    }
    const Item item = load_item(work.items, index % work.item_count);
    int own = warpgroup == 0 ? item.own[0] : warpgroup == 1 ? item.own[1] : item.own[2];
    if (own >= 0) {
      const Place where =
          place(index / work.item_count, own, problem.heads, blocks, problem.per_head);
      own %= blocks;
      const int row = own * kBlock + row_in_block;
      uint32_t q_operand[kHeadDim / 16][4];
      load_operand<T, kHeadDim>(q_operand, head_of<const T>(q, where.batch, where.head),
                                q.token_stride, row, column, problem.queries);

      Softmax softmax;
      float sums[kHeadDim / 2];
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) {
        sums[i] = 0.0f;
      }
      int kept = 0;
      uint32_t held = 0;
      bool holds = false;
      EntryWalk walk(work.entries + item.first, item.count, warpgroup, lane);
      int position, partner;
      while (walk.next(position, partner)) {
        const uint32_t step = base + position;
        // The stage ahead can be the one that is held: let go before a long wait.
        if (holds && step - held >= Ring<kHeadDim>::kStages / 2) {
          wgmma_wait<0>();
          if (lane == 0) ring.release(held);
          holds = false;
        }
        const uint64_t bits = key_bits(problem, where.batch, partner);
        kept += __popcll(bits);
        float scores[32];
        ring.pass_over(seen, step, lane);
        ring.wait_full(step);
        seen = step + 1;
        wgmma_fence();
        multiply_transposed<T, kHeadDim>(scores, q_operand, ring.tile(step, 0));
        wgmma_commit();
        wgmma_wait<0>();
        if (holds && lane == 0) {
          ring.release(held);
        }
        if (bits != ~0ull) {
          mask_keys(scores, bits, column, -INFINITY);
        }
        softmax.update(scores, sums, scale);
        uint32_t weights[4][4];
        to_operand<T>(weights, scores);
        wgmma_fence();
        accumulate_product<T, kHeadDim>(sums, weights, ring.tile(step, 1));
        wgmma_commit();
        held = step;
        holds = true;
      }
      wgmma_wait<0>();
      if (holds && lane == 0) {
        ring.release(held);
      }

      const int valid = problem.key_bits ? __ldg(problem.key_counts + where.batch) : problem.keys;
      const float pruned = problem.pruned_zero ? float(valid - kept) : 0.0f;
      float factor[2];
      float* lse_head =
          lse + (int64_t(where.batch) * problem.heads + where.head) * (int64_t(blocks) * kBlock);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = quad_sum(softmax.total[half]);
        const bool any = total > 0.0f;
        // A pruned entry is a logit 0, so the shift is at least 0 where there is one.
        const float top = pruned > 0.0f ? fmaxf(softmax.top[half], 0.0f) : softmax.top[half];
        const float shrink = exp2_fast(softmax.top[half] - top);
        total = total * shrink + (pruned > 0.0f ? pruned * exp2_fast(-top) : 0.0f);
        factor[half] = any ? shrink / total : 0.0f;
        if (lane % 4 == 0) {
          const int token = row + 8 * half;
          // +inf makes every probability 0 in the backward pass.
          lse_head[token] = any && token < problem.queries ? top + log2f(total) : INFINITY;
        }
      }
      store_rows<T, kHeadDim>(sums, head_of<T>(out, where.batch, where.head), out.token_stride, row,
                              column, problem.queries, factor[0], factor[1]);
    }
    base += item.count;
    ring.pass_over(seen, base, lane);
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Roles<kHeadDim>::kThreads, 1)
    block_sparse_attention_fwd_kernel(const __grid_constant__ CUtensorMap k_map,
                                      const __grid_constant__ CUtensorMap v_map,
                                      const HopperProblem problem, const HopperTensor q,
                                      const HopperTensor out, float* lse, const HopperWork work) {
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[2 * Ring<kHeadDim>::kStages];
  const Ring<kHeadDim> ring((shared_address(shared) + 1023) & ~1023u,
                                   shared_address(barriers));
  if (threadIdx.x == 0) {
    ring.init();
    barrier_init_fence();
  }
  __syncthreads();
  constexpr int kConsumers = Roles<kHeadDim>::kOwners * 128;
  if (threadIdx.x >= kConsumers) {
    shrink_registers<Roles<kHeadDim>::kProducerRegisters>();
    if (threadIdx.x < kConsumers + 32) {
      const int group = problem.heads / problem.kv_heads;
      produce(ring, work, problem.batch * (problem.per_head ? 1 : problem.heads), problem.heads,
              (problem.queries + 63) / 64, problem.per_head,
              [&](int partner, const Place& where, uint32_t step, uint32_t full) {
                const int head = where.head / group;
                copy_tile<kHeadDim>(ring.tile(step, 0), &k_map, full, partner, head, where.batch);
                copy_tile<kHeadDim>(ring.tile(step, 1), &v_map, full, partner, head, where.batch);
              });
    }
  } else {
    grow_registers<Roles<kHeadDim>::kConsumerRegisters>();
    consume<T, kHeadDim>(problem, q, out, lse, work, ring);
  }
}

template <typename T, int kHeadDim>
int run(const HopperProblem& problem, const HopperTensor& q, const HopperTensor& k,
        const HopperTensor& v, const HopperTensor& out, float* lse, const HopperWork& work,
        cudaStream_t stream) {
  CUtensorMap k_map, v_map;
  if (!make_map(&k_map, k, problem, problem.kv_heads, problem.keys) ||
      !make_map(&v_map, v, problem, problem.kv_heads, problem.keys)) {
    return cudaErrorInvalidValue;
  }
  const int64_t total =
      int64_t(work.item_count) * problem.batch * (problem.per_head ? 1 : problem.heads);
  const int64_t grid = total < multiprocessors() ? total : multiprocessors();
  return launch(block_sparse_attention_fwd_kernel<T, kHeadDim>, grid, Roles<kHeadDim>::kThreads,
                Ring<kHeadDim>::kBytes + 1024, stream, k_map, v_map, problem, q, out, lse,
                work);
}

}  // namespace
}  // namespace spion_hopper

extern "C" int hopper_forward(const HopperProblem* problem, const HopperTensor* q,
                              const HopperTensor* k, const HopperTensor* v,
                              const HopperTensor* out, float* lse, const HopperWork* work,
                              cudaStream_t stream) {
  using namespace spion_hopper;
  const auto kernel = problem->is_half
                          ? (problem->head_dim == 64 ? run<__half, 64> : run<__half, 128>)
                          : (problem->head_dim == 64 ? run<__nv_bfloat16, 64>
                                                     : run<__nv_bfloat16, 128>);
  return kernel(*problem, *q, *k, *v, *out, lse, *work, stream);
}
