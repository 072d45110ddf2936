// Input covariance of a convolution without an unfolded copy: patches of a few
// rows at a time go through a buffer that stays in cache.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "symmetric_update.h"

namespace hesskern::cpu {

namespace {

// Elements of the patch buffer: 4 MB of float32 keeps it in the last-level cache.
constexpr int64_t kBuffer = 1 << 20;

// Writes the patches of output rows [row0, row1) (rows counted over all samples)
// of one group into buffer [row1 - row0, out_w, d]; x [N, C, H, W] contiguous.
template <typename T>
void gather_patches(T* buffer, const T* x, const ConvGeometry& g, int64_t channels, int64_t height,
                    int64_t width, int64_t channel0, int64_t group_channels, int64_t row0,
                    int64_t row1) {
  const int64_t d = group_channels * g.taps();
  at::parallel_for(row0, row1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / g.out_h, out_row = row % g.out_h;
      T* line = buffer + (row - row0) * g.out_w * d;
      for (int64_t c = 0; c < group_channels; ++c) {
        const T* plane = x + (sample * channels + channel0 + c) * height * width;
        for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
          const int64_t h = out_row * g.stride_h - g.padding_h + kh * g.dilation_h;
          for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
            T* out = line + (c * g.kernel_h + kh) * g.kernel_w + kw;
            const int64_t shift = kw * g.dilation_w - g.padding_w;
            for (int64_t o = 0; o < g.out_w; ++o) {
              const int64_t w = o * g.stride_w + shift;
              const bool inside = h >= 0 && h < height && w >= 0 && w < width;
              out[o * d] = inside ? plane[h * width + w] : T(0);
            }
          }
        }
      }
    }
  });
}

// acc [C k k, C k k] or [g, C k k / g, C k k / g], x [N, C, H, W] or [N, C, L]
void conv_input_covariance_(at::Tensor& acc, const at::Tensor& x, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double alpha) {
  const ConvGeometry g =
      check_conv_input_covariance(acc, x, kernel_size, stride, padding, dilation, groups);
  if (x.numel() == 0) return;
  const at::Tensor images =
      (x.dim() == 3 ? x.unsqueeze(2) : x).to(acc.scalar_type()).contiguous();
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t group_channels = channels / groups, d = group_channels * g.taps();
  const int64_t rows = images.size(0) * g.out_h;
  const int64_t step = std::clamp<int64_t>(kBuffer / (g.out_w * d), 1, rows);
  const at::Tensor buffer = at::empty({step * g.out_w, d}, images.options());
  for (int64_t group = 0; group < groups; ++group) {
    const at::Tensor target = acc.dim() == 3 ? acc.select(0, group) : acc;
    for (int64_t row0 = 0; row0 < rows; row0 += step) {
      const int64_t row1 = std::min(rows, row0 + step);
      AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "conv_input_covariance_", [&] {
        gather_patches<scalar_t>(buffer.mutable_data_ptr<scalar_t>(),
                                 images.const_data_ptr<scalar_t>(), g, channels, height, width,
                                 group * group_channels, group_channels, row0, row1);
      });
      symmetric_update_(target, buffer.narrow(0, 0, (row1 - row0) * g.out_w), alpha);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) { m.impl("conv_input_covariance_", &conv_input_covariance_); }

}  // namespace hesskern::cpu
