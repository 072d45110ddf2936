// Sums of squares of matrices, and of products that no memory ever holds.
#pragma once

#include <ATen/core/Tensor.h>

namespace hesskern::cpu {

// sum [m, columns] += squares of rows [k, m, d], d contiguous
void add_squares(const at::Tensor& sum, const at::Tensor& rows);

// sum [m, columns] += squares of left_nr^T right_n; left [n, r, t, m], right [n, t, d]; columns are
// d rounded up to squares_width(), those beyond d get zeros added
void add_squared_products(const at::Tensor& sum, const at::Tensor& left, const at::Tensor& right);

int64_t squares_width(at::ScalarType type);

}  // namespace hesskern::cpu
