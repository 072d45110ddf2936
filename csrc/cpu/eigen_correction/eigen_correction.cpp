#include "eigen_correction.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "correction_checks.h"
#include "squares.h"

namespace hesskern::cpu {

namespace {

// 16 MB of float32.
constexpr int64_t kNumbers = int64_t{1} << 22;
constexpr int64_t kLevel = 1024;

CorrectionKernels kernels(at::ScalarType type) {
  return {kNumbers, kLevel, squares_width(type), &add_squares, &add_squared_products};
}

// acc [m, d], g [N, r, m(, t)], x [N, groups d(, t)], U [(groups,) m, m], V [(groups,) d, d]
void eigen_correction_(at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                       const at::Tensor& U, const at::Tensor& V, double alpha, bool ones) {
  const int64_t groups = check_eigen_correction(acc, g, x, U, V, ones);
  const at::Tensor rows = g.dim() == 4 ? g : g.unsqueeze(3);
  const at::Tensor columns = x.dim() == 3 ? x : x.unsqueeze(2);
  const CorrectionSizes sizes{x.size(0),          g.size(1),   rows.size(3), groups,
                              g.size(2) / groups, acc.size(1), ones};
  add_eigen_correction(
      acc, rows,
      [&](int64_t first, int64_t count) { return columns.narrow(0, first, count).transpose(1, 2); },
      U, V, alpha, sizes, kernels(acc.scalar_type()));
}

// acc [m, d], g [N, r, m, Ho, Wo] or [N, r, m, Lo], x [N, C, H, W] or [N, C, L]
void conv_eigen_correction_(at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                            const at::Tensor& U, const at::Tensor& V, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double alpha, bool ones) {
  const ConvGeometry c = check_conv_eigen_correction(acc, g, x, U, V, kernel_size, stride, padding,
                                                     dilation, groups, ones);
  const CorrectionSizes sizes{x.size(0),          g.size(1),   c.positions(), groups,
                              g.size(2) / groups, acc.size(1), ones};
  const at::Tensor images = x.dim() == 4 ? x : x.unsqueeze(2);
  add_eigen_correction(
      acc, g,
      [&](int64_t first, int64_t count) {
        return at::im2col(images.narrow(0, first, count), {c.kernel_h, c.kernel_w},
                          {c.dilation_h, c.dilation_w}, {c.padding_h, c.padding_w},
                          {c.stride_h, c.stride_w})
            .transpose(1, 2);
      },
      U, V, alpha, sizes, kernels(acc.scalar_type()));
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("eigen_correction_", &eigen_correction_);
  m.impl("conv_eigen_correction_", &conv_eigen_correction_);
}

}  // namespace hesskern::cpu
