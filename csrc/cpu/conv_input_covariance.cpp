#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "checks.h"
#include "conv_paths.h"

namespace hesskern::cpu {

namespace {

// acc [C k k, C k k] or [g, C k k / g, C k k / g], x [N, C, H, W] or [N, C, L]
void accumulate(at::Tensor& acc, const at::Tensor& x, at::IntArrayRef kernel_size,
                at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                int64_t groups, double alpha, std::string_view path) {
  const ConvGeometry geometry =
      check_conv_input_covariance(acc, x, kernel_size, stride, padding, dilation, groups);
  if (x.numel() == 0) return;
  at::Tensor blocks = acc.dim() == 3 ? acc : acc.unsqueeze(0);
  const bool direct = blocks.stride(2) == 1;
  ConvCall call{direct ? blocks : at::zeros(blocks.sizes(), blocks.options()),
                x.dim() == 3 ? x.unsqueeze(2) : x, geometry, alpha};
  if (path == "spectral") {
    conv_spectral(call);
  } else if (path == "lags") {
    conv_lags(call);
  } else {
    TORCH_CHECK_VALUE(path == "patches",
                      "_conv_input_covariance_by_: path must be patches, lags or spectral, got ",
                      path);
    conv_patches(call);
  }
  if (!direct) blocks.add_(call.acc);
}

void conv_input_covariance_(at::Tensor& acc, const at::Tensor& x, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double alpha) {
  accumulate(acc, x, kernel_size, stride, padding, dilation, groups, alpha, "patches");
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("conv_input_covariance_", &conv_input_covariance_);
  m.impl("_conv_input_covariance_by_", &accumulate);
}

}  // namespace hesskern::cpu
