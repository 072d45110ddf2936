#include <torch/library.h>

#include "checks.h"
#include "core/binding.h"
#include "layer_hessian_matmul.h"

namespace hesskern::cuda {

namespace {

// x [N, d] or [N, d, t], s [N, c, m] or [N, c, m, t], V [m, d] or [k, m, d]
at::Tensor layer_hessian_matmul(const at::Tensor& x, const at::Tensor& s, const at::Tensor& V,
                                double alpha) {
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
    run_work(call.plan(), vectors.options());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("layer_hessian_matmul", &layer_hessian_matmul);
}

}  // namespace hesskern::cuda
