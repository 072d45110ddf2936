// Input covariance of a convolution over one triangle of patch products, with
// patches packed straight from the images: no unfolded copy, any geometry.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/blas/pack.h"
#include "cpu/blas/triangle.h"
#include "cpu/scratch.h"
#include "paths.h"

namespace hesskern::cpu {

namespace {

// Columns of the patch matrix [n out_h out_w, C_g k k] of one group.
template <class T>
struct Patches {
  const ConvGeometry& g;
  const T* x;  // [n, C, H, W], rows contiguous, channel 0 the group's first
  int64_t stride_n, stride_c, height, width, order;

  // to [row1 - row0] := column (c, kh, kw), rows [row0, row1)
  void column(T* to, int64_t column, int64_t row0, int64_t row1) const {
    const int64_t kw = column % g.kernel_w, kh = column / g.kernel_w % g.kernel_h;
    const T* plane = x + column / g.taps() * stride_c;
    const int64_t shift_w = kw * g.dilation_w - g.padding_w;
    // Positions whose pixel lies inside the image, on the horizontal axis.
    const int64_t inside0 =
        std::clamp<int64_t>((-shift_w + g.stride_w - 1) / g.stride_w, 0, g.out_w);
    const int64_t inside1 =
        shift_w >= width ? inside0
                         : std::clamp<int64_t>((width - shift_w + g.stride_w - 1) / g.stride_w,
                                               inside0, g.out_w);
    for (int64_t row = row0; row < row1;) {
      const int64_t line = row / g.out_w, begin = row % g.out_w;
      const int64_t end = std::min(g.out_w, begin + row1 - row);
      const int64_t y = line % g.out_h * g.stride_h + kh * g.dilation_h - g.padding_h;
      const bool inside = y >= 0 && y < height;
      const int64_t from = inside ? std::clamp(inside0, begin, end) : end;
      const int64_t until = inside ? std::clamp(inside1, from, end) : end;
      const T* source = plane + line / g.out_h * stride_n + y * width + shift_w;
      for (int64_t q = begin; q < from; ++q) *to++ = T(0);
      if (g.stride_w == 1) {
        std::copy(source + from, source + until, to);
        to += until - from;
      } else {
        for (int64_t q = from; q < until; ++q) *to++ = source[q * g.stride_w];
      }
      for (int64_t q = until; q < end; ++q) *to++ = T(0);
      row += end - begin;
    }
  }

  // panel [count, W] := columns [panel W, panel W + W) of rows [row, row + count)
  void pack(T* panel_data, int64_t W, int64_t panel, int64_t row, int64_t count) const {
    constexpr int64_t kMaxPanel = 2 * 64 / sizeof(T);
    alignas(64) T lines[kMaxPanel * kPanelRows];
    const int64_t cols = std::min(W, order - panel * W);
    for (int64_t j = 0; j < cols; ++j) {
      column(lines + j * kPanelRows, panel * W + j, row, row + count);
    }
    pack_panel<T>(panel_data, W, lines, 1, kPanelRows, count, cols);
  }
};

template <class T>
void run(const ConvCall& call) {
  const ConvGeometry& g = call.geometry;
  const int64_t channels = call.images.size(1), height = call.images.size(2),
                width = call.images.size(3);
  const int64_t W = panel_width<T>(), d = call.order();
  const int64_t step = call.chunk_samples();
  for (int64_t start = 0; start < call.samples(); start += step) {
    const int64_t n = std::min(step, call.samples() - start);
    const at::Tensor images = call.chunk(start, n).contiguous();
    const int64_t rows = n * g.positions();
    const int64_t threads = gram_threads(rows, d);
    for (int64_t group = 0; group < g.groups; ++group) {
      const Patches<T> patches{
          g,
          images.const_data_ptr<T>() + group * call.group_channels() * height * width,
          channels * height * width,
          height * width,
          height,
          width,
          d};
      T* acc = call.acc.mutable_data_ptr<T>() + group * call.acc.stride(0);
      auto pack = [&](T* dst, int64_t panel, int64_t row, int64_t count) {
        patches.pack(dst, W, panel, row, count);
      };
      gram<T>(Triangle<T>::of(acc, call.acc.stride(1)), d, rows, static_cast<T>(call.alpha),
              threads, pack);
    }
  }
}

}  // namespace

void conv_patches(const ConvCall& call) {
  AT_DISPATCH_FLOATING_TYPES(call.acc.scalar_type(), "conv_patches", [&] { run<scalar_t>(call); });
}

}  // namespace hesskern::cpu
