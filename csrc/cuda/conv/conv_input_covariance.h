#pragma once

#include "cuda/core/axis.h"
#include "cuda/core/work.h"

namespace hesskern::cuda {

// sum.acc [g, d, d] += alpha sum_n X_n X_n^T per group, d = C / g kh kw, X_n [d, positions] the
// unfolded sample n; x [N, C, H, W] of In with element strides; types as in InputCovariance.
template <typename In, typename T>
struct ConvInputCovariance {
  const In* x;
  int64_t samples, group_channels, height, width;
  int64_t sample_stride, channel_stride, row_stride, column_stride;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t out_h, out_w;
  bool tf32;
  SymmetricSum<T> sum;

  Work<T> plan() const;
};

}  // namespace hesskern::cuda
