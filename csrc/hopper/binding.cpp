// The CUDA implementations of spion_ds::hopper_attention_{fwd,bwd}, whose schemas hopper_backend.py
// defines: checks and allocates, launches, waits for nothing.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "arguments.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Whether the copy engine can follow the strides of (batch, heads, tokens, head_dim).
bool is_copyable(const Tensor& x) {
  bool copyable = x.stride(3) == 1;
  for (int64_t dim = 0; dim < 3; ++dim) {
    copyable &= x.size(dim) <= 1 || (x.stride(dim) > 0 && x.stride(dim) % 8 == 0);
  }
  return copyable;
}

// Fresh memory for what has the shape of x. Only shape and strides decide how it lies: the fake
// implementations say the same.
Tensor like(const Tensor& x) {
  return is_copyable(x) ? at::empty_like(x) : at::empty(x.sizes(), x.options());
}

// x, or a copy where the copy engine cannot read it.
Tensor readable(const Tensor& x) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return aligned && is_copyable(x) ? x : like(x).copy_(x);
}

HopperTensor view(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

HopperWork work(const Tensor& items, const Tensor& entries, const Tensor& starts) {
  return {items.const_data_ptr<int32_t>(), entries.const_data_ptr<int32_t>(),
          starts.const_data_ptr<int32_t>(), static_cast<int32_t>(starts.size(0) - 1)};
}

void check(int error) {
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

// Tensor maps are made by the driver, in the context of the calling thread. One of autograd's may
// have none until it calls the runtime, and the guard calls nothing where the device is the same.
void bind_context(const Tensor& x) {
  C10_CUDA_CHECK(cudaSetDevice(x.get_device()));
}

// Padding as the kernels read it; both undefined without.
struct Padding {
  Tensor bits, counts;

  Padding(const OptionalTensor& mask, cudaStream_t stream) {
    if (!mask.has_value()) {
      return;
    }
    const Tensor real = mask->contiguous();
    const int64_t batch = real.size(0), keys = real.size(1);
    bits = at::empty({batch, (keys + 63) / 64}, real.options().dtype(at::kLong));
    counts = at::empty({batch}, real.options().dtype(at::kInt));
    check(hopper_pack_padding(reinterpret_cast<const uint8_t*>(real.const_data_ptr<bool>()),
                              static_cast<int32_t>(batch), static_cast<int32_t>(keys),
                              reinterpret_cast<uint64_t*>(bits.mutable_data_ptr<int64_t>()),
                              counts.mutable_data_ptr<int32_t>(), stream));
  }
};

HopperProblem problem(const Tensor& q, const Tensor& k, const Padding& padding, bool per_head,
                      double scale, bool pruned_zero) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && (q.size(3) == 64 || q.size(3) == 128),
              "hopper attention: q, k, v are (batch, heads, tokens, 64 or 128)");
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf,
              "hopper attention: q, k, v are bfloat16 or float16");
  HopperProblem p = {};
  p.batch = static_cast<int32_t>(q.size(0));
  p.heads = static_cast<int32_t>(q.size(1));
  p.kv_heads = static_cast<int32_t>(k.size(1));
  p.queries = static_cast<int32_t>(q.size(2));
  p.keys = static_cast<int32_t>(k.size(2));
  p.head_dim = static_cast<int32_t>(q.size(3));
  p.is_half = q.scalar_type() == at::kHalf;
  p.pruned_zero = pruned_zero;
  p.scale = static_cast<float>(scale);
  p.per_head = per_head;
  if (padding.bits.defined()) {
    p.key_bits = reinterpret_cast<const uint64_t*>(padding.bits.const_data_ptr<int64_t>());
    p.key_counts = padding.counts.const_data_ptr<int32_t>();
  }
  return p;
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& q_given, const Tensor& k_given, const Tensor& v_given, const Tensor& row_items,
    const Tensor& row_entries, const Tensor& row_starts, const Tensor& /*col_items*/,
    const Tensor& /*col_entries*/, const Tensor& /*col_starts*/, const Tensor& /*col_splits*/,
    const Tensor& /*col_slots*/, const OptionalTensor& padding_mask, bool per_head, double scale,
    bool pruned_zero, bool skip_padded) {
  const c10::cuda::CUDAGuard guard(q_given.device());
  bind_context(q_given);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor q = readable(q_given), k = readable(k_given), v = readable(v_given);
  const Padding padding(padding_mask, stream);
  const HopperProblem p = problem(q, k, padding, per_head, scale, pruned_zero);
  const Tensor out = like(q_given);
  const Tensor lse = at::empty({q.size(0), q.size(1), (q.size(2) + 63) / 64 * 64},
                               q.options().dtype(at::kFloat));
  const HopperTensor q_view = view(q), k_view = view(k), v_view = view(v), out_view = view(out);
  const HopperWork rows = work(row_items, row_entries, row_starts);
  check(hopper_forward(&p, &q_view, &k_view, &v_view, &out_view, lse.mutable_data_ptr<float>(),
                       &rows, stream));
  if (skip_padded && padding_mask.has_value()) {
    // An lse of +inf makes every probability of the query 0 in the backward pass.
    const Tensor padded = padding_mask->logical_not().unsqueeze(1);  // (batch, 1, queries)
    out.masked_fill_(padded.unsqueeze(3), 0.0);
    lse.narrow(2, 0, q.size(2)).masked_fill_(padded, std::numeric_limits<double>::infinity());
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_given, const Tensor& q_given, const Tensor& k_given, const Tensor& v_given,
    const Tensor& out_given, const Tensor& lse, const Tensor& row_items, const Tensor& row_entries,
    const Tensor& row_starts, const Tensor& col_items, const Tensor& col_entries,
    const Tensor& col_starts, const Tensor& col_splits, const Tensor& col_slots,
    const OptionalTensor& padding_mask, bool per_head, double scale, bool pruned_zero,
    bool /*skip_padded*/) {
  const c10::cuda::CUDAGuard guard(q_given.device());
  bind_context(q_given);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor q = readable(q_given), k = readable(k_given), v = readable(v_given),
               out = readable(out_given), grad = readable(grad_given);
  const Padding padding(padding_mask, stream);
  const HopperProblem p = problem(q, k, padding, per_head, scale, pruned_zero);
  const Tensor dq = like(q_given), dk = like(k_given), dv = like(v_given);
  const Tensor statistics = at::empty({p.batch, p.heads, lse.size(2) / 64, 2, 64}, lse.options());
  const int64_t copies = int64_t(p.batch) * (per_head ? 1 : p.kv_heads);
  const int64_t slots = col_slots.size(0);
  const Tensor workspace = at::empty({copies, slots, 2 * 64 * q.size(3)}, lse.options());
  const HopperTensor q_view = view(q), k_view = view(k), v_view = view(v), out_view = view(out),
                     grad_view = view(grad), dq_view = view(dq), dk_view = view(dk),
                     dv_view = view(dv);
  const HopperWork rows = work(row_items, row_entries, row_starts);
  const HopperWork columns = work(col_items, col_entries, col_starts);
  const HopperSplits splits = {col_splits.const_data_ptr<int32_t>(),
                               static_cast<int32_t>(col_splits.size(0)),
                               static_cast<int32_t>(slots)};
  check(hopper_backward_dq(&p, &q_view, &k_view, &v_view, &out_view, &grad_view, &dq_view,
                           lse.const_data_ptr<float>(), statistics.mutable_data_ptr<float>(), &rows,
                           stream));
  check(hopper_backward_dkv(&p, &q_view, &k_view, &v_view, &grad_view, &dk_view, &dv_view,
                            statistics.const_data_ptr<float>(), &columns, &splits,
                            workspace.mutable_data_ptr<float>(), stream));
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(spion_ds, CUDA, m) {
  m.impl("hopper_attention_fwd", &forward);
  m.impl("hopper_attention_bwd", &backward);
}
