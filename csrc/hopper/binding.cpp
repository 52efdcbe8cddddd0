// Registers the Hopper kernels as PyTorch operators; checks and allocates, launches, waits for nothing.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "arguments.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

HopperTensor view(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

HopperWork work(const Tensor& items, const Tensor& entries, const Tensor& starts) {
  return {items.const_data_ptr<int32_t>(), entries.const_data_ptr<int32_t>(),
          starts.const_data_ptr<int32_t>(), static_cast<int32_t>(starts.size(0) - 1)};
}

HopperProblem problem(const Tensor& q, const Tensor& k, const OptionalTensor& key_bits,
                      const OptionalTensor& key_counts, bool per_head, double scale,
                      bool pruned_zero) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && (q.size(3) == 64 || q.size(3) == 128),
              "hopper attention: q, k, v are (batch, heads, tokens, 64 or 128)");
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf,
              "hopper attention: q, k, v are bfloat16 or float16");
  HopperProblem p = {};
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.head_dim = q.size(3);
  p.is_half = q.scalar_type() == at::kHalf;
  p.pruned_zero = pruned_zero;
  p.scale = static_cast<float>(scale);
  p.per_head = per_head;
  if (key_bits.has_value()) {
    p.key_bits = reinterpret_cast<const uint64_t*>(key_bits->const_data_ptr<int64_t>());
    p.key_counts = key_counts->const_data_ptr<int32_t>();
  }
  return p;
}

void check(int error) {
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

std::tuple<Tensor, Tensor> pack_padding(const Tensor& mask) {
  const c10::cuda::CUDAGuard guard(mask.device());
  const Tensor bits = at::empty({mask.size(0), (mask.size(1) + 63) / 64}, mask.options().dtype(at::kLong));
  const Tensor counts = at::empty({mask.size(0)}, mask.options().dtype(at::kInt));
  check(hopper_pack_padding(reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()),
                            mask.size(0), mask.size(1),
                            reinterpret_cast<uint64_t*>(bits.data_ptr<int64_t>()),
                            counts.data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream()));
  return {bits, counts};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& items, const Tensor& entries,
                                   const Tensor& starts, const OptionalTensor& key_bits,
                                   const OptionalTensor& key_counts,
                                   bool per_head, double scale, bool pruned_zero) {
  const c10::cuda::CUDAGuard guard(q.device());
  const HopperProblem p = problem(q, k, key_bits, key_counts, per_head, scale, pruned_zero);
  const Tensor out = at::empty_like(q);
  const Tensor lse = at::empty({q.size(0), q.size(1), (q.size(2) + 63) / 64 * 64},
                               q.options().dtype(at::kFloat));
  const HopperTensor q_view = view(q), k_view = view(k), v_view = view(v), out_view = view(out);
  const HopperWork rows = work(items, entries, starts);
  check(hopper_forward(&p, &q_view, &k_view, &v_view, &out_view, lse.data_ptr<float>(), &rows,
                       c10::cuda::getCurrentCUDAStream()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& grad,
    const Tensor& lse, const Tensor& row_items, const Tensor& row_entries,
    const Tensor& row_starts, const Tensor& col_items, const Tensor& col_entries,
    const Tensor& col_starts, const Tensor& splits, int64_t slots, const OptionalTensor& key_bits,
    const OptionalTensor& key_counts, bool per_head, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const HopperProblem p = problem(q, k, key_bits, key_counts, per_head, scale, false);
  const Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
  const Tensor statistics = at::empty({p.batch, p.heads, lse.size(2) / 64, 2, 64}, lse.options());
  const int64_t copies = p.batch * (per_head ? 1 : p.kv_heads);
  const Tensor workspace = at::empty({copies, slots, 2 * 64 * q.size(3)}, lse.options());
  const HopperTensor q_view = view(q), k_view = view(k), v_view = view(v), out_view = view(out),
                     grad_view = view(grad), dq_view = view(dq), dk_view = view(dk),
                     dv_view = view(dv);
  const HopperWork rows = work(row_items, row_entries, row_starts);
  const HopperWork columns = work(col_items, col_entries, col_starts);
  const HopperSplits cut = {splits.const_data_ptr<int32_t>(),
                            static_cast<int32_t>(splits.size(0)), static_cast<int32_t>(slots)};
  check(hopper_backward_dq(&p, &q_view, &k_view, &v_view, &out_view, &grad_view, &dq_view,
                           lse.const_data_ptr<float>(), statistics.data_ptr<float>(), &rows, stream));
  check(hopper_backward_dkv(&p, &q_view, &k_view, &v_view, &grad_view, &dk_view, &dv_view,
                            statistics.const_data_ptr<float>(), &columns, &cut,
                            workspace.data_ptr<float>(), stream));
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spion_ds, m) {
  m.def("hopper_pack_padding(Tensor mask) -> (Tensor bits, Tensor counts)");
  m.def(
      "hopper_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor items, Tensor entries, Tensor starts, "
      "Tensor? key_bits, Tensor? key_counts, bool per_head, float scale, bool pruned_zero) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "hopper_attention_bwd(Tensor q, Tensor k, Tensor v, Tensor out, Tensor grad, Tensor lse, "
      "Tensor row_items, Tensor row_entries, Tensor row_starts, Tensor col_items, "
      "Tensor col_entries, Tensor col_starts, Tensor splits, "
      "int slots, Tensor? key_bits, Tensor? key_counts, bool per_head, float scale) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}

TORCH_LIBRARY_IMPL(spion_ds, CUDA, m) {
  m.impl("hopper_pack_padding", &pack_padding);
  m.impl("hopper_attention_fwd", &forward);
  m.impl("hopper_attention_bwd", &backward);
}
