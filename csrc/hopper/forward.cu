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

  // entries = 2^(entries * scale - top), with the old shift. Returns whether a row of the warp has
  // outgrown it; only then, which past the first tiles is rare, maxima are taken.
  __device__ __forceinline__ bool weigh(float (&entries)[32], float scale) {
    float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      entries[i] = exp2_fast(fmaf(entries[i], scale, -top[i / 2 % 2]));
      (i % 2 ? odd : even)[i / 2 % 2] += entries[i];
    }
    const float low = even[0] + odd[0], high = even[1] + odd[1];
    if (__any_sync(~0u, low > kMost || high > kMost)) {
      return true;
    }
    total[0] += low;
    total[1] += high;
    return false;
  }

  // Raises the shifts to the rows' maxima, rescales what was summed before, and weighs.
  template <int kSums>
  __device__ __forceinline__ void raise(float (&scores)[32], float (&sums)[kSums], float scale) {
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
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[i * 4 + half * 2 + j];
          x = exp2_fast(fmaf(x, scale, -new_top));
          total[half] += x;
        }
      }
    }
  }
};

// A deeper ring than the other kernels': a warpgroup holds up to three stages.
template <int kHeadDim>
using ForwardRing = Ring<kHeadDim, 0, kHeadDim == 64 ? 12 : 7>;

// The work of one warpgroup. The scores of the next tile are computed while this tile's weights are
// taken, and multiplied by the values during the next: the tensor cores have work meanwhile, even
// where all warpgroups take their exponentials at the same time.
template <typename T, int kHeadDim>
__device__ __forceinline__ void consume(const HopperProblem& problem, const HopperTensor& q,
                                        const HopperTensor& out, float* lse,
                                        const HopperWork& work,
                                        const ForwardRing<kHeadDim>& ring) {
  // How far ahead of a stage that it holds a warpgroup waits for another; under kStages, or the
  // producer would wait for it in turn.
  constexpr uint32_t kReach = ForwardRing<kHeadDim>::kStages - 1;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int warpgroup = warpgroup_index();
  const int row_in_block = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int blocks = (problem.queries + 63) / 64;
  const float scale = problem.scale * 1.4426950408889634f;
  // The blocks of keys of which some may be missing: all, or the last one.
  const bool padded = problem.key_bits != nullptr;
  const int partial = problem.keys % 64 ? problem.keys / 64 : -1;

  uint32_t q_operand[kHeadDim / 16][4];
  const auto load_queries = [&](const OwnItem& item) {
    const Place where = place(item.copy, item.own, problem.heads, blocks, problem.per_head);
    load_operand<T, kHeadDim>(q_operand, head_of<const T>(q, where.batch, where.head),
                              q.token_stride, item.own % blocks * kBlock + row_in_block, column,
                              problem.queries);
  };

  uint32_t base = 0, seen = ForwardRing<kHeadDim>::kWindow - 1;
  int index = __ldg(work.starts + blockIdx.x);
  const int end = __ldg(work.starts + blockIdx.x + 1);
  OwnItem item;
  if (index < end) {
    item = load_own_item(work.items, index, warpgroup);
    if (item.own >= 0) {
      load_queries(item);
    }
  }
  for (; index < end; ++index) {
    OwnItem next_item;
    // Before the result is stored, so that its latency and that of the queries are hidden.
    const auto load_next = [&] {
      if (index + 1 < end) {
        next_item = load_own_item(work.items, index + 1, warpgroup);
        if (next_item.own >= 0) {
          load_queries(next_item);
        }
      }
    };
    if (item.own >= 0) {
      const Place where = place(item.copy, item.own, problem.heads, blocks, problem.per_head);
      const int row = item.own % blocks * kBlock + row_in_block;
      Softmax softmax;
      float sums[kHeadDim / 2];
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) {
        sums[i] = 0.0f;
      }
      int kept = 0;
      EntryWalk walk(work.entries + item.first, item.count, warpgroup, lane);
      int position, partner;
      bool more = walk.next(position, partner);
      if (more) {
        uint32_t step = base + position, held = 0, next_step = 0;
        int block = partner, next_block = 0;
        // Which keys of a tile exist: mostly all.
        const auto bits_of = [&](int key_block) {
          return padded || key_block == partial ? key_bits(problem, where.batch, key_block) : ~0ull;
        };
        bool whole = bits_of(block) == ~0ull, next_whole = true;
        const auto look_up = [&] {
          more = walk.next(position, partner);
          next_step = base + position;
          next_block = partner;
          next_whole = bits_of(partner) == ~0ull;
        };
        const auto advance = [&] {
          kept += whole ? kBlock : __popcll(bits_of(block));
          held = step;
          step = next_step;
          block = next_block;
          whole = next_whole;
        };
        const auto start_scores = [&](float (&scores)[32], uint32_t tile_step) {
          wgmma_fence();
          start_transposed<T, kHeadDim>(scores, q_operand, ring.tile(tile_step, 0));
          wgmma_commit();
        };
        uint32_t operand[4][4];
        const auto start_sums = [&] {
          wgmma_fence();
          accumulate_product<T, kHeadDim>(sums, operand, ring.tile(step, 1));
          wgmma_commit();
        };
        ring.wait_full(step, seen);
        look_up();
        float scores[32];
        while (true) {
          // Nothing is under way here: the first tile, and those that are not as most are.
          start_scores(scores, step);
          wgmma_wait<0>();
          if (!whole) {
            mask_keys(scores, bits_of(block), column, -INFINITY);
          }
          softmax.raise(scores, sums, scale);
          to_operand<T>(operand, scores);
          while (more && next_whole && next_step - step < kReach) {
            ring.wait_full(next_step, seen);
            start_scores(scores, next_step);
            start_sums();
            advance();
            look_up();
            wgmma_wait<1>();
            if (softmax.weigh(scores, scale)) {
              // The scores are gone. The other warps may not be here: wgmma would need all four.
              wgmma_wait<0>();
              multiply_alone<T, kHeadDim>(scores, q_operand, ring.tile(step, 0), lane);
              softmax.raise(scores, sums, scale);
            }
            wgmma_wait<0>();
            ring.release(held, lane);
            to_operand<T>(operand, scores);
          }
          start_sums();
          wgmma_wait<0>();
          ring.release(step, lane);
          advance();
          if (!more) {
            break;
          }
          ring.wait_full(step, seen);
          look_up();
        }
      }
      load_next();

      const int valid = padded ? __ldg(problem.key_counts + where.batch) : problem.keys;
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
    } else {
      load_next();
    }
    base += item.count;
    item = next_item;
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Roles<kHeadDim>::kThreads, 1)
    block_sparse_attention_fwd_kernel(const __grid_constant__ CUtensorMap k_map,
                                      const __grid_constant__ CUtensorMap v_map,
                                      const HopperProblem problem, const HopperTensor q,
                                      const HopperTensor out, float* lse, const HopperWork work) {
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[ForwardRing<kHeadDim>::kBarrierWords];
  const ForwardRing<kHeadDim> ring((shared_address(shared) + 1023) & ~1023u,
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
                Roles<kHeadDim>::kThreads, ForwardRing<kHeadDim>::kBytes + 1024, stream, k_map, v_map, problem, q, out, lse,
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
