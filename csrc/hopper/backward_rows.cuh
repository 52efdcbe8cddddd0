// Items of queries in the backward pass: dQ, and delta, the row sums of dO * O. A warpgroup owns 64
// queries; tiles are keys and values.
#pragma once

#include "stream.cuh"

namespace spion_hopper {

struct RowTensors {
  HopperTensor q, out, grad, dq;
  const float* lse;
  float* statistics;
  int* done;
};

// What a row block adds to ``done``: one a warp of its warpgroup.
constexpr int kArrivals = 4;

// A warpgroup's part of an item whose first step in the ring is ``base``.
template <typename T, int kHeadDim, typename R>
__device__ __forceinline__ void consume_rows(const HopperProblem& problem,
                                             const RowTensors& tensors, const Item& item, int own,
                                             const int* item_entries, const R& ring, uint32_t base,
                                             uint32_t& seen) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int warpgroup = warpgroup_index();
  const int row_in_block = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int blocks = (problem.queries + 63) / 64;
  const float scale = problem.scale * 1.4426950408889634f;
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

  // Columns of the head, on other multiprocessors, may read them once all its rows have come so far.
  copy_engine_fence();
  __syncwarp();
  if (lane == 0) {
    count_release(tensors.done + where.batch * problem.heads + where.head);
  }
  __syncwarp();

  float sums[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    sums[i] = 0.0f;
  }
  EntryWalk walk(item_entries, item.count, warpgroup, lane);
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

}  // namespace spion_hopper
