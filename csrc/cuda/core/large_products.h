// Single large products of float32 matrices as products of 16-bit parts (parts_product.h).
#pragma once

#include <cstdint>

#include "packed_rows.h"
#include "parts_product.h"
#include "products.h"

namespace hesskern::cuda {

// A product whose sizes and strides are known before its addresses are.
class LargeProduct {
 public:
  // Whether the current device multiplies it faster so than with multiply_all.
  static bool fits(const Product<float>& product, const LargeFrom& from = {});

  // One that fits.
  explicit LargeProduct(const Product<float>& product);

  // Elements of float that run needs.
  int64_t workspace() const { return b_.end; }

  cudaError_t run(const Product<float>& product, float* workspace, cudaStream_t stream) const;

 private:
  bool along_k_;
  PartsProduct product_;
  PackedPlace a_, b_;
};

}  // namespace hesskern::cuda
