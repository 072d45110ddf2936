// Sums of squares in an eigenbasis, in the order with the fewest multiplications.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "correction_checks.h"

namespace hesskern {

// What a backend brings along. Tensors are contiguous, but for the rows of sum.
struct CorrectionKernels {
  // Numbers that are held beside the arguments, about, where one sample does not take more.
  int64_t numbers;
  // Matrices whose squares go into one sum: float32 sums of many terms drift.
  int64_t level;
  // The same for samples without positions, whose sum is a product's.
  int64_t products_level;
  // sum has so many columns or, past those that matter, more, up to a multiple.
  int64_t width;
  // a [rows, inner] b [inner, columns]
  at::Tensor (*matmul)(const at::Tensor& a, const at::Tensor& b);
  // sum [m, columns] += squares of rows [k, m, d]; rows by any strides with d contiguous
  void (*add_squares)(const at::Tensor& sum, const at::Tensor& rows);
  // sum [m, columns] += squares of left_nr^T right_n; left [n, r, t, m], right [n, t, d]; null:
  // torch multiplies, and the matrices are in memory
  void (*add_squared_products)(const at::Tensor& sum, const at::Tensor& left,
                               const at::Tensor& right);
  // A convolution's sums sum_t x_t g_t^T [groups, d, n, r, m] without its patches in memory;
  // images [n, C, H, W], g [n, r, groups m, t]; null: from patches
  at::Tensor (*conv_sums)(const at::Tensor& images, const at::Tensor& g,
                          const ConvGeometry& geometry, bool ones);
  // Whether that way takes images of so many pixels.
  bool (*conv_sums_fit)(const ConvGeometry& geometry, int64_t height, int64_t width);
};

// acc [m, d], g [N, r, m(, t)], x [N, groups d(, t)], U [(groups,) m, m], V [(groups,) d, d]
void eigen_correction(const at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                      const at::Tensor& U, const at::Tensor& V, double alpha, bool ones,
                      const CorrectionKernels& kernels);

// acc [m, d], g [N, r, m, Ho, Wo] or [N, r, m, Lo], x [N, C, H, W] or [N, C, L]
void conv_eigen_correction(const at::Tensor& acc, const at::Tensor& g, const at::Tensor& x,
                           const at::Tensor& U, const at::Tensor& V, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups, double alpha, bool ones,
                           const CorrectionKernels& kernels);

}  // namespace hesskern
