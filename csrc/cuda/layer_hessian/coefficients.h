#pragma once

#include "cuda/core/axis.h"

namespace hesskern::cuda {

struct PackedRows;

// out := sum_c <s_c, y> s_c of every sample and vector, with s [N, c, m] and y, out [N, k, m],
// whose samples are contiguous; out may be y.
struct LayerHessianCoefficients {
  // A warp holds rows of so many numbers in registers.
  static constexpr int64_t kMostOutputs = 1024;

  const float* s;
  int64_t s_sample, s_class;
  const float* y;
  int64_t y_sample;
  float* out;
  int64_t samples, classes, outputs, vector_count;

  // outputs is at most kMostOutputs.
  cudaError_t run(cudaStream_t stream) const;

  // Whether all rows begin and end at multiples of 16 bytes.
  bool aligned() const;

  // to [N, k m] of two float16 := what run() gives, as core/packed_rows.h packs it; only where rows
  // are aligned. Where exponents that come from some samples do not do for others, out, which is y
  // then, is computed as well.
  cudaError_t run_packed(const PackedRows& to, cudaStream_t stream) const;
};

}  // namespace hesskern::cuda
