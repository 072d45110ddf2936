// A block's shared memory while it multiplies rows slab by slab (block_gram.cu).
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>

#include "cuda/core/elements.h"

namespace hesskern::cuda {

// How a block's shared memory is cut, in words: operands of so many sixteens of rows [buffers,
// eights of rows, part, blocks of eight columns] of matrices [8, 8] of float16; the slab as it was
// copied; what every group of columns has of weights and their roots; a barrier; the
// factors that undo the scales [buffers, groups].
struct BlockCut {
  int steps, operand, slab, weights, barrier, backs, total;

  BlockCut(int groups, int buffers, int sixteens, int slab_size, int weight_size)
      : steps(sixteens), operand(2 * 2 * sixteens * groups * 4 * 32) {
    slab = buffers * operand;
    weights = slab + slab_size;
    barrier = weights + groups * 2 * weight_size;
    backs = barrier + 4;
    total = backs + (buffers * groups + 3) / 4 * 4;
  }

  size_t bytes() const { return sizeof(float) * static_cast<size_t>(total); }
};

__device__ inline float largest(float so_far, const Four<float>& four) {
#pragma unroll
  for (int q = 0; q < 4; ++q) so_far = fmaxf(so_far, fabsf(four.value[q]));
  return so_far;
}

}  // namespace hesskern::cuda
