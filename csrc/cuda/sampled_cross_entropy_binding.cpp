#include <torch/library.h>

#include "checks.h"
#include "core/binding.h"
#include "sampled_cross_entropy.h"

namespace hesskern::cuda {

namespace {

ClassStrides class_strides(const at::Tensor& t) {
  return {t.stride(0), t.stride(1), t.dim() == 3 ? t.stride(2) : 0};
}

// logits [N, c] or [N, c, t], uniform [N t], targets [N] or [N, t], terms [N]
at::Tensor sampled_cross_entropy_gradient(const at::Tensor& logits, const at::Tensor& uniform,
                                          const std::optional<at::Tensor>& targets,
                                          int64_t ignore_index,
                                          const std::optional<at::Tensor>& terms, double alpha) {
  check_sampled_cross_entropy_gradient(logits, uniform, targets, terms);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor out = at::empty_like(logits);
  if (out.numel() == 0) return out;
  const bool wide = logits.scalar_type() == at::kDouble;
  AT_DISPATCH_FLOATING_TYPES(
      wide ? at::kDouble : at::kFloat, "sampled_cross_entropy_gradient", [&] {
        with_input<scalar_t>(logits, [&](auto* data) {
          using In = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
          SampledCrossEntropy<In, scalar_t> call{};
          call.logits = data;
          call.out = static_cast<In*>(out.mutable_data_ptr());
          call.samples = logits.size(0);
          call.classes = logits.size(1);
          call.positions = logits.dim() == 3 ? logits.size(2) : 1;
          call.logit_strides = class_strides(logits);
          call.out_strides = class_strides(out);
          call.uniform = uniform.const_data_ptr<double>();
          call.uniform_stride = uniform.stride(0);
          if (targets.has_value()) {
            call.targets = targets->const_data_ptr<int64_t>();
            call.target_sample_stride = targets->stride(0);
            call.target_position_stride = targets->dim() == 2 ? targets->stride(1) : 0;
          }
          call.ignore_index = ignore_index;
          if (terms.has_value()) {
            call.terms = terms->const_data_ptr<int64_t>();
            call.term_stride = terms->stride(0);
          }
          call.alpha = alpha;
          run_work(call.plan(), uniform.options().dtype(wide ? at::kDouble : at::kFloat));
        });
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("sampled_cross_entropy_gradient", &sampled_cross_entropy_gradient);
}

}  // namespace hesskern::cuda
