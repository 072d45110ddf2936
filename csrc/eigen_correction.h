// Sums of squares in an eigenbasis, in the order with the fewest multiplications. Large matrix
// products are torch's; what is squared and summed is a backend's own kernels'.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

namespace hesskern {

// Sizes of a call, outputs and inputs of one group; inputs with the column of ones.
struct CorrectionSizes {
  int64_t samples, roots, positions, groups, outputs, inputs;
  bool ones;

  // R = sum_t g_t x_t^T [m, d] is rotated by U after the sum over positions, or g before: of r m m
  // d and r t m m multiplications the fewer.
  bool outputs_first() const { return positions == 1 || positions < inputs; }
  // The same for V: r m d d, or t d d, which all root rows share.
  bool inputs_first() const { return positions == 1 || positions < roots * outputs; }
};

struct CorrectionKernels {
  // Numbers that are held beside the arguments, about, where one sample does not take more.
  int64_t numbers;
  // Matrices whose squares go into one sum: float32 sums of many terms drift.
  int64_t level;
  // Rows of sum are padded to a multiple of so many columns.
  int64_t width;
  // sum [m, columns] += squares of rows [k, m, d], contiguous but for sum's rows, padded
  void (*add_squares)(const at::Tensor& sum, const at::Tensor& rows);
  // sum [m, columns] += squares of left_nr^T right_n; left [n, r, t, m], right [n, t, d],
  // contiguous but for sum's rows, padded; null: torch multiplies
  void (*add_squared_products)(const at::Tensor& sum, const at::Tensor& left,
                               const at::Tensor& right);
};

// Inputs [count, t, groups d] of samples [first, first + count), without the column of ones.
using CorrectionInputs = std::function<at::Tensor(int64_t first, int64_t count)>;

// acc [m, d] += alpha sum_n sum_r (U^T R_nr V)^2; g [N, r, m, t] or [N, r, m, Ho, Wo]
void add_eigen_correction(const at::Tensor& acc, const at::Tensor& g,
                          const CorrectionInputs& inputs, const at::Tensor& U, const at::Tensor& V,
                          double alpha, const CorrectionSizes& sizes,
                          const CorrectionKernels& kernels);

}  // namespace hesskern
