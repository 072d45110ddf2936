#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "checks.h"
#include "cost.h"
#include "cpu/vector.h"
#include "paths.h"

namespace hesskern::cpu {

namespace {

// The path with the least estimated cost.
std::string_view cheapest(const ConvCall& call) {
  const ConvGeometry& g = call.geometry;
  const ConvSizes x{call.images.size(0), call.images.size(1), call.images.size(2),
                    call.images.size(3)};
  if (pointwise_fits(call)) return "pointwise";
  if (g.taps() == 1) return "patches";
  const bool is_float = call.acc.scalar_type() == at::kFloat;
  const double lanes = static_cast<double>(is_float ? simd_lanes<float>() : simd_lanes<double>());
  const double patches = patches_cost(x, g, lanes, is_float);
  const double bands = bands_cost(x, g, lanes);
  const std::string_view unplanned = patches <= bands ? "patches" : "bands";
  // Small calls are done before the lags are planned.
  if (std::min(patches, bands) <= least_planned_cost(g)) return unplanned;
  const ConvAxis h = call.axis_h(), w = call.axis_w();
  const double lags = lags_cost(x, g, h, w, lanes);
  const double spectral = spectral_cost(x, g, h, w, lanes);
  if (std::min(patches, bands) <= std::min(lags, spectral)) return unplanned;
  return lags <= spectral ? "lags" : "spectral";
}

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
  if (path.empty()) path = cheapest(call);
  if (path == "spectral") {
    conv_spectral(call);
  } else if (path == "lags") {
    conv_lags(call);
  } else if (path == "bands") {
    conv_bands(call);
  } else if (path == "pointwise" && pointwise_fits(call)) {
    conv_pointwise(call);
  } else {
    TORCH_CHECK_VALUE(
        path == "patches",
        "conv_input_covariance_by_: path must be patches, bands, lags, spectral or, where "
        "it fits, pointwise, got ",
        path);
    conv_patches(call);
  }
  if (!direct) blocks.add_(call.acc);
}

void conv_input_covariance_(at::Tensor& acc, const at::Tensor& x, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double alpha) {
  accumulate(acc, x, kernel_size, stride, padding, dilation, groups, alpha, "");
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("conv_input_covariance_", &conv_input_covariance_);
}

TORCH_LIBRARY_IMPL(hesskern_internal, CPU, m) {
  m.impl("conv_input_covariance_by_", &accumulate);
}

}  // namespace hesskern::cpu
