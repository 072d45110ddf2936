// acc += alpha rows^T rows on the upper triangle: the rank-k update every
// accumulator ends in.
#pragma once

#include <ATen/core/Tensor.h>

namespace hesskern::cpu {

// acc [d, d] float32 or float64, any strides with unit column stride; rows [K, d]
// of the same dtype. Only acc's upper triangle is defined afterwards.
void symmetric_update_(at::Tensor acc, const at::Tensor& rows, double alpha);

}  // namespace hesskern::cpu
