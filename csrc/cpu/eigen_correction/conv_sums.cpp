#include "conv_sums.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/blas/gemm.h"
#include "cpu/blas/microkernel.h"
#include "cpu/blas/panels.h"
#include "cpu/scratch.h"

namespace hesskern::cpu {

namespace {

// One axis of the padded image: every stride-th pixel from a phase on is an image of its own, in
// which neighbouring positions read neighbouring pixels.
struct PhasedAxis {
  int64_t stride, padding, size;      // of the image
  int64_t span;                       // pixels of a phase
  std::vector<int64_t> phases;        // that the kernel reads
  std::vector<int64_t> phase, first;  // per kernel entry: its phase's index and first pixel there

  PhasedAxis(int64_t kernel, int64_t step, int64_t pad, int64_t dilation, int64_t positions,
             int64_t pixels)
      : stride(step), padding(pad), size(pixels), span(span_of(kernel, step, dilation, positions)) {
    for (int64_t i = 0; i < kernel; ++i) {
      const int64_t own = i * dilation % step;
      const auto found = std::find(phases.begin(), phases.end(), own);
      phase.push_back(found - phases.begin());
      if (found == phases.end()) phases.push_back(own);
      first.push_back(i * dilation / step);
    }
  }

  static int64_t span_of(int64_t kernel, int64_t step, int64_t dilation, int64_t positions) {
    return positions + (kernel - 1) * dilation / step;
  }
  int64_t count() const { return static_cast<int64_t>(phases.size()); }
  // The image's pixel, outside [0, size) in the padding.
  int64_t pixel(int64_t index, int64_t v) const { return v * stride + phases[index] - padding; }
  // Pixels v of a phase that lie in the image: [begin, end).
  int64_t begin(int64_t index) const {
    const int64_t short_of = padding - phases[index];
    return std::clamp<int64_t>((short_of + stride - 1) / stride, 0, span);
  }
  int64_t end(int64_t index) const {
    const int64_t last = size - 1 + padding - phases[index];
    return last < 0 ? 0 : std::clamp<int64_t>(last / stride + 1, begin(index), span);
  }
};

template <typename T>
struct Sums {
  const ConvGeometry& geometry;
  PhasedAxis h, w;
  const T* images;  // [n, C, H, W]
  int64_t channels;
  const T* g;  // [n, groups, r m, t]
  int64_t g_n, g_group, g_column, g_t;
  int64_t samples, columns;  // columns: r m
  bool ones;
  T* out;  // [groups, d, n, columns]

  int64_t taps() const { return geometry.taps(); }
  int64_t positions() const { return geometry.positions(); }
  int64_t group_channels() const { return channels / geometry.groups; }
  int64_t d() const { return group_channels() * taps() + (ones ? 1 : 0); }
  int64_t plane() const { return h.span * w.span; }
  int64_t channel_size() const { return h.count() * w.count() * plane(); }
  int64_t image_size() const { return channels * channel_size(); }
  int64_t panels_size() const { return round_up(columns, microkernels<T>().width) * positions(); }

  // padded [C, phases, phases, span, span] := image [C, H, W] and zeros around it
  void pad(T* padded, const T* image) const {
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = image + c * h.size * w.size;
      for (int64_t i = 0; i < h.count(); ++i) {
        for (int64_t j = 0; j < w.count(); ++j) {
          const int64_t begin = w.begin(j), end = w.end(j);
          for (int64_t v = 0; v < h.span; ++v, padded += w.span) {
            const bool inside = v >= h.begin(i) && v < h.end(i);
            if (!inside || begin >= end) {
              std::fill_n(padded, w.span, T(0));
              continue;
            }
            const T* line = from + h.pixel(i, v) * w.size + w.pixel(j, begin);
            std::fill_n(padded, begin, T(0));
            if (w.stride == 1) {
              std::copy_n(line, end - begin, padded + begin);
            } else {
              for (int64_t u = begin; u < end; ++u) padded[u] = line[(u - begin) * w.stride];
            }
            std::fill_n(padded + end, w.span - end, T(0));
          }
        }
      }
    }
  }

  // Where position 0 of kernel entry (kh, kw) lies in a channel of the padded image.
  int64_t place(int64_t kh, int64_t kw) const {
    return (h.phase[kh] * w.count() + w.phase[kw]) * plane() + h.first[kh] * w.span + w.first[kw];
  }

  // rows of one sample and group, kernel entries (kh, kw) of channels [channel, channel + used) or,
  // along_w, kernel entries [kw, kw + used) of one channel
  void block(const T* padded, const T* panels, int64_t sample, int64_t group, int64_t channel,
             int64_t kh, int64_t kw, int64_t used, bool along_w) const {
    const auto& kernels = microkernels<T>();
    alignas(64) T result[Microkernels<T>::kMaxRows * (128 / sizeof(T))];
    BlockProduct<T> p{};
    p.a = padded + (group * group_channels() + channel) * channel_size() + place(kh, kw);
    p.a_stride = along_w ? geometry.dilation_w : channel_size();
    p.a_jump = w.span;
    p.segment = geometry.out_w;
    p.inner = positions();
    p.c = result;
    p.c_stride = kernels.width;
    const int64_t step = samples * columns, row_step = along_w ? step : taps() * step;
    T* to =
        out + ((group * d() + channel * taps() + kh * geometry.kernel_w + kw) * samples + sample) *
                  columns;
    for (int64_t column = 0; column < columns; column += kernels.width) {
      const int64_t count = std::min<int64_t>(kernels.width, columns - column);
      p.b = panels + column * positions();
      p.ahead = reinterpret_cast<const char*>(p.b);
      kernels.by_rows[used][count > kernels.lanes ? 2 : 1](p);
      for (int64_t i = 0; i < used; ++i) {
        std::copy_n(result + i * kernels.width, count, to + i * row_step + column);
      }
    }
  }

  void sample(T* padded, T* panels, int64_t n) const {
    const int64_t most = microkernels<T>().rows, own = group_channels();
    pad(padded, images + n * channels * h.size * w.size);
    // The rows of a block lie at one distance: channels, or the entries of a line of the kernel.
    const bool along_w = w.stride == 1 && own < std::min(most, geometry.kernel_w);
    const int64_t length = along_w ? geometry.kernel_w : own;
    const int64_t blocks = (length + most - 1) / most;
    for (int64_t group = 0; group < geometry.groups; ++group) {
      const T* rows = g + n * g_n + group * g_group;
      pack_panels(panels, positions(), 0, rows, positions(), columns, g_t, g_column);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = length * b / blocks, used = length * (b + 1) / blocks - first;
        for (int64_t kh = 0; kh < geometry.kernel_h; ++kh) {
          if (along_w) {
            for (int64_t c = 0; c < own; ++c)
              block(padded, panels, n, group, c, kh, first, used, true);
            continue;
          }
          for (int64_t kw = 0; kw < geometry.kernel_w; ++kw) {
            block(padded, panels, n, group, first, kh, kw, used, false);
          }
        }
      }
      if (ones) sum_gradients(panels, n, group);
    }
  }

  // The row that belongs to the ones, from the panels [., t, width].
  void sum_gradients(const T* panels, int64_t n, int64_t group) const {
    const int64_t width = microkernels<T>().width;
    T* to = out + ((group * d() + d() - 1) * samples + n) * columns;
    for (int64_t column = 0; column < columns; ++column) {
      const T* from = panels + column / width * width * positions() + column % width;
      // Parts of a line of the image: one long sum would drift.
      T total = 0;
      for (int64_t line = 0; line < geometry.out_h; ++line) {
        T part = 0;
        for (int64_t t = 0; t < geometry.out_w; ++t, from += width) part += *from;
        total += part;
      }
      to[column] = total;
    }
  }

  void run() const {
    const int64_t work = samples * geometry.groups * d() * columns * positions();
    const int64_t threads = std::min(product_threads(work), samples);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> padded(image_size()), panels(panels_size());
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t n = samples * i / threads; n < samples * (i + 1) / threads; ++n) {
          sample(padded.data(), panels.data(), n);
        }
      }
    });
  }
};

}  // namespace

bool conv_sums_fit(const ConvGeometry& g, int64_t height, int64_t width) {
  const double span_h =
      static_cast<double>(PhasedAxis::span_of(g.kernel_h, g.stride_h, g.dilation_h, g.out_h));
  const double span_w =
      static_cast<double>(PhasedAxis::span_of(g.kernel_w, g.stride_w, g.dilation_w, g.out_w));
  const double phases = static_cast<double>(std::min(g.kernel_h, g.stride_h)) *
                        static_cast<double>(std::min(g.kernel_w, g.stride_w));
  return phases * span_h * span_w <= 8.0 * static_cast<double>(height * width + g.positions());
}

at::Tensor conv_sums(const at::Tensor& images, const at::Tensor& g, const ConvGeometry& c,
                     bool ones) {
  const int64_t n = images.size(0), r = g.size(1), m = g.size(2) / c.groups, t = c.positions();
  const int64_t d = images.size(1) / c.groups * c.taps() + (ones ? 1 : 0);
  const at::Tensor pixels = images.contiguous();
  const at::Tensor rows =
      g.reshape({n, r, c.groups, m, t}).transpose(1, 2).reshape({n, c.groups, r * m, t});
  const at::Tensor out = at::empty({c.groups, d, n, r, m}, images.options());
  AT_DISPATCH_FLOATING_TYPES(images.scalar_type(), "conv_sums", [&] {
    const Sums<scalar_t> sums{
        c,
        {c.kernel_h, c.stride_h, c.padding_h, c.dilation_h, c.out_h, images.size(2)},
        {c.kernel_w, c.stride_w, c.padding_w, c.dilation_w, c.out_w, images.size(3)},
        pixels.const_data_ptr<scalar_t>(),
        images.size(1),
        rows.const_data_ptr<scalar_t>(),
        rows.stride(0),
        rows.stride(1),
        rows.stride(2),
        rows.stride(3),
        n,
        r * m,
        ones,
        out.mutable_data_ptr<scalar_t>()};
    sums.run();
  });
  return out;
}

}  // namespace hesskern::cpu
