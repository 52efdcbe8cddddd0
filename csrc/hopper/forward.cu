// Forward: out and the base-2 log-sum-exp. A warpgroup owns 64 queries; tiles are keys and values.

#include "stream.cuh"
#include "tensor_map.h"

namespace spion_hopper {
namespace {

// The most that a thread's 16 weights of a row and tile may sum to before the shift is raised.
// Which shift is subtracted does not change the result as long as the weights fit their dtype.
constexpr float kMost = 256.0f;

// Running softmax of the two rows of a thread: shift (base 2) and sum of the weights.
struct Softmax {
  float top[2] = {-1e30f, -1e30f};
  float total[2] = {0.0f, 0.0f};

  // weights = 2^(score * scale - top). It tries the old shift first, and takes the maxima only
  // where a sum shows that weights grew: past the first tiles that is rare.
  template <int kSums>
  __device__ __forceinline__ void update(const float (&scores)[32], float (&weights)[32],
                                         float (&sums)[kSums], float scale) {
    float added[2];
    weigh(scores, weights, added, scale);
    if (__any_sync(~0u, added[0] > kMost || added[1] > kMost)) {
      raise(scores, sums, scale);
      weigh(scores, weights, added, scale);
    }
    total[0] += added[0];
    total[1] += added[1];
  }

  __device__ __forceinline__ void weigh(const float (&scores)[32], float (&weights)[32],
                                        float (&added)[2], float scale) const {
    float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      weights[i] = exp2_fast(fmaf(scores[i], scale, -top[i / 2 % 2]));
      (i % 2 ? odd : even)[i / 2 % 2] += weights[i];
    }
    added[0] = even[0] + odd[0];
    added[1] = even[1] + odd[1];
  }

  // Raises the shifts to the rows' maxima and rescales what was summed before.
  template <int kSums>
  __device__ __forceinline__ void raise(const float (&scores)[32], float (&sums)[kSums],
                                        float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = scores[half * 2];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        most = fmaxf(most, fmaxf(scores[i * 4 + half * 2], scores[i * 4 + half * 2 + 1]));
      }
      const float new_top = fmaxf(top[half], quad_max(most) * scale);
      const float shrink = exp2_fast(top[half] - new_top);
      top[half] = new_top;
      total[half] *= shrink;
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i) {
        sums[i * 4 + half * 2] *= shrink;
        sums[i * 4 + half * 2 + 1] *= shrink;
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
  const int warpgroup = warpgroup_index();
  const int row_in_block = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int blocks = (problem.queries + 63) / 64;
  const float scale = problem.scale * 1.4426950408889634f;
  uint32_t base = 0, seen = Ring<kHeadDim>::kWindow - 1;
  const int end = __ldg(work.starts + blockIdx.x + 1);
  for (int index = __ldg(work.starts + blockIdx.x); index < end; ++index) {
    const Item item = load_item(work.items, index);
    int own = warpgroup == 0 ? item.own[0] : warpgroup == 1 ? item.own[1] : item.own[2];
    if (own >= 0) {
      const Place where =
          place(item.copy, own, problem.heads, blocks, problem.per_head);
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
          ring.release(held, lane);
          holds = false;
        }
        const uint64_t bits = key_bits(problem, where.batch, partner);
        kept += __popcll(bits);
        float scores[32];
        ring.wait_full(step, seen);
        wgmma_fence();
        multiply_transposed<T, kHeadDim>(scores, q_operand, ring.tile(step, 0));
        wgmma_commit();
        wgmma_wait<0>();
        if (holds) {
          ring.release(held, lane);
        }
        if (bits != ~0ull) {
          mask_keys(scores, bits, column, -INFINITY);
        }
        float weights[32];
        softmax.update(scores, weights, sums, scale);
        uint32_t operand[4][4];
        to_operand<T>(operand, weights);
        wgmma_fence();
        accumulate_product<T, kHeadDim>(sums, operand, ring.tile(step, 1));
        wgmma_commit();
        held = step;
        holds = true;
      }
      wgmma_wait<0>();
      if (holds) {
        ring.release(held, lane);
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
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Roles<kHeadDim>::kThreads, 1)
    block_sparse_attention_fwd_kernel(const __grid_constant__ CUtensorMap k_map,
                                      const __grid_constant__ CUtensorMap v_map,
                                      const HopperProblem problem, const HopperTensor q,
                                      const HopperTensor out, float* lse, const HopperWork work) {
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[Ring<kHeadDim>::kBarrierWords];
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
      produce(ring, work, problem.heads,              (problem.queries + 63) / 64, problem.per_head,
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
  return launch(block_sparse_attention_fwd_kernel<T, kHeadDim>, work.workgroups,
                Roles<kHeadDim>::kThreads, Ring<kHeadDim>::kBytes + 1024, stream, k_map, v_map, problem, q, out, lse,
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
