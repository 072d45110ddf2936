#pragma once

#include "cuda/core/axis.h"
#include "cuda/core/work.h"

namespace hesskern::cuda {

// sum.acc [m, m] += alpha x^T x of rows of at most 256 columns of In, BFloat16 or Float16, at one
// read of them: x [rows, m] with neighbouring columns, or, with positions, x [rows, m, positions]
// with neighbouring positions, every one of which is a row. Where fits() is false there is no
// kernel, or no device memory for it.
template <typename In>
struct BlockHalves {
  const In* x;
  int64_t rows, columns, positions;
  // Elements between rows, and between columns (with positions).
  int64_t row_stride, column_stride;
  bool along_positions;
  SymmetricSum<float> sum;

  bool fits() const;
  Work<float> plan() const;
};

}  // namespace hesskern::cuda
