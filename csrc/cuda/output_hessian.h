#pragma once

#include "core/axis.h"
#include "core/work.h"

namespace hesskern::cuda {

// sum.acc [m, m] += alpha sum_n sum_t G_nt^T (diag(p_n) - p_n p_n^T) G_nt for rows p_n that sum to
// one; jacobian [N, c, m, t] with element strides, probabilities p [N, c] contiguous.
// T is float or double, In is T, or BFloat16 or Float16 where T is float.
template <typename In, typename T = In>
struct OutputHessian {
  const In* jacobian;
  const T* probabilities;
  int64_t samples, classes, outputs, positions;
  int64_t sample_stride, class_stride, output_stride, position_stride;
  bool tf32;
  SymmetricSum<T> sum;
  // Of N c m^2, from which on products of 16-bit parts pay: half of it multiplications.
  double least_in_parts = 1 << 30;

  // Whether plan() takes In for this call; it always takes T.
  bool readable() const;
  Work<T> plan() const;
};

}  // namespace hesskern::cuda
