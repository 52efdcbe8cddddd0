// spion_ds::triton_attention: an eager call of the Triton kernels that costs the host little.
//
// Python launches a kind of call the first time (spion_ds/attention/triton/backend.py) and returns
// what it launched (triton_launch.py): kernels, grids, and for each parameter a tensor's place or a
// number. Further calls of that kind are launched from here with the addresses of their own tensors.
// What makes a kind is in Calls::key. Needs no CUDA to compile; the driver is found where it was
// loaded.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Words = std::vector<int64_t>;  // triton_launch.py says what they tell of launches

// The tensors that kernels have parameters for, in the order of triton_launch.py's SLOTS.
enum Slot : int64_t {
  kQ, kK, kV, kOut, kLse, kRowPtr, kColIdx, kColPtr, kRowIdx, kColOrder, kColParts, kPadding,
  kDropoutKey, kGrad, kDq, kDk, kDv, kSeen, kSpans, kDelta, kSums, kDone, kSlots
};
constexpr int64_t kConstant = -1;
constexpr size_t kIndex = 6;  // tensors of a layout

struct Settings {
  int64_t block;
  double scale;
  bool causal, pruned_zero, skip_padded;
  double dropout_p;
  int64_t query_offset;
};

// What a call takes besides q, k and v; kept for its backward pass.
struct Rest : torch::CustomClassHolder {
  std::array<Tensor, kIndex> index;
  OptionalTensor padding, dropout_key;
  Settings settings;
  int64_t stream;  // autograd runs the backward pass on it too
};

// ---- The driver ----

using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       void*, void**, void**);

struct Driver {
  Launch launch = nullptr;
  int (*get_context)(void**) = nullptr;
  int (*get_device)(int*, int) = nullptr;
  int (*retain_primary)(void**, int) = nullptr;
  int (*set_context)(void*) = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(library != nullptr, "triton_attention: ", dlerror());
    launch = reinterpret_cast<Launch>(dlsym(library, "cuLaunchKernel"));
    get_context = reinterpret_cast<int (*)(void**)>(dlsym(library, "cuCtxGetCurrent"));
    get_device = reinterpret_cast<int (*)(int*, int)>(dlsym(library, "cuDeviceGet"));
    retain_primary =
        reinterpret_cast<int (*)(void**, int)>(dlsym(library, "cuDevicePrimaryCtxRetain"));
    set_context = reinterpret_cast<int (*)(void*)>(dlsym(library, "cuCtxSetCurrent"));
    TORCH_CHECK(launch && get_context && get_device && retain_primary && set_context,
                "triton_attention: libcuda.so.1 lacks a function");
  }

  // A thread of autograd's may have no context until it calls the runtime.
  void bind_context(int index) const {
    void* context = nullptr;
    check(get_context(&context));
    if (context == nullptr) {
      int device = 0;
      check(get_device(&device, index));
      check(retain_primary(&context, device));
      check(set_context(context));
    }
  }

  static void check(int error) {
    TORCH_CHECK(error == 0, "triton_attention: CUDA driver error ", error);
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// ---- What was launched, to be launched again ----

struct Parameter {
  int64_t slot;   // or kConstant
  int64_t value;  // the constant's bits; of workspaces that are allocated here, their bytes
};

struct Kernel {
  void* function;
  unsigned programs, threads, shared_bytes;
  std::vector<Parameter> parameters;
};

struct Plan {
  std::vector<Kernel> kernels;
  std::array<int64_t, kSlots> bytes{};  // of each tensor that a kernel has a parameter for

  // Of each kernel: function, programs, threads, shared bytes, parameters, (slot, value) of each.
  explicit Plan(const Words& words) {
    const int64_t* next = words.data();
    kernels.resize(*next++);
    for (Kernel& kernel : kernels) {
      kernel.function = reinterpret_cast<void*>(*next++);
      kernel.programs = static_cast<unsigned>(*next++);
      kernel.threads = static_cast<unsigned>(*next++);
      kernel.shared_bytes = static_cast<unsigned>(*next++);
      kernel.parameters.resize(*next++);
      for (Parameter& parameter : kernel.parameters) {
        parameter.slot = *next++;
        parameter.value = *next++;
        TORCH_CHECK(parameter.slot >= kConstant && parameter.slot < kSlots,
                    "triton_attention: no slot ", parameter.slot);
        if (parameter.slot != kConstant) {
          bytes[parameter.slot] = parameter.value;
        }
      }
    }
    TORCH_CHECK(next == words.data() + words.size(), "triton_attention: launches of another form");
  }
};

// The addresses of one call's tensors; allocates its workspaces.
class Addresses {
 public:
  Addresses(const Plan& plan, const Tensor& q, const Rest& rest) : plan_(plan), q_(q) {
    for (size_t i = 0; i < kIndex; ++i) {
      set(static_cast<Slot>(kRowPtr + i), rest.index[i]);
    }
    if (rest.padding.has_value()) {
      set(kPadding, *rest.padding);
      allocate(kSeen);
      allocate(kSpans);
    }
    if (rest.dropout_key.has_value()) {
      set(kDropoutKey, *rest.dropout_key);
    }
  }

  void set(Slot slot, const Tensor& x) {
    at_[slot] = reinterpret_cast<uint64_t>(x.const_data_ptr());
  }
  void same(Slot slot, Slot as) { at_[slot] = at_[as]; }

  void allocate(Slot slot, bool zeros = false) {
    if (plan_.bytes[slot] > 0) {
      const auto options = q_.options().dtype(at::kByte);
      workspaces_.push_back(zeros ? at::zeros({plan_.bytes[slot]}, options)
                                  : at::empty({plan_.bytes[slot]}, options));
      set(slot, workspaces_.back());
    }
  }

  void launch(int64_t stream) const {
    const Driver& cuda = driver();
    cuda.bind_context(q_.get_device());
    std::vector<uint64_t> values;
    std::vector<void*> pointers;
    for (const Kernel& kernel : plan_.kernels) {
      if (kernel.programs == 0) {
        continue;
      }
      // Behind the kernel's own parameters Triton has two addresses of scratch memory: none here.
      values.assign(kernel.parameters.size() + 2, 0);
      pointers.resize(values.size());
      for (size_t i = 0; i < values.size(); ++i) {
        pointers[i] = &values[i];
      }
      for (size_t i = 0; i < kernel.parameters.size(); ++i) {
        const Parameter& parameter = kernel.parameters[i];
        values[i] = parameter.slot == kConstant ? static_cast<uint64_t>(parameter.value)
                                                : at_[parameter.slot];
      }
      Driver::check(cuda.launch(kernel.function, kernel.programs, 1, 1, kernel.threads, 1, 1,
                                kernel.shared_bytes, reinterpret_cast<void*>(stream),
                                pointers.data(), nullptr));
    }
  }

 private:
  const Plan& plan_;
  const Tensor& q_;
  std::array<uint64_t, kSlots> at_{};
  std::vector<Tensor> workspaces_;
};

// ---- Kinds of calls ----

using Key = std::vector<int64_t>;

struct HashOfKey {
  size_t operator()(const Key& key) const {
    uint64_t hash = 14695981039346656037u;  // FNV-1a, by words
    for (const int64_t word : key) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

int64_t bits(double x) {
  int64_t word;
  std::memcpy(&word, &x, sizeof word);
  return word;
}

// Whether Triton's kernels take x as it is, and nothing but its shape, strides and dtype matters to
// what is launched.
bool is_usual(const Tensor& x) {
  return x.stride(-1) == 1 && !x.is_neg() &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

class Calls {
 public:
  // tensors: those whose strides the launches depend on.
  static Key key(std::initializer_list<const Tensor*> tensors, const Rest& rest) {
    const Tensor& q = **tensors.begin();
    const Settings& s = rest.settings;
    Key key = {q.get_device(),
               static_cast<int64_t>(q.scalar_type()),
               static_cast<int64_t>(tensors.size()),
               s.block,
               bits(s.scale),
               bits(s.dropout_p),
               s.query_offset,
               s.causal + 2 * s.pruned_zero + 4 * s.skip_padded + 8 * rest.padding.has_value() +
                   16 * rest.dropout_key.has_value(),
               rest.index[0].size(0),   // layouts
               rest.index[5].size(1)};  // parts of hot columns
    for (const Tensor* x : tensors) {
      key.insert(key.end(), x->sizes().begin(), x->sizes().end());
      key.insert(key.end(), x->strides().begin(), x->strides().end());
    }
    return key;
  }

  std::shared_ptr<const Plan> find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    return found == plans_.end() ? nullptr : found->second;
  }

  // An empty list says that the launches cannot be repeated.
  void add(Key key, const Words& launches) {
    if (launches.empty()) {
      return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMost) {
      plans_.clear();
    }
    plans_[std::move(key)] = std::make_shared<const Plan>(launches);
  }

 private:
  static constexpr size_t kMost = 1024;
  std::mutex mutex_;
  std::unordered_map<Key, std::shared_ptr<const Plan>, HashOfKey> plans_;
};

Calls& calls() {
  static auto* const all = new Calls;  // never destroyed: threads may outlive main
  return *all;
}

// ---- The operators of triton_backend.py ----

// One that takes as many tensors first, then what Rest holds.
template <typename Results, typename... Tensors>
class PythonOperator {
 public:
  explicit PythonOperator(const char* name)
      : operator_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>()) {}

  Results operator()(const Tensors&... tensors, const Rest& rest) const {
    const auto& [a, b, c, d, e, f] = rest.index;
    const Settings& s = rest.settings;
    return operator_.call(tensors..., a, b, c, d, e, f, rest.padding, rest.dropout_key, s.block,
                          s.scale, s.causal, s.pruned_zero, s.skip_padded, s.dropout_p,
                          s.query_offset);
  }

 private:
  using Signature = Results(const Tensors&..., const Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, int64_t, double, bool, bool, bool, double,
                            int64_t);
  c10::TypedOperatorHandle<Signature> operator_;
};

template <typename... Results>
using ForwardOperator =
    PythonOperator<std::tuple<Tensor, Tensor, Results...>, Tensor, Tensor, Tensor>;
template <typename... Results>
using BackwardOperator = PythonOperator<std::tuple<Tensor, Tensor, Tensor, Results...>, Tensor,
                                        Tensor, Tensor, Tensor, Tensor, Tensor>;

// Whether operators must be called: x is a fake tensor, or a mode wants to see them.
bool is_watched(const Tensor& x) {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         x.key_set().has(c10::DispatchKey::Python);
}

// ---- Forward and backward ----

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Rest& rest) {
  const c10::DeviceGuard guard(q.device());
  Key key;
  const bool usual = is_usual(q) && is_usual(k) && is_usual(v);
  if (usual) {
    key = Calls::key({&q, &k, &v}, rest);
    if (const auto plan = calls().find(key)) {
      const int64_t block = rest.settings.block;
      const Tensor out = at::empty_like(q);
      const Tensor lse = at::empty({q.size(0), q.size(1), (q.size(2) + block - 1) / block * block},
                                   q.options().dtype(at::kFloat));
      Addresses at(*plan, q, rest);
      at.set(kQ, q);
      at.set(kK, k);
      at.set(kV, v);
      at.set(kOut, out);
      at.set(kLse, lse);
      at.launch(rest.stream);
      return {out, lse};
    }
  }
  static const ForwardOperator<Words> launch("spion_ds::triton_attention_fwd_launches");
  auto [out, lse, launches] = launch(q, k, v, rest);
  if (usual) {
    calls().add(std::move(key), launches);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Rest& rest) {
  if (is_watched(grad)) {
    static const BackwardOperator<> watched("spion_ds::block_sparse_attention_bwd");
    return watched(grad, q, k, v, out, lse, rest);
  }
  const c10::DeviceGuard guard(q.device());
  Key key;
  const bool usual =
      is_usual(q) && is_usual(k) && is_usual(v) && is_usual(grad) && is_usual(out) &&
      is_usual(lse) && lse.is_contiguous() && lse.scalar_type() == at::kFloat;
  if (usual) {
    key = Calls::key({&q, &k, &v, &grad, &out}, rest);
    if (const auto plan = calls().find(key)) {
      const Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
      Addresses at(*plan, q, rest);
      at.set(kQ, q);
      at.set(kK, k);
      at.set(kV, v);
      at.set(kOut, out);
      at.set(kLse, lse);
      at.set(kGrad, grad);
      at.set(kDq, dq);
      at.set(kDk, dk);
      at.set(kDv, dv);
      at.allocate(kDelta);
      if (rest.index[5].size(1) > 0) {
        at.allocate(kSums);
        at.allocate(kDone, /*zeros=*/true);
      } else {  // never touched
        at.same(kSums, kLse);
        at.same(kDone, kColOrder);
      }
      at.launch(rest.stream);
      return {dq, dk, dv};
    }
  }
  static const BackwardOperator<Words> launch("spion_ds::triton_attention_bwd_launches");
  auto [dq, dk, dv, launches] = launch(grad, q, k, v, out, lse, rest);
  if (usual) {
    calls().add(std::move(key), launches);
  }
  return {dq, dk, dv};
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Passes gradients on, with what they depend on behind them; they have no derivative.
class DifferentiatedOnce : public torch::autograd::Function<DifferentiatedOnce> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& dq, const Tensor& dk,
                               const Tensor& dv, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&) {
    return {dq.detach(), dk.detach(), dv.detach()};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "block-sparse attention has no second derivative: its ",
                                "gradients cannot be differentiated again; ",
                                "backend=\"reference\" has all derivatives, with matrices of L × L");
  }
};

class TritonAttention : public torch::autograd::Function<TritonAttention> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const c10::intrusive_ptr<Rest>& rest) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] = ::forward(q, k, v, *rest);
    // The layout's own tensors nobody writes to; padding and keys come from the caller.
    ctx->save_for_backward({q, k, v, out, lse, rest->padding.value_or(Tensor()),
                            rest->dropout_key.value_or(Tensor())});
    ctx->saved_data["rest"] = c10::IValue::make_capsule(rest);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();  // throws where one was changed
    const auto rest = c10::static_intrusive_pointer_cast<Rest>(ctx->saved_data["rest"].toCapsule());
    variable_list results;
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      auto [dq, dk, dv] =
          ::backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], *rest);
      results = {dq, dk, dv};
    }
    if (at::GradMode::is_enabled()) {  // create_graph=True: whoever differentiates them is told
      results = DifferentiatedOnce::apply(results[0], results[1], results[2], grads[0], saved[0],
                                          saved[1], saved[2]);
    }
    results.emplace_back();  // of rest
    return results;
  }
};

Tensor triton_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_ptr,
                        const Tensor& col_idx, const Tensor& col_ptr, const Tensor& row_idx,
                        const Tensor& col_order, const Tensor& col_parts,
                        const OptionalTensor& padding, const OptionalTensor& dropout_key,
                        int64_t block, double scale, bool causal, bool pruned_zero,
                        bool skip_padded, double dropout_p, int64_t query_offset,
                        int64_t stream) {
  auto rest = c10::make_intrusive<Rest>();
  rest->index = {row_ptr, col_idx, col_ptr, row_idx, col_order, col_parts};
  rest->padding = padding;
  rest->dropout_key = dropout_key;
  rest->settings = {block, scale, causal, pruned_zero, skip_padded, dropout_p, query_offset};
  rest->stream = stream;
  if (is_watched(q)) {
    static const ForwardOperator<> watched("spion_ds::block_sparse_attention_fwd");
    return std::get<0>(watched(q, k, v, *rest));
  }
  return TritonAttention::apply(q, k, v, rest);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spion_ds, m) {
  m.def(
      "triton_attention(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col_idx, "
      "Tensor col_ptr, Tensor row_idx, Tensor col_order, Tensor col_parts, Tensor? padding, "
      "Tensor? dropout_key, int block, float scale, bool causal, bool pruned_zero, "
      "bool skip_padded, float dropout_p, int query_offset, int stream) -> Tensor",
      &triton_attention);
}
