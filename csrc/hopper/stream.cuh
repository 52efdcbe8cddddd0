// The skeleton of all three kernels. A workgroup holds kOwners consumer warpgroups and one producer
// warp. Each consumer owns a block of 64 tokens; the producer streams the union of the blocks'
// partners, two tiles of (64, head_dim) each, through a ring in shared memory, and every consumer
// takes the tiles that its block keeps. One copy serves up to kOwners blocks: at 64 tokens and
// head_dim 64 the path from L2 is a limit as much as the tensor cores are. Consumers drift apart, so
// that one's exponentials overlap another's products. Workgroups are persistent: the producer runs
// ahead into the next item while consumers finish the last.
#pragma once

#include "arguments.h"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace spion_hopper {

constexpr int kBlock = 64;
constexpr int kBoxBytes = kBlock * 64 * 2;  // 64 tokens of 64 elements, one copy
constexpr int kItemInts = 12;
constexpr int kMaskBits = 3;

// Consumer warpgroups of a workgroup, and registers a thread of each role: 64 K a multiprocessor.
template <int kHeadDim>
struct Roles {
  static constexpr int kOwners = kHeadDim == 64 ? 3 : 2;
  static constexpr int kThreads = (kOwners + 1) * 128;
  static constexpr int kConsumerRegisters = kHeadDim == 64 ? 160 : 240;
  static constexpr int kProducerRegisters = 24;
};

struct Item {
  int first, count, copy, own[3], slot[3];
};

__device__ __forceinline__ Item load_item(const int* items, int index) {
  const int4* source = reinterpret_cast<const int4*>(items + int64_t(index) * kItemInts);
  const int4 a = __ldg(source), b = __ldg(source + 1), c = __ldg(source + 2);
  return {a.x, a.y, a.z, {a.w, b.x, b.y}, {b.z, b.w, c.x}};
}

// What one warpgroup needs of an item: its block among ``own``.
struct OwnItem {
  int first = 0, count = 0, copy = 0, own = -1;
};

__device__ __forceinline__ OwnItem load_own_item(const int* items, int index, int warpgroup) {
  const int* source = items + int64_t(index) * kItemInts;
  const int4 a = __ldg(reinterpret_cast<const int4*>(source));
  return {a.x, a.y, a.z, __ldg(source + 3 + warpgroup)};
}

// The index of this thread's warpgroup, in a form that the compiler knows to be uniform in a warp.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(~0u, threadIdx.x / 128, 0);
}

struct Place {
  int batch, head;
};

// Batch and head of an item.
__device__ __forceinline__ Place place(int copy, int own, int own_heads, int own_blocks,
                                       int per_head) {
  if (per_head) {
    return {copy, own / own_blocks};
  }
  return {copy / own_heads, copy % own_heads};
}

// Walks over the entries of one item that a warpgroup needs. All lanes of a warp call it together.
struct EntryWalk {
  const int* entries;
  int count, bit, lane;
  int chunk = 0;
  int code, next_code;
  uint32_t wanted;

  __device__ __forceinline__ EntryWalk(const int* entries, int count, int bit, int lane)
      : entries(entries), count(count), bit(bit), lane(lane) {
    code = fetch(0);
    next_code = fetch(32);
    wanted = __ballot_sync(~0u, code >> bit & 1);
  }

  __device__ __forceinline__ int fetch(int start) const {
    return start + lane < count ? __ldg(entries + start + lane) : 0;
  }

  // Advances to the next wanted entry: its position in the item and its partner.
  __device__ __forceinline__ bool next(int& position, int& partner) {
    while (wanted == 0) {
      chunk += 32;
      if (chunk >= count) {
        return false;
      }
      code = next_code;
      next_code = fetch(chunk + 32);
      wanted = __ballot_sync(~0u, code >> bit & 1);
    }
    const int source = __ffs(wanted) - 1;
    wanted &= wanted - 1;
    position = chunk + source;
    partner = __shfl_sync(~0u, code, source) >> kMaskBits;
    return true;
  }
};

// The ring of stages: two tiles, then kExtraBytes of row statistics.
template <int kHeadDim, int kExtraBytes_ = 0, int kStages_ = kHeadDim == 64 ? 8 : 4>
struct Ring {
  static constexpr int kOwners = Roles<kHeadDim>::kOwners;
  static constexpr int kExtraBytes = kExtraBytes_;
  static constexpr int kTileBytes = kBlock * kHeadDim * 2;
  static constexpr int kStages = kStages_;
  static constexpr int kTilesBytes = kStages * 2 * kTileBytes;
  static constexpr int kBytes = kTilesBytes + kStages * kExtraBytes;

  // How far apart two steps may be that a consumer waits for. A phase's parity tells it only from its
  // neighbours, so the producer lets at most this many loads be under way: who has seen step a
  // complete knows that every step up to a - kWindow is, and may wait for any up to a + kWindow.
  // Past that it waits for ``issued`` first.
  static constexpr int kWindow = kStages / 2;
  static constexpr int kBarrierWords = 2 * kStages + 1;

  uint32_t tiles, extras, full, empty, issued;

  __device__ __forceinline__ Ring(uint32_t base, uint32_t barriers)
      : tiles(base),
        extras(base + kTilesBytes),
        full(barriers),
        empty(barriers + 8 * kStages),
        issued(barriers + 16 * kStages) {}

  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 4 * kOwners);
    }
    store_release(issued, -1);
  }
  __device__ __forceinline__ static int stage(uint32_t step) { return step % kStages; }
  __device__ __forceinline__ static uint32_t parity(uint32_t step) {
    return (step / kStages) & 1;
  }
  __device__ __forceinline__ uint32_t tile(uint32_t step, int which) const {
    return tiles + (stage(step) * 2 + which) * kTileBytes;
  }
  __device__ __forceinline__ uint32_t extra(uint32_t step) const {
    return extras + stage(step) * kExtraBytes;
  }
  // Waits for the tiles of ``step``; ``seen`` is the last step that was waited for.
  __device__ __forceinline__ void wait_full(uint32_t step, uint32_t& seen) const {
    if (step - seen > kWindow) {
      wait_issued(step - kWindow);
    }
    barrier_wait(full + 8 * stage(step), parity(step));
    seen = step;
  }
  __device__ __forceinline__ void wait_issued(uint32_t step) const {
    while (static_cast<int>(load_acquire(issued) - step) < 0) {
    }
    __syncwarp();
  }
  // The warps of a warpgroup call it, all lanes: the compiler needs to see that lanes stay together, or
  // it builds every wgmma descriptor in ordinary registers.
  __device__ __forceinline__ void release(uint32_t step, int lane) const {
    if (lane == 0) {
      barrier_arrive(empty + 8 * stage(step));
    }
    __syncwarp();
  }
};

// The producer warp: streams every entry of every item. copy(partner, place, step, barrier) issues
// the copies of one entry; it runs in one lane.
template <typename R, typename Copy>
__device__ __forceinline__ void produce(const R& ring, const HopperWork& work, int own_heads,
                                        int own_blocks, int per_head, Copy copy) {
  const int lane = threadIdx.x % 32;
  const int end = __ldg(work.starts + blockIdx.x + 1);
  uint32_t step = 0;
  for (int index = __ldg(work.starts + blockIdx.x); index < end; ++index) {
    const Item item = load_item(work.items, index);
    const Place where = place(item.copy, item.own[0], own_heads, own_blocks, per_head);
    const int* entries = work.entries + item.first;
    int code = lane < item.count ? __ldg(entries + lane) : 0;
    for (int chunk = 0; chunk < item.count; chunk += 32) {
      const int later = chunk + 32 + lane;
      const int next_code = later < item.count ? __ldg(entries + later) : 0;
      const int here = min(32, item.count - chunk);
      for (int source = 0; source < here; ++source, ++step) {
        const int entry = __shfl_sync(~0u, code, source);
        if (lane == 0) {
          const uint32_t full = ring.full + 8 * R::stage(step);
          const uint32_t empty = ring.empty + 8 * R::stage(step);
          if (step >= R::kWindow) {
            const uint32_t earlier = step - R::kWindow;
            barrier_wait(ring.full + 8 * R::stage(earlier), R::parity(earlier));
          }
          store_release(ring.issued, step);
          barrier_wait(empty, R::parity(step) ^ 1);
          // Arrives for the warpgroups that do not need this entry.
          const int absent = R::kOwners - __popc(entry & ((1 << R::kOwners) - 1));
          if (absent > 0) {
            barrier_arrive(empty, 4 * absent);
          }
          barrier_expect(full, 2 * R::kTileBytes + R::kExtraBytes);
          copy(entry >> kMaskBits, where, step, full);
        }
        __syncwarp();
      }
      code = next_code;
    }
  }
}

// Copies (64, head_dim) tokens of one head as boxes of 64 columns.
template <int kHeadDim>
__device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap* map, uint32_t barrier,
                                          int block, int head, int batch) {
#pragma unroll
  for (int box = 0; box < kHeadDim / 64; ++box) {
    copy_box(target + box * kBoxBytes, map, barrier, box * 64, block * kBlock, head, batch);
  }
}

// What 16 columns further on adds to the descriptor of a (64, head_dim) tile.
__device__ __forceinline__ constexpr uint64_t k_offset(int step) {
  return (step / 4 * kBoxBytes + step % 4 * 32) >> 4;
}

// scores (64 own, 64 partner) = A (64, head_dim) in registers times a tile (64, head_dim) transposed.
template <typename T, int kHeadDim>
__device__ __forceinline__ void multiply_transposed(float (&scores)[32],
                                                    const uint32_t (&a)[kHeadDim / 16][4],
                                                    uint32_t tile) {
  const uint64_t b = descriptor(tile, 0);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    wgmma_rs<T, 0>(scores, a[step], b + k_offset(step), step > 0);
  }
}

// The same, where the scores are new registers.
template <typename T, int kHeadDim>
__device__ __forceinline__ void start_transposed(float (&scores)[32],
                                                 const uint32_t (&a)[kHeadDim / 16][4],
                                                 uint32_t tile) {
  const uint64_t b = descriptor(tile, 0);
  wgmma_rs_first<T, 0>(scores, a[0], b);
#pragma unroll
  for (int step = 1; step < kHeadDim / 16; ++step) {
    wgmma_rs<T, 0>(scores, a[step], b + k_offset(step), 1);
  }
}

// The same by a warp on its own, for its 16 rows: nothing of the other warps is waited for.
template <typename T, int kHeadDim>
__device__ __forceinline__ void multiply_alone(float (&scores)[32],
                                               const uint32_t (&a)[kHeadDim / 16][4],
                                               uint32_t tile, int lane) {
  // The swizzle exchanges the 16-byte pieces of a row of 128 bytes by its index modulo 8.
  const uint32_t row = tile + lane / 4 * 128 + lane % 4 * 4, flip = lane / 4 * 16;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    scores[i] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const uint32_t box = row + step / 4 * kBoxBytes;
    const uint32_t low = box + (uint32_t(step % 4 * 32) ^ flip);
    const uint32_t high = box + (uint32_t(step % 4 * 32 + 16) ^ flip);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      warp_mma<T>(scores + i * 4, a[step], load_shared_word(low + i * 1024),
                  load_shared_word(high + i * 1024));
    }
  }
}

// The same with A (64, head_dim) in shared memory.
template <typename T, int kHeadDim>
__device__ __forceinline__ void multiply_transposed(float (&scores)[32], uint32_t a,
                                                    uint32_t tile) {
  const uint64_t a_descriptor = descriptor(a, 0), b = descriptor(tile, 0);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    wgmma_ss<T, 0>(scores, a_descriptor + k_offset(step), b + k_offset(step), step > 0);
  }
}

// sums (64 own, head_dim) += A (64 own, 64 partner) in registers times a tile (64, head_dim).
template <typename T, int kHeadDim>
__device__ __forceinline__ void accumulate_product(float (&sums)[kHeadDim / 2],
                                                   const uint32_t (&a)[4][4], uint32_t tile) {
  const uint64_t b = descriptor(tile, kBoxBytes);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    wgmma_rs<T, 1>(sums, a[step], b + step * (2048 >> 4), 1);
  }
}

// Rounds accumulators (64, 64) to T as the register operand A of accumulate_product.
template <typename T>
__device__ __forceinline__ void to_operand(uint32_t (&a)[4][4], const float (&values)[32]) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int i = step * 8 + part * 2;
      a[step][part] = pack<T>(values[i], values[i + 1]);
    }
  }
}

// This thread's part of (64, head_dim) tokens as the register operand A; 0 past ``tokens``.
// A thread holds rows ``row`` and ``row`` + 8 and, of every 8 columns, 2 from ``column`` on.
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_operand(uint32_t (&a)[kHeadDim / 16][4], const T* head,
                                             int64_t token_stride, int row, int column,
                                             int tokens) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = row + 8 * half;
    const T* source = head + int64_t(token) * token_stride + column;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      a[i / 2][i % 2 * 2 + half] =
          token < tokens ? __ldg(reinterpret_cast<const uint32_t*>(source + i * 8)) : 0u;
    }
  }
}

// Writes accumulators (64, head_dim) times a factor a row; rows past ``tokens`` are left out.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_rows(const float (&values)[kHeadDim / 2], T* head,
                                           int64_t token_stride, int row, int column, int tokens,
                                           float factor_low, float factor_high) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = row + 8 * half;
    const float factor = half ? factor_high : factor_low;
    if (token < tokens) {
      T* target = head + int64_t(token) * token_stride + column;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        *reinterpret_cast<uint32_t*>(target + i * 8) =
            pack<T>(values[i * 4 + half * 2] * factor, values[i * 4 + half * 2 + 1] * factor);
      }
    }
  }
}

// Which of the 64 keys of a block exist and are no padding.
__device__ __forceinline__ uint64_t key_bits(const HopperProblem& problem, int batch, int block) {
  if (problem.key_bits != nullptr) {
    return __ldg(problem.key_bits + int64_t(batch) * ((problem.keys + 63) / 64) + block);
  }
  const int inside = problem.keys - block * kBlock;
  return inside >= 64 ? ~0ull : (1ull << inside) - 1;
}

// Where lse and delta of a block's token lie: 2 of 8 tokens and 2 of the next 8 are one thread's 16
// bytes, and those of the four threads that differ are neighbours: no bank conflicts.
__device__ __forceinline__ int statistics_index(int token) {
  return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Sums over the four threads that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Entries of keys without a bit become ``value``. ``column`` is this thread's first.
__device__ __forceinline__ void mask_keys(float (&entries)[32], uint64_t bits, int column,
                                          float value) {
  const uint32_t low = uint32_t(bits) >> column, high = uint32_t(bits >> 32) >> column;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = i < 4 ? low : high;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!(word >> (i % 4 * 8 + j) & 1)) {
        entries[i * 4 + j] = value;
        entries[i * 4 + 2 + j] = value;
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ T* head_of(const HopperTensor& x, int batch, int head) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride;
}

}  // namespace spion_hopper
