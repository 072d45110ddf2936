// Matrix products on the tile unit.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace hesskern::cpu {

// Whether a product of these sizes is for the tile unit, which the machine may lack.
bool tiles_take(at::ScalarType type, int64_t rows, int64_t inner, int64_t columns);

// a [rows, inner] b [inner, columns]: on the tile unit where the machine has one and the shapes,
// the layouts and the numbers are for it, by torch otherwise
at::Tensor tile_matmul(const at::Tensor& a, const at::Tensor& b);

}  // namespace hesskern::cpu
