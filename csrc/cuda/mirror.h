#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace hesskern::cuda {

// Lower triangle of every matrix := its upper triangle.
// acc [groups, d, d] with element strides (stride_group, stride_row, stride_col);
// T is float or double. Returns the launch's error.
template <typename T>
cudaError_t mirror(T* acc, int64_t groups, int64_t d, int64_t stride_group, int64_t stride_row,
                   int64_t stride_col, cudaStream_t stream);

}  // namespace hesskern::cuda
