#pragma once

#include <functional>

#include "cuda/core/work.h"
#include "layer_hessian_matmul.h"
#include "layer_inputs.h"

namespace hesskern::cuda {

// The same product with 16-bit parts (core/parts_product.h): X is packed once for both products, a
// chunk of samples at a time, or has been before.
struct LayerHessianParts {
  LayerHessianProduct<float> call;
  LayerInputs inputs;
  // y [count, t, k m] of samples first, ... in place: y := sum_c <s_c, y> s_c; with
  // coefficients [count, c] to work in.
  std::function<cudaError_t(int64_t first, int64_t count, float* y, float* coefficients,
                            cudaStream_t stream)>
      replace;
  // The same to packed rows [count, k m], y becomes anything; none: replace, then packing.
  std::function<cudaError_t(int64_t first, int64_t count, float* y, const PackedRows& to,
                            cudaStream_t stream)>
      replace_packed;

  // Whether the device can, and it is faster.
  bool pays() const;
  Work<float> plan() const;
};

// With what layer_hessian_matmul.cu does between the two products.
LayerHessianParts layer_hessian_parts(const LayerHessianProduct<float>& call);

}  // namespace hesskern::cuda
