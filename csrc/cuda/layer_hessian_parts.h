#pragma once

#include <functional>

#include "core/work.h"
#include "layer_hessian_matmul.h"

namespace hesskern::cuda {

// The same product with 16-bit parts (core/parts_product.h): X is packed once for both products, a
// chunk of samples at a time.
struct LayerHessianParts {
  LayerHessianProduct<float> call;
  // y [count, t, k m] of samples first, ... in place: y := sum_c <s_c, y> s_c; with
  // coefficients [count, c] to work in.
  std::function<cudaError_t(int64_t first, int64_t count, float* y, float* coefficients,
                            cudaStream_t stream)>
      replace;
  // Rows of X, samples times positions, of a chunk at most; fewer, so many at least, where their
  // parts would take more bytes.
  int64_t most_rows = 1 << 17, least_rows = 1 << 14, bytes = int64_t{1} << 28;

  // Whether the device can, and it is faster.
  bool pays() const;
  Work<float> plan() const;
};

// With what layer_hessian_matmul.cu does between the two products.
LayerHessianParts layer_hessian_parts(const LayerHessianProduct<float>& call);

}  // namespace hesskern::cuda
