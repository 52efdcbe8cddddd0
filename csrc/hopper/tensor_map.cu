// Tensor maps through the driver's entry point, so that nothing links against libcuda; and the
// packing of key padding masks into words.

#include "tensor_map.h"

namespace spion_hopper {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(pointer)
               : nullptr;
  }();
  return function;
}

// One warp a word, one workgroup a sample: the count needs no atomics.
__global__ void pack_padding_kernel(const uint8_t* mask, int keys, uint64_t* key_bits,
                                    int32_t* key_counts) {
  const int words = (keys + 63) / 64;
  const int batch = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  mask += int64_t(batch) * keys;
  int count = 0;
  for (int word = warp; word < words; word += blockDim.x / 32) {
    const int key = word * 64 + lane;
    const uint32_t low = __ballot_sync(~0u, key < keys && mask[key]);
    const uint32_t high = __ballot_sync(~0u, key + 32 < keys && mask[key + 32]);
    count += __popc(low) + __popc(high);
    if (lane == 0) {
      key_bits[int64_t(batch) * words + word] = uint64_t(high) << 32 | low;
    }
  }
  __shared__ int counts[32];
  if (lane == 0) {
    counts[warp] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int i = 0; i < int(blockDim.x / 32); ++i) {
      total += counts[i];
    }
    key_counts[batch] = total;
  }
}

}  // namespace

bool make_map(CUtensorMap* map, const HopperTensor& x, const HopperProblem& problem, int heads,
              int tokens) {
  const Encode encode = encoder();
  if (encode == nullptr) {
    return false;
  }
  // A dimension of size 1 may carry any stride; the copy engine wants a multiple of 16 bytes.
  const auto bytes = [](int size, int64_t stride) { return size > 1 ? stride * 2 : int64_t(16); };
  const cuuint64_t sizes[4] = {cuuint64_t(problem.head_dim), cuuint64_t(tokens), cuuint64_t(heads),
                               cuuint64_t(problem.batch)};
  const cuuint64_t strides[3] = {cuuint64_t(bytes(tokens, x.token_stride)),
                                 cuuint64_t(bytes(heads, x.head_stride)),
                                 cuuint64_t(bytes(problem.batch, x.batch_stride))};
  const cuuint32_t box[4] = {64, 64, 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode(map,
                problem.is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                4, x.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace spion_hopper

extern "C" int hopper_pack_padding(const uint8_t* mask, int32_t batch, int32_t keys,
                                   uint64_t* key_bits, int32_t* key_counts, cudaStream_t stream) {
  spion_hopper::pack_padding_kernel<<<batch, 1024, 0, stream>>>(mask, keys, key_bits, key_counts);
  return cudaGetLastError();
}
