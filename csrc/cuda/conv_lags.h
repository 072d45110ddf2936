#pragma once

#include "conv_input_covariance.h"

namespace hesskern::cuda {

// The same sum for stride 1, from products of whole images with themselves, shifted: the block of
// two kernel entries depends on their distance alone, but for what happens at the border.
// In is float, BFloat16 or Float16.
template <typename In>
struct ConvLags {
  ConvInputCovariance<In, float> call;

  // Whether this takes less time than unfolding on the way.
  bool pays() const;
  Work<float> plan() const;
};

}  // namespace hesskern::cuda
