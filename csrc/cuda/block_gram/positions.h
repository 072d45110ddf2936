// Rows of float32 positions on their way to a block's operands (block_gram.cu): brought by the
// lanes that will read them, split into two float16 under a power of two (hi/lo).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/core/elements.h"
#include "cuda/core/float16_parts.h"
#include "cuda/core/launch.h"
#include "cuda/core/warp.h"
#include "cuda/core/warp_gram.h"
#include "slabs.h"

namespace hesskern::cuda {

// Rows of positions, x [samples, columns, positions], in sixteens of a sample's positions. A slab
// is some sixteens, one after another.
struct PositionSlabs {
  static constexpr ColumnOrder kOrder = ColumnOrder::kInTurn;

  const float* x;
  int64_t sample_stride, column_stride;
  // Sixteens of a sample; all of them are less than 2^31.
  int samples, sixteens;
  int positions, columns;
  bool pieces;
  int length;

  __host__ __device__ int steps() const { return length; }
  __host__ __device__ int64_t count() const {
    return ceil_div(int64_t{samples} * sixteens, length);
  }
  __host__ __device__ int slab_size(int groups) const { return groups * length * 4 * 128; }
  __host__ __device__ int weight_size() const { return 0; }

  // A lane (g, t) makes four positions from 4 t on of the columns g, 8 + g, 16 + g and 24 + g of
  // its warp.
  template <class S>
  class Maker {
   public:
    __device__ Maker(const PositionSlabs& in, float* memory, const BlockCut& cut)
        : in_(in),
          thread_(anew(static_cast<int>(threadIdx.x))),
          lane_(thread_ % 32),
          warp_(thread_ / 32),
          own_(memory + cut.slab + warp_ * in.length * 4 * 128 + lane_ * 4) {}

    __device__ void prepare(float*, const BlockCut&, int) {}

    __device__ void copy(int slab) {
      if (warp_ >= S::kGroups) return;
      const int column = 32 * warp_ + lane_ / 4;
      const int index = slab * in_.length;
      int sample = index / in_.sixteens;
      int first = (index - sample * in_.sixteens) * 16 + 4 * (lane_ % 4);
      for (int s = 0; s < in_.length; ++s) {
        const int left = sample < in_.samples ? in_.positions - first : 0;
        const float* const from = in_.x + sample * in_.sample_stride + first;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const bool inside = left > 0 && column + 8 * b < in_.columns;
          copy_four(own_ + (s * 4 + b) * 128,
                    inside ? from + (column + 8 * b) * in_.column_stride : in_.x,
                    !inside    ? 0
                    : left < 4 ? static_cast<int>(left)
                               : 4,
                    in_.pieces);
        }
        first += 16;
        if (first >= in_.sixteens * 16) first -= in_.sixteens * 16, ++sample;
      }
    }

    __device__ void make(int, int, uint32_t* operands, float* backs) {
      if (warp_ >= S::kGroups) return;
      float most = 0.0f;
#pragma unroll 4
      for (int i = 0; i < 4 * in_.length; ++i) most = largest(most, load_four(own_ + i * 128));
      const Scale scale = scale_for(most);
      if (lane_ == 0) backs[warp_] = scale.back;
      uint32_t* to = operands + 4 * warp_ * 32 + lane_;
#pragma unroll 2
      for (int s = 0; s < in_.length; ++s, to += 4 * S::kHalf) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const Four<float> v = load_four(own_ + (s * 4 + b) * 128);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t high, low;
            split_pair(v.value[2 * half] * scale.to_half, v.value[2 * half + 1] * scale.to_half,
                       high, low);
            to[2 * half * S::kHalf + b * 32] = high;
            to[(2 * half + 1) * S::kHalf + b * 32] = low;
          }
        }
      }
    }

   private:
    const PositionSlabs& in_;
    int thread_, lane_, warp_;
    float* own_;
  };
};

}  // namespace hesskern::cuda
