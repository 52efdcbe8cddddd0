// dQ and delta, the row sums of dO * O. A warpgroup owns 64 queries; tiles are keys and values.

#include "stream.cuh"
#include "tensor_map.h"

namespace spion_hopper {
namespace {

struct DqTensors {
  HopperTensor q, out, grad, dq;
  const float* lse;
  float* statistics;
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void consume(const HopperProblem& problem, const DqTensors& tensors,
                                        const HopperWork& work, const Ring<kHeadDim>& ring) {
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
      uint32_t q_operand[kHeadDim / 16][4], grad_operand[kHeadDim / 16][4];
      load_operand<T, kHeadDim>(q_operand, head_of<const T>(tensors.q, where.batch, where.head),
                                tensors.q.token_stride, row, column, problem.queries);
      load_operand<T, kHeadDim>(grad_operand,
                                head_of<const T>(tensors.grad, where.batch, where.head),
                                tensors.grad.token_stride, row, column, problem.queries);
      const int64_t block = (int64_t(where.batch) * problem.heads + where.head) * blocks + own;
      float delta[2] = {0.0f, 0.0f};
      {
        uint32_t out_operand[kHeadDim / 16][4];
        load_operand<T, kHeadDim>(out_operand,
                                  head_of<const T>(tensors.out, where.batch, where.head),
                                  tensors.out.token_stride, row, column, problem.queries);
#pragma unroll
        for (int i = 0; i < kHeadDim / 4; ++i) {
          const float2 x = unpack<T>(out_operand[i / 4][i % 4]);
          const float2 y = unpack<T>(grad_operand[i / 4][i % 4]);
          delta[i % 2] += x.x * y.x + x.y * y.y;
        }
      }
      float lse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        delta[half] = quad_sum(delta[half]);
        const int token = row_in_block + 8 * half;
        lse[half] = __ldg(tensors.lse + block * kBlock + token);
        if (lane % 4 == 0) {
          float* statistics = tensors.statistics + block * 2 * kBlock + statistics_index(token);
          statistics[0] = lse[half];
          statistics[kBlock] = delta[half];
        }
      }

      float sums[kHeadDim / 2];
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) {
        sums[i] = 0.0f;
      }
      EntryWalk walk(work.entries + item.first, item.count, warpgroup, lane);
      int position, partner;
      while (walk.next(position, partner)) {
        const uint32_t step = base + position;
        const uint64_t bits = key_bits(problem, where.batch, partner);
        float probs[32], dprobs[32];
        ring.wait_full(step, seen);
        wgmma_fence();
        multiply_transposed<T, kHeadDim>(probs, q_operand, ring.tile(step, 0));
        wgmma_commit();
        multiply_transposed<T, kHeadDim>(dprobs, grad_operand, ring.tile(step, 1));
        wgmma_commit();
        wgmma_wait<1>();
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          probs[i] = exp2_fast(fmaf(probs[i], scale, -lse[i / 2 % 2]));
        }
        if (bits != ~0ull) {
          mask_keys(probs, bits, column, 0.0f);
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          probs[i] *= dprobs[i] - delta[i / 2 % 2];
        }
        uint32_t dscores[4][4];
        to_operand<T>(dscores, probs);
        wgmma_fence();
        accumulate_product<T, kHeadDim>(sums, dscores, ring.tile(step, 0));
        wgmma_commit();
        wgmma_wait<0>();
        ring.release(step, lane);
      }
      store_rows<T, kHeadDim>(sums, head_of<T>(tensors.dq, where.batch, where.head),
                              tensors.dq.token_stride, row, column, problem.queries, problem.scale,
                              problem.scale);
    }
    base += item.count;
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Roles<kHeadDim>::kThreads, 1)
    block_sparse_attention_bwd_dq_kernel(const __grid_constant__ CUtensorMap k_map,
                                         const __grid_constant__ CUtensorMap v_map,
                                         const HopperProblem problem, const DqTensors tensors,
                                         const HopperWork work) {
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[Ring<kHeadDim>::kBarrierWords];
  const Ring<kHeadDim> ring((shared_address(shared) + 1023) & ~1023u, shared_address(barriers));
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
    consume<T, kHeadDim>(problem, tensors, work, ring);
  }
}

template <typename T, int kHeadDim>
int run(const HopperProblem& problem, const HopperTensor& k, const HopperTensor& v,
        const DqTensors& tensors, const HopperWork& work, cudaStream_t stream) {
  CUtensorMap k_map, v_map;
  if (!make_map(&k_map, k, problem, problem.kv_heads, problem.keys) ||
      !make_map(&v_map, v, problem, problem.kv_heads, problem.keys)) {
    return cudaErrorInvalidValue;
  }
  return launch(block_sparse_attention_bwd_dq_kernel<T, kHeadDim>, work.workgroups,
                Roles<kHeadDim>::kThreads, Ring<kHeadDim>::kBytes + 1024, stream, k_map, v_map, problem, tensors, work);
}

}  // namespace
}  // namespace spion_hopper

extern "C" int hopper_backward_dq(const HopperProblem* problem, const HopperTensor* q,
                                  const HopperTensor* k, const HopperTensor* v,
                                  const HopperTensor* out, const HopperTensor* grad,
                                  const HopperTensor* dq, const float* lse, float* statistics,
                                  const HopperWork* work, cudaStream_t stream) {
  using namespace spion_hopper;
  const auto kernel = problem->is_half
                          ? (problem->head_dim == 64 ? run<__half, 64> : run<__half, 128>)
                          : (problem->head_dim == 64 ? run<__nv_bfloat16, 64>
                                                     : run<__nv_bfloat16, 128>);
  return kernel(*problem, *k, *v, DqTensors{*q, *out, *grad, *dq, lse, statistics}, *work, stream);
}
