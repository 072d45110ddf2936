#pragma once

#include "conv_input_covariance.h"

namespace hesskern::cuda {

// The same sum for images of one to three channels, square kernels of 3, 5 or 7 with stride and
// dilation 1. In is float, BFloat16 or Float16.
template <typename In>
struct ConvFewChannels {
  ConvInputCovariance<In, float> call;

  bool fits() const;
  Work<float> plan() const;
};

}  // namespace hesskern::cuda
