#include <torch/library.h>

#include "checks.h"
#include "conv_input_covariance.h"
#include "cuda/core/binding.h"

namespace hesskern::cuda {

namespace {

// acc [C k k, C k k] or [g, C k k / g, C k k / g], x [N, C, H, W] or [N, C, L]
void conv_input_covariance_(at::Tensor& acc, const at::Tensor& x, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double alpha) {
  const ConvGeometry g =
      check_conv_input_covariance(acc, x, kernel_size, stride, padding, dilation, groups);
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  in_parts(acc, x.dim() == 3 ? x.unsqueeze(2) : x, [&](const at::Tensor& part, int64_t) {
    AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "conv_input_covariance_", [&] {
      with_input<scalar_t>(part, [&](auto* data) {
        using In = std::decay_t<decltype(*data)>;
        ConvInputCovariance<In, scalar_t> call{};
        call.x = data;
        call.samples = part.size(0);
        call.group_channels = part.size(1) / groups;
        call.height = part.size(2);
        call.width = part.size(3);
        call.sample_stride = part.stride(0);
        call.channel_stride = part.stride(1);
        call.row_stride = part.stride(2);
        call.column_stride = part.stride(3);
        call.kernel_h = g.kernel_h;
        call.kernel_w = g.kernel_w;
        call.stride_h = g.stride_h;
        call.stride_w = g.stride_w;
        call.padding_h = g.padding_h;
        call.padding_w = g.padding_w;
        call.dilation_h = g.dilation_h;
        call.dilation_w = g.dilation_w;
        call.out_h = g.out_h;
        call.out_w = g.out_w;
        call.tf32 = tf32_allowed();
        call.sum = sum_into<scalar_t>(acc, alpha);
        run_work(call.plan(), acc.options());
      });
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("conv_input_covariance_", &conv_input_covariance_);
}

}  // namespace hesskern::cuda
