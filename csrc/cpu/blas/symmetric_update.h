// acc := base + alpha rows^T rows on the upper triangle: the rank-k update every
// accumulator ends in.
#pragma once

#include <ATen/core/Tensor.h>

namespace hesskern::cpu {

// acc and base [d, d] float32 or float64, any strides; rows [K, d] of the same dtype. base is acc
// or shares no memory with it. Only acc's upper triangle is defined afterwards.
void symmetric_update_(const at::Tensor& acc, const at::Tensor& base, const at::Tensor& rows,
                       double alpha);

// acc [d, d] := base [d, d] on the upper triangle; nothing where base is acc itself.
void copy_triangle_(const at::Tensor& acc, const at::Tensor& base);

}  // namespace hesskern::cpu
