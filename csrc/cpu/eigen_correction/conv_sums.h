// A convolution's sums over positions sum_t g_t x_t^T, without patches in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace hesskern::cpu {

// Whether a padded copy of an image takes no more than a few times what image and gradient do.
bool conv_sums_fit(const ConvGeometry& geometry, int64_t height, int64_t width);

// [groups, d, n, r, m] with rows of the weight's flatten(1), d = C k k / groups and one row more of
// sums of g with ones; images [n, C, H, W], g [n, r, groups m, t], both of one dtype, any strides
at::Tensor conv_sums(const at::Tensor& images, const at::Tensor& g, const ConvGeometry& geometry,
                     bool ones);

}  // namespace hesskern::cpu
