// Float32 matrices to the scaled float16 that parts_product.h multiplies along k; many in one
// launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "packed_rows.h"

namespace hesskern::cuda {

// matrix [rows, columns] by strides to parts [2, rows, padded columns], columns being k: every row
// is scaled as a whole to float16's range, where k_exponents [columns] are given after column j was
// divided by 2^k_exponents[j], since what it is multiplied with carries them.
struct AlongK {
  const float* matrix;
  int64_t row_step, column_step;
  const int* k_exponents;
  PackedRows to;
};

// All of them, none of which may be another's result.
cudaError_t pack_along_k(const std::vector<AlongK>& matrices, cudaStream_t stream);

}  // namespace hesskern::cuda
