#pragma once

#include "core/axis.h"

namespace hesskern::cuda {

// y [N, k, m] in place: of every sample and vector, y := sum_c <s_c, y> s_c with s [N, c, m], whose
// rows are contiguous. y is contiguous.
struct LayerHessianCoefficients {
  // A warp holds rows of so many numbers in registers.
  static constexpr int64_t kMostOutputs = 1024;

  const float* s;
  int64_t s_sample, s_class;
  float* y;
  int64_t samples, classes, outputs, vector_count;

  // outputs is at most kMostOutputs.
  cudaError_t run(cudaStream_t stream) const;
};

}  // namespace hesskern::cuda
