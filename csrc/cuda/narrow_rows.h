#pragma once

#include "core/axis.h"
#include "core/work.h"

namespace hesskern::cuda {

// sum.acc [m, m] += alpha x^T x for x [rows, columns] of In, one row after another in memory, with
// at most 64 columns; with probabilities [rows / classes, classes]:
// += alpha sum_n G_n^T (diag(p_n) - p_n p_n^T) G_n for x = G [rows / classes, classes, columns].
// In is float, BFloat16 or Float16.
template <typename In>
struct NarrowRows {
  const In* x;
  int64_t rows, columns;
  const float* probabilities;  // contiguous, or null
  int64_t classes;
  SymmetricSum<float> sum;

  // Whether plan() takes this call.
  bool fits() const;
  Work<float> plan() const;
};

}  // namespace hesskern::cuda
