// acc := beta base + alpha rows^T rows on the upper triangle: the rank-k update every
// accumulator ends in.
#pragma once

#include <ATen/core/Tensor.h>

namespace hesskern::cpu {

// What a sum is added to: beta base [d, d]. base is acc or shares no memory with it; where beta is
// zero its values do not count.
struct Addend {
  at::Tensor base;
  double beta = 1;
};

// acc [d, d] float32 or float64, any strides; rows [K, d] of the same dtype. Only acc's upper
// triangle is defined afterwards.
void symmetric_update_(const at::Tensor& acc, const Addend& addend, const at::Tensor& rows,
                       double alpha);

// acc [d, d] := the addend on the upper triangle; then acc is what more is added to.
Addend start_triangle_(const at::Tensor& acc, const Addend& addend);

}  // namespace hesskern::cpu
