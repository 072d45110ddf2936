#pragma once

#include "cuda/core/axis.h"
#include "cuda/core/work.h"

namespace hesskern::cuda {

// Gram matrices of up to 256 columns at one read of the data: sum.acc [m, m] += alpha z^T z. Where
// fits() is false there is no kernel, or no device memory for it. 16-bit rows as they are:
// halves.h.

// Fewer columns are mostly padding here.
constexpr int64_t kFewestBlockColumns = 65;

// Rows z of softmax samples, sqrt(p_c) (g_c - sum_c' p_c' g_c'); jacobian g [N, c, m] with
// contiguous rows of In (float, BFloat16 or Float16), probabilities p [N, c] contiguous.
template <typename In>
struct BlockSamples {
  const In* jacobian;
  const float* probabilities;
  int64_t samples, classes, columns;
  int64_t sample_stride, class_stride;
  SymmetricSum<float> sum;

  bool fits() const;
  Work<float> plan() const;
};

// Rows z of x [N, m], which are contiguous.
struct BlockRows {
  const float* x;
  int64_t rows, columns, row_stride;
  SymmetricSum<float> sum;

  bool fits() const;
  Work<float> plan() const;
};

// Rows z of positions, x [N, m, t] with contiguous positions: z has N t rows.
struct BlockPositions {
  const float* x;
  int64_t samples, columns, positions;
  int64_t sample_stride, column_stride;
  SymmetricSum<float> sum;

  bool fits() const;
  Work<float> plan() const;
};

}  // namespace hesskern::cuda
