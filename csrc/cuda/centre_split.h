#pragma once

#include "core/axis.h"

namespace hesskern::cuda {

// The rows of Q G, sqrt(p_c) (g_c - sum_c' p_c' g_c') for rows p that sum to one, as two float16
// (hi/lo) for products on 16-bit tensor cores: parts [2, N c, m in pitch], row n c + c. Part 0 plus
// part 1 is 2^exponent times the row, with one exponent for each of the pitch columns; columns past
// the last are zeros.
struct CentreSplit {
  // g [N, c, m] with contiguous rows, p [N, c] contiguous.
  const float* jacobian;
  const float* probabilities;
  int64_t samples, classes, outputs;
  int64_t sample_stride, class_stride;
  // At multiples of 16 bytes; pitch and part_step are multiples of 8, and pitch is less than
  // outputs + 8.
  uint16_t* parts;
  int64_t pitch, part_step;
  int* exponents;
  // Scratch [4, pitch].
  int* guesses;

  // Whether there is a kernel for so many classes.
  bool fits() const;
  cudaError_t run(cudaStream_t stream) const;
};

}  // namespace hesskern::cuda
