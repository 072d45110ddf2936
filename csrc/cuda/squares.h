#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/work.h"

namespace hesskern::cuda {

// sum [size] += sum_k rows_k^2 by element; rows [count, size], contiguous as sum is, T float or
// double.
template <typename T>
struct SquareSum {
  T* sum;
  const T* rows;
  int64_t count, size;

  Work<T> plan() const;
};

}  // namespace hesskern::cuda
