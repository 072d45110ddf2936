#pragma once

#include "core/axis.h"
#include "core/work.h"

namespace hesskern::cuda {

// sum.acc [m, m] += alpha sum_n sum_c sum_t g_nct g_nct^T; jacobian g [N, c, m, t] of In with
// element strides; In is float, BFloat16 or Float16 where T is float, double where T is double.
template <typename In, typename T>
struct RootRows {
  const In* jacobian;
  int64_t samples, classes, outputs, positions;
  int64_t sample_stride, class_stride, output_stride, position_stride;
  bool tf32;  // round float32 to tf32
  SymmetricSum<T> sum;

  // Whether plan() takes these strides: with positions, samples and classes lie along one axis.
  bool readable() const;
  Work<T> plan() const;
};

}  // namespace hesskern::cuda
