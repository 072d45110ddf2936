// Matrix products on the tile unit.
#pragma once

#include <ATen/core/Tensor.h>

namespace hesskern::cpu {

// a [rows, inner] b [inner, columns]: on the tile unit where the machine has one and the shapes,
// the layouts and the numbers are for it, by torch otherwise
at::Tensor matmul(const at::Tensor& a, const at::Tensor& b);

}  // namespace hesskern::cpu
