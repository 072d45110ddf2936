#pragma once

#include "core/axis.h"
#include "core/work.h"

namespace hesskern::cuda {

// sum.acc [m, m] += alpha sum_n sum_t x_nt x_nt^T for contiguous x [samples, m, positions] of In
// with m <= 64; In is float, BFloat16 or Float16.
template <typename In>
struct NarrowPositions {
  const In* x;
  int64_t samples, outputs, positions;
  SymmetricSum<float> sum;

  // Whether plan() takes this call.
  bool fits() const;
  Work<float> plan() const;
};

}  // namespace hesskern::cuda
