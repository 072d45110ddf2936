#pragma once

#include <cstdint>
#include <vector>

#include "core/axis.h"
#include "core/products.h"
#include "core/work.h"

namespace hesskern::cuda {

// left X right of one layer: X [k, m, d] and out [k, r, q] contiguous, left [r, m] and
// right [d, q] with element strides; where scale [r, q] is given, the result times scale, and then
// back_left [m', r] and back_right [q, d'] from both sides, out [k, m', d'] contiguous.
template <typename T>
struct KronLayer {
  struct Matrix {
    const T* data;
    int64_t rows, columns, row_stride, column_stride;
  };
  Matrix left, right, back_left, back_right, scale;
  const T* x;
  T* out;
  int64_t vectors;
};

// All layers (at least one), a few launches in all. T is float or double.
template <typename T>
Work<T> plan_kron_matmul(std::vector<KronLayer<T>> layers, bool tf32, const LargeFrom& from = {});

}  // namespace hesskern::cuda
