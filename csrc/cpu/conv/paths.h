// The ways to accumulate a convolution's input covariance; cost.h chooses.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "checks.h"
#include "conv_plan.h"

namespace hesskern::cpu {

// Elements of one float32 sum of a register tile in conv_lags and conv_pointwise.
constexpr int64_t kRun = 4096;
// Elements of the unfolded rows that conv_bands keeps at a time, within a core's own cache, and
// positions that one of its registers sums.
constexpr int64_t kBandElements = 1 << 16, kBandSum = 512;
// Elements of the signals that conv_spectral keeps at a time: 8 MB of float32; but below so many
// pairs of samples the inverse transforms outweigh the products.
constexpr int64_t kSignals = 1 << 21, kFewestPairs = 16;

struct ConvCall {
  at::Tensor acc;     // [g, d, d] with unit column stride, float32 or float64
  at::Tensor images;  // [N, C, H, W], acc's dtype or a narrower one
  ConvGeometry geometry;
  double alpha;

  int64_t samples() const { return images.size(0); }
  int64_t group_channels() const { return images.size(1) / geometry.groups; }
  int64_t order() const { return acc.size(1); }
  ConvAxis axis_h() const {
    return make_axis(images.size(2), geometry.kernel_h, geometry.stride_h, geometry.padding_h,
                     geometry.dilation_h, geometry.out_h);
  }
  ConvAxis axis_w() const {
    return make_axis(images.size(3), geometry.kernel_w, geometry.stride_w, geometry.padding_w,
                     geometry.dilation_w, geometry.out_w);
  }
  // Samples that a path converts and lays out anew at a time: 16 MB of float32.
  int64_t chunk_samples() const {
    return std::max<int64_t>(1, (int64_t(1) << 22) * samples() / images.numel());
  }
  // Samples [start, start + count) in acc's dtype.
  at::Tensor chunk(int64_t start, int64_t count) const {
    return images.narrow(0, start, count).to(acc.scalar_type());
  }
};

// Dot products of whole channels, for 1 x 1 kernels: whether that way takes the call, and it.
bool pointwise_fits(const ConvCall& call);
void conv_pointwise(const ConvCall& call);
// Patches, packed from the images as the triangle is computed. Any geometry.
void conv_patches(const ConvCall& call);
// Correlations at the lags between patch offsets, for few channels per group. Any geometry.
void conv_lags(const ConvCall& call);
// Products of image rows unfolded along the width, for few channels per group. Any geometry.
void conv_bands(const ConvCall& call);
// The same correlations from spectral densities. Any geometry.
void conv_spectral(const ConvCall& call);

}  // namespace hesskern::cpu
