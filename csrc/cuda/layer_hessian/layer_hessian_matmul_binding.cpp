#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "checks.h"
#include "cuda/core/binding.h"
#include "layer_hessian_matmul.h"
#include "layer_inputs.h"

namespace hesskern::cuda {

namespace {

// x [N, d] or [N, d, t], of float32
LayerInputs inputs_of(const at::Tensor& x) {
  const bool positions = x.dim() == 3;
  return {x.const_data_ptr<float>(),  x.size(0),   x.size(1),
          positions ? x.size(2) : 1,  x.stride(0), x.stride(1),
          positions ? x.stride(2) : 0};
}

// packed [size], or null where there is none
template <typename T>
const T* packed_of(const at::Tensor& x, const std::optional<at::Tensor>& packed) {
  if (!packed.has_value()) return nullptr;
  int64_t size = 0;
  if constexpr (std::is_same_v<T, float>) size = x.numel() == 0 ? 0 : inputs_of(x).size();
  check_packed(x, *packed, size);
  if (packed->numel() == 0) return nullptr;
  TORCH_CHECK_VALUE(reinterpret_cast<std::uintptr_t>(packed->const_data_ptr()) % 16 == 0,
                    "layer_hessian_matmul: packed must begin at a multiple of 16 bytes, as "
                    "pack_layer_inputs gives it");
  return reinterpret_cast<const T*>(packed->const_data_ptr<int32_t>());
}

// x [N, d] or [N, d, t]; [0] where the product would not use parts
at::Tensor pack_layer_inputs(const at::Tensor& x, int64_t columns) {
  check_pack_layer_inputs(x, columns);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto options = x.options().dtype(at::kInt);
  if (x.scalar_type() != at::kFloat || x.numel() == 0) return at::empty({0}, options);
  const LayerInputs inputs = inputs_of(x);
  if (!inputs.pays(columns)) return at::empty({0}, options);
  // Zeros between the parts: what is packed twice is the same to the last bit.
  const at::Tensor packed = at::zeros({inputs.size()}, options);
  C10_CUDA_CHECK(inputs.pack(reinterpret_cast<float*>(packed.mutable_data_ptr<int32_t>()),
                             c10::cuda::getCurrentCUDAStream()));
  return packed;
}

// x [N, d] or [N, d, t], s [N, c, m] or [N, c, m, t], V [m, d] or [k, m, d]; packed: of x
at::Tensor layer_hessian_matmul(const at::Tensor& x, const at::Tensor& s, const at::Tensor& V,
                                double alpha, const std::optional<at::Tensor>& packed) {
  check_layer_hessian_matmul(x, s, V);
  if (s.numel() == 0 || x.numel() == 0 || V.numel() == 0) return at::zeros(V.sizes(), V.options());
  const c10::cuda::CUDAGuard guard(V.device());
  const bool positions = x.dim() == 3;
  const at::Tensor vectors = V.contiguous();
  const at::Tensor out = at::empty(V.sizes(), V.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "layer_hessian_matmul", [&] {
    LayerHessianProduct<scalar_t> call{};
    call.x = x.const_data_ptr<scalar_t>();
    call.s = s.const_data_ptr<scalar_t>();
    call.vectors = vectors.const_data_ptr<scalar_t>();
    call.out = out.mutable_data_ptr<scalar_t>();
    call.samples = x.size(0);
    call.classes = s.size(1);
    call.outputs = s.size(2);
    call.inputs = x.size(1);
    call.positions = positions ? x.size(2) : 1;
    call.vector_count = V.dim() == 3 ? V.size(0) : 1;
    call.x_sample = x.stride(0);
    call.x_input = x.stride(1);
    call.x_position = positions ? x.stride(2) : 0;
    call.s_sample = s.stride(0);
    call.s_class = s.stride(1);
    call.s_output = s.stride(2);
    call.s_position = positions ? s.stride(3) : 0;
    call.alpha = static_cast<scalar_t>(alpha);
    call.tf32 = tf32_allowed();
    call.packed_inputs = packed_of<scalar_t>(x, packed);
    run_work(call.plan(), vectors.options());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("layer_hessian_matmul", &layer_hessian_matmul);
  m.impl("pack_layer_inputs", &pack_layer_inputs);
}

}  // namespace hesskern::cuda
