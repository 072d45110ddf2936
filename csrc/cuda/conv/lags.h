#pragma once

#include "conv_input_covariance.h"
#include "cuda/core/parts_product.h"

namespace hesskern::cuda {

// The same sum for stride 1, from products of whole images with themselves, shifted: the block of
// two kernel entries depends on their distance alone, but for what happens at the border.
// In is float, BFloat16 or Float16.
template <typename In>
struct ConvLags {
  ConvInputCovariance<In, float> call;
  // Rows of packed images from which on they are multiplied in 16-bit parts.
  int64_t fewest_part_rows = 4096;
  // Of these rows a launch takes at most so many.
  int64_t most_part_rows = kLongestPartsSum;

  // Whether this takes less time than unfolding on the way.
  bool pays() const;
  Work<float> plan() const;
};

}  // namespace hesskern::cuda
