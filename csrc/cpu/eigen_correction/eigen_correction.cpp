#include "eigen_correction.h"

#include <torch/library.h>

#include "conv_sums.h"
#include "cpu/blas/tile_matmul.h"
#include "squares.h"

namespace hesskern::cpu {

namespace {

// 16 MB of float32.
constexpr int64_t kNumbers = int64_t{1} << 22;
constexpr int64_t kLevel = 128, kProductsLevel = 512;

CorrectionKernels kernels(at::ScalarType type) {
  return {kNumbers,      kLevel,       kProductsLevel,        squares_width(type),
          &tile_matmul,  &add_squares, &add_squared_products, &conv_sums,
          &conv_sums_fit};
}

// acc [m, d], g [N, r, m(, t)], x [N, groups d(, t)], U [(groups,) m, m], V [(groups,) d, d]
void eigen_correction_(at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                       const at::Tensor& U, const at::Tensor& V, double alpha, bool ones) {
  eigen_correction(acc, g, x, U, V, alpha, ones, kernels(acc.scalar_type()));
}

// acc [m, d], g [N, r, m, Ho, Wo] or [N, r, m, Lo], x [N, C, H, W] or [N, C, L]
void conv_eigen_correction_(at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                            const at::Tensor& U, const at::Tensor& V, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double alpha, bool ones) {
  conv_eigen_correction(acc, g, x, U, V, kernel_size, stride, padding, dilation, groups, alpha,
                        ones, kernels(acc.scalar_type()));
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("eigen_correction_", &eigen_correction_);
  m.impl("conv_eigen_correction_", &conv_eigen_correction_);
}

}  // namespace hesskern::cpu
