#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "core/binding.h"
#include "max_pool.h"

namespace hesskern::cuda {

namespace {

// Of [N, H, W, C], or of [N, H, W, r, C] without its rows.
ImageStrides image_strides(const at::Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(-1)};
}

// out [N, H, W, r, C] := gradients of every row, times factor where relu is positive; grad
// [N, Ho, Wo, r, C], indices [N, Ho, Wo, C], factor and relu [N, H, W, C] or none; any strides
void max_pool_input_gradient_(at::Tensor& out, const at::Tensor& grad, const at::Tensor& indices,
                              at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation,
                              const std::optional<at::Tensor>& factor,
                              const std::optional<at::Tensor>& relu) {
  check_max_pool_input_gradient(out, grad, indices, kernel_size, stride, padding, dilation, factor,
                                relu);
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(out.size(1) * out.size(2) <= most,
                    "max_pool_input_gradient_: out must have fewer than 2^31 positions, got ",
                    out.sizes());
  const auto axis = [&](int64_t i) {
    const int64_t in = out.size(1 + i);
    // Windows reach no further than over the padded input, if there are any.
    const int64_t reach = std::min(dilation[i] * (kernel_size[i] - 1) + 1, most);
    TORCH_CHECK_VALUE(in + padding[i] <= most && stride[i] <= most,
                      "max_pool_input_gradient_: padding and stride must be below 2^31, got ",
                      padding, " and ", stride);
    return PoolAxis{static_cast<int>(in), static_cast<int>(grad.size(1 + i)),
                    static_cast<int>(reach), static_cast<int>(stride[i]),
                    static_cast<int>(padding[i])};
  };
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "max_pool_input_gradient_", [&] {
    const auto data = [](const std::optional<at::Tensor>& t) {
      return t.has_value() ? t->const_data_ptr<scalar_t>() : nullptr;
    };
    const auto strides = [](const std::optional<at::Tensor>& t) {
      return t.has_value() ? image_strides(*t) : ImageStrides{0, 0, 0, 0};
    };
    const MaxPoolInputGradient<scalar_t> call{grad.const_data_ptr<scalar_t>(),
                                              indices.const_data_ptr<int64_t>(),
                                              data(relu),
                                              data(factor),
                                              out.mutable_data_ptr<scalar_t>(),
                                              out.size(0),
                                              out.size(3),
                                              out.size(4),
                                              axis(0),
                                              axis(1),
                                              image_strides(grad),
                                              image_strides(indices),
                                              strides(relu),
                                              strides(factor),
                                              image_strides(out),
                                              grad.stride(3),
                                              out.stride(3)};
    run_work(call.plan(), out.options().dtype(at::kFloat));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern_internal, CUDA, m) {
  m.impl("max_pool_input_gradient_", &max_pool_input_gradient_);
}

}  // namespace hesskern::cuda
