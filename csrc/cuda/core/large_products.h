// Products of float32 matrices, large ones as products of 16-bit parts (parts_product.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "packed_rows.h"
#include "parts_product.h"
#include "products.h"

namespace hesskern::cuda {

// Products whose sizes and strides are known before their addresses are, and which must not need
// each other's results: by parts, many in one launch (grouped), where the current device multiplies
// them faster so than with multiply_all, which takes the others.
class PlannedProducts {
 public:
  explicit PlannedProducts(const std::vector<Product<float>>& products, bool tf32 = false,
                           const LargeFrom& from = {});

  // Elements of float that run needs.
  int64_t workspace() const { return workspace_; }
  // How many of them go by parts.
  size_t by_parts() const;

  // The same products, with their addresses.
  cudaError_t run(const std::vector<Product<float>>& products, float* workspace,
                  cudaStream_t stream) const;

 private:
  // What is packed and multiplied together.
  struct Group {
    std::vector<size_t> products;
    GroupedPartsProduct product;
    std::vector<PackedPlace> a, b;
  };

  cudaError_t run(const Group& group, const std::vector<Product<float>>& products, float* workspace,
                  cudaStream_t stream) const;

  bool tf32_;
  std::vector<Group> groups_;
  std::vector<size_t> others_;
  int64_t workspace_ = 0;
};

}  // namespace hesskern::cuda
