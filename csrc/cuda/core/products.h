// Products of many matrices in one launch: what the Kronecker products and the layer-wise Hessian
// are made of.
#pragma once

#include <cstdint>
#include <vector>

#include "axis.h"

namespace hesskern::cuda {

// c [m, n] := a b, times scale [m, n] where given, with a [m, k] and b [k, n] of T by an axis
// each; k runs from k_begin to k_end.
template <typename T>
struct Product {
  const T* a;
  Axis a_row, a_k;
  const T* b;
  Axis b_k, b_column;
  T* c;
  Axis c_row, c_column;
  const T* scale;
  Axis scale_row, scale_column;
  int64_t m, n, k_begin, k_end;
};

// From where on products go by parts (large_products.h): with sides of so many rows and columns at
// least, if together they take longer at this rate, in operations a microsecond: multiply_all's, as
// measured on an H200.
struct LargeFrom {
  int64_t side = 32;
  double rate = 36e6;
};

// All products, which must not need each other's results. T is float or double; tf32: round float32
// to tf32.
template <typename T>
cudaError_t multiply_all(std::vector<Product<T>> products, bool tf32, cudaStream_t stream);

}  // namespace hesskern::cuda
