#pragma once

#include "core/axis.h"
#include "core/work.h"

namespace hesskern::cuda {

// sum.acc [d, d] (or [d + 1, d + 1] with ones) += alpha x^T x; x [N, d] of In: float, BFloat16 or
// Float16 where T is float, double where T is double.
template <typename In, typename T>
struct InputCovariance {
  const In* x;
  Axis row_axis, column_axis;
  int64_t rows, columns;
  bool ones;  // one more column, of ones
  bool tf32;  // round float32 to tf32
  SymmetricSum<T> sum;

  // Elements of T that run() needs as workspace.
  Work<T> plan() const;
};

}  // namespace hesskern::cuda
