// Numbers and strides as the launchers take them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hesskern::cuda {

// bfloat16 and float16 as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Offset of an index: index * step, or with two parts (index / inner) * outer +
// (index % inner) * step.
struct Axis {
  int64_t step;
  int64_t inner = 0;
  int64_t outer = 0;

  __host__ __device__ int64_t offset(int64_t index) const {
    if (inner == 0) return index * step;
    return index / inner * outer + index % inner * step;
  }
};

// acc [groups, order, order] with element strides, to which alpha times a sum is added; only its
// upper triangle changes.
template <typename T>
struct SymmetricSum {
  T* acc;
  int64_t groups, order;
  int64_t group_stride, row_stride, column_stride;
  T alpha;
};

// sum.acc of that group += alpha value, where the place is one of the upper triangle.
template <typename T>
__device__ inline void add_to(const SymmetricSum<T>& sum, int64_t group, int64_t row,
                              int64_t column, T value) {
  if (row > column || column >= sum.order) return;
  sum.acc[group * sum.group_stride + row * sum.row_stride + column * sum.column_stride] +=
      sum.alpha * value;
}

}  // namespace hesskern::cuda
