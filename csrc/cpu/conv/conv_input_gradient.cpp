// Gradients of many rows with respect to the input of a convolution, and of max
// pooling: rows of one sample meet the same ReLUs and the same maxima, so they are
// zero at the same places. Where they are zero nothing is multiplied.
//
// The rows of one position stand side by side, with channels innermost: the channels
// that are not zero are gathered once for all rows, and each output position is a
// product [r, nonzeros] x [nonzeros, channels] summed up in registers over the taps.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/blas/microkernel.h"
#include "cpu/blas/panels.h"
#include "cpu/scratch.h"

namespace hesskern::cpu {

namespace {

// Bytes that the gathered gradients of one strip of positions may take.
constexpr int64_t kGathered = 1 << 21;

struct Axis {
  int64_t in, out, kernel, stride, padding, dilation;

  // Gradients [first, last) reach inputs [begin, end).
  int64_t first(int64_t begin) const {
    const int64_t reach = begin + padding - dilation * (kernel - 1);
    return reach <= 0 ? 0 : std::min(out, (reach + stride - 1) / stride);
  }
  int64_t last(int64_t end) const { return std::min(out, (end - 1 + padding) / stride + 1); }
  // The gradient that reaches input `at` through tap k; -1: none.
  int64_t source(int64_t at, int64_t k) const {
    const int64_t shifted = at + padding - k * dilation;
    if (shifted < 0 || shifted % stride != 0) return -1;
    return shifted / stride < out ? shifted / stride : -1;
  }
};

template <typename T>
struct Problem {
  const T* grad;    // [N, h.out, w.out, r, m]
  const T* weight;  // [m, C / g, h.kernel, w.kernel]
  const T* factor;  // [N, h.in, w.in, C] or null
  T* out;           // [N, h.in, w.in, r, C]
  Axis h, w;
  int64_t n, r, m, channels, groups;

  int64_t taps() const { return h.kernel * w.kernel; }
  int64_t outputs() const { return m / groups; }
  int64_t inputs() const { return channels / groups; }
  int64_t panels() const {
    const int64_t width = microkernels<T>().width;
    return (inputs() + width - 1) / width;
  }
  int64_t panel_size() const { return taps() * outputs() * microkernels<T>().width; }
};

// Panels [g, panels, taps, outputs, width] of the weight, zero beyond its columns.
template <typename T>
void pack_weight(T* packed, const Problem<T>& p) {
  const int64_t width = microkernels<T>().width, rows = p.outputs(), taps = p.taps();
  at::parallel_for(0, p.groups * p.panels() * rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item % rows, panel = item / rows % p.panels(),
                    group = item / rows / p.panels();
      const int64_t column = panel * width, used = std::min(width, p.inputs() - column);
      const T* from = p.weight + ((group * rows + row) * p.inputs() + column) * taps;
      T* to = packed + (group * p.panels() + panel) * p.panel_size() + row * width;
      for (int64_t tap = 0; tap < taps; ++tap, to += rows * width) {
        for (int64_t j = 0; j < used; ++j) to[j] = from[j * taps + tap];
        std::fill(to + used, to + width, T(0));
      }
    }
  });
}

// The gradients of a strip of positions, zeros left out.
template <typename T>
class Gathered {
 public:
  Gathered(int64_t positions, int64_t rows, int64_t outputs)
      : rows_(rows),
        outputs_(outputs),
        values_(positions * outputs * rows),
        index_(positions * outputs),
        magnitude_(outputs),
        begin_(positions + 1) {}

  // grad [positions, r, m], outputs [column, column + outputs) of it
  void fill(const T* grad, int64_t positions, int64_t m, int64_t column) {
    const int32_t width = static_cast<int32_t>(microkernels<T>().width);
    int32_t* index = index_.data();
    T *values = values_.data(), *magnitude = magnitude_.data();
    begin_[0] = 0;
    with_simd([&](auto) HESSKERN_INLINE {
      int64_t total = 0;
      for (int64_t position = 0; position < positions; ++position) {
        const T* g = grad + position * rows_ * m + column;
        for (int64_t j = 0; j < outputs_; ++j) magnitude[j] = std::abs(g[j]);
        for (int64_t i = 1; i < rows_; ++i) {
          for (int64_t j = 0; j < outputs_; ++j) magnitude[j] += std::abs(g[i * m + j]);
        }
        int64_t count = 0;
        for (int64_t j = 0; j < outputs_; ++j) {
          index[total + count] = static_cast<int32_t>(j) * width;
          // Also true for NaN.
          count += magnitude[j] != T(0) ? 1 : 0;
        }
        for (int64_t k = 0; k < count; ++k) {
          const T* from = g + index[total + k] / width;
          T* to = values + (total + k) * rows_;
          for (int64_t i = 0; i < rows_; ++i) to[i] = from[i * m];
        }
        total += count;
        begin_[position + 1] = total;
      }
    });
  }

  GatheredRows<T> at(int64_t position, const T* weight) const {
    const int64_t first = begin_[position];
    return {values_.data() + first * rows_, index_.data() + first, begin_[position + 1] - first,
            weight};
  }

 private:
  int64_t rows_, outputs_;
  Scratch<T> values_;
  Scratch<int32_t> index_;
  std::vector<T> magnitude_;
  std::vector<int64_t> begin_;
};

template <typename T>
class Gradient {
 public:
  Gradient(const Problem<T>& problem, const T* weight)
      : p_(problem),
        weight_(weight),
        strip_(strip_rows()),
        strips_((p_.h.in + strip_ - 1) / strip_),
        sources_(
            std::min(p_.h.out, (strip_ - 1 + (p_.h.kernel - 1) * p_.h.dilation) / p_.h.stride + 2)),
        parts_((p_.r + microkernels<T>().rows - 1) / microkernels<T>().rows),
        rows_of_(sources(p_.h)),
        columns_of_(sources(p_.w)) {}

  void run() const {
    at::parallel_for(0, p_.n * strips_, 1, [&](int64_t begin, int64_t end) {
      Gathered<T> gathered(sources_ * p_.w.out, p_.r, p_.outputs());
      for (int64_t item = begin; item < end; ++item) {
        const int64_t top = item % strips_ * strip_;
        strip(gathered, item / strips_, top, std::min(p_.h.in, top + strip_));
      }
    });
  }

 private:
  int64_t strip_rows() const {
    const int64_t row_bytes =
        p_.w.out * p_.r * p_.outputs() * static_cast<int64_t>(sizeof(T)) / p_.h.stride;
    const int64_t halo = (p_.h.kernel - 1) * p_.h.dilation;
    const int64_t fitting = kGathered / std::max<int64_t>(row_bytes, 1) - halo;
    // Fewer rows than the halo would gather every position many times.
    const int64_t most = std::max<int64_t>({fitting, halo, 1});
    // Enough strips of about the same height for the threads to finish together.
    const int64_t shared = at::get_num_threads() > 1 ? 6 * at::get_num_threads() : 1;
    const int64_t wanted = std::max((p_.h.in + most - 1) / most, (shared + p_.n - 1) / p_.n);
    return std::max<int64_t>(1, (p_.h.in + wanted - 1) / wanted);
  }

  // For every input and tap the gradient that reaches it, or -1.
  static std::vector<int64_t> sources(const Axis& axis) {
    std::vector<int64_t> result(axis.in * axis.kernel);
    for (int64_t at = 0; at < axis.in; ++at) {
      for (int64_t k = 0; k < axis.kernel; ++k) result[at * axis.kernel + k] = axis.source(at, k);
    }
    return result;
  }

  // Input rows [top, bottom) of one sample.
  void strip(Gathered<T>& gathered, int64_t sample, int64_t top, int64_t bottom) const {
    const int64_t first = p_.h.first(top), last = std::max(first, p_.h.last(bottom));
    const T* grad = p_.grad + (sample * p_.h.out + first) * p_.w.out * p_.r * p_.m;
    for (int64_t group = 0; group < p_.groups; ++group) {
      gathered.fill(grad, (last - first) * p_.w.out, p_.m, group * p_.outputs());
      for (int64_t panel = 0; panel < p_.panels(); ++panel) {
        const T* weight = weight_ + (group * p_.panels() + panel) * p_.panel_size();
        for (int64_t y = top; y < bottom; ++y)
          row(gathered, sample, first, group, panel, y, weight);
      }
    }
  }

  void row(const Gathered<T>& gathered, int64_t sample, int64_t first, int64_t group, int64_t panel,
           int64_t y, const T* weight) const {
    const int64_t width = microkernels<T>().width, lanes = microkernels<T>().lanes;
    const int64_t columns = std::min(width, p_.inputs() - panel * width);
    const int64_t channel = group * p_.inputs() + panel * width, tap = p_.outputs() * width;
    const int64_t vectors = columns > lanes ? 2 : 1;
    const bool whole = columns == vectors * lanes;
    std::vector<GatheredRows<T>> terms(p_.taps());
    alignas(64) T edge[Microkernels<T>::kMaxRows * 2 * 16], factors[2 * 16];
    for (int64_t x = 0; x < p_.w.in; ++x) {
      GatherProduct<T> product{terms.data(), 0, 0, p_.r, nullptr, nullptr, p_.channels};
      for (int64_t ky = 0; ky < p_.h.kernel; ++ky) {
        const int64_t sy = rows_of_[y * p_.h.kernel + ky];
        if (sy < 0) continue;
        for (int64_t kx = 0; kx < p_.w.kernel; ++kx) {
          const int64_t sx = columns_of_[x * p_.w.kernel + kx];
          if (sx < 0) continue;
          terms[product.terms++] =
              gathered.at((sy - first) * p_.w.out + sx, weight + (ky * p_.w.kernel + kx) * tap);
        }
      }
      const int64_t position = (sample * p_.h.in + y) * p_.w.in + x;
      const T* factor =
          p_.factor != nullptr ? p_.factor + position * p_.channels + channel : nullptr;
      T* out = p_.out + position * p_.r * p_.channels + channel;
      if (!whole) {
        if (factor != nullptr) std::copy_n(factor, columns, factors);
        product.out_stride = width;
      }
      product.factor = factor == nullptr || whole ? factor : factors;
      for (int64_t part = 0; part < parts_; ++part) {
        const int64_t begin = p_.r * part / parts_, end = p_.r * (part + 1) / parts_;
        product.first = begin;
        product.out = whole ? out + begin * p_.channels : edge;
        microkernels<T>().gathered[end - begin][vectors](product);
        for (int64_t i = begin; !whole && i < end; ++i) {
          std::copy_n(edge + (i - begin) * width, columns, out + i * p_.channels);
        }
      }
    }
  }

  Problem<T> p_;
  const T* weight_;
  int64_t strip_, strips_, sources_, parts_;
  std::vector<int64_t> rows_of_, columns_of_;
};

// out [N, H, W, r, C] := gradients of every row, times the factor; grad [N, Ho, Wo, r, m],
// weight [m, C / g, kh, kw], factor [N, H, W, C] or none
void conv_input_gradient_(at::Tensor& out, const at::Tensor& grad, const at::Tensor& weight,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                          int64_t groups, const std::optional<at::Tensor>& factor) {
  check_conv_input_gradient(out, grad, weight, stride, padding, dilation, groups, factor);
  if (out.numel() == 0) return;
  if (grad.numel() == 0) {
    out.zero_();
    return;
  }
  const at::Tensor g = grad.contiguous(), w = weight.contiguous();
  const at::Tensor f = factor.has_value() ? factor->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "conv_input_gradient_", [&] {
    const auto axis = [&](int64_t i) {
      return Axis{out.size(1 + i), grad.size(1 + i), weight.size(2 + i),
                  stride[i],       padding[i],       dilation[i]};
    };
    const Problem<scalar_t> problem{g.const_data_ptr<scalar_t>(),
                                    w.const_data_ptr<scalar_t>(),
                                    f.defined() ? f.const_data_ptr<scalar_t>() : nullptr,
                                    out.mutable_data_ptr<scalar_t>(),
                                    axis(0),
                                    axis(1),
                                    grad.size(0),
                                    grad.size(3),
                                    grad.size(4),
                                    out.size(4),
                                    groups};
    const Scratch<scalar_t> packed(groups * problem.panels() * problem.panel_size());
    pack_weight(packed.data(), problem);
    Gradient<scalar_t>(problem, packed.data()).run();
  });
}

template <typename T>
struct Pooling {
  const T* grad;           // [N, h.out, w.out, r, C]
  const int64_t* indices;  // [N, h.out, w.out, C] into [h.in, w.in]
  const T* factor;         // [N, h.in, w.in, C] or null
  const T* relu;           // the same
  T* out;                  // [N, h.in, w.in, r, C]
  Axis h, w;
  int64_t r, channels;

  int64_t positions() const { return h.in * w.in; }
  int64_t outputs() const { return h.out * w.out; }
  // Whether every input is in at most one window.
  bool disjoint() const {
    return h.stride >= h.kernel && w.stride >= w.kernel && h.padding == 0 && w.padding == 0 &&
           h.dilation == 1 && w.dilation == 1 && (h.out - 1) * h.stride + h.kernel <= h.in &&
           (w.out - 1) * w.stride + w.kernel <= w.in;
  }
};

// One sample; windows may overlap.
template <typename T>
void scatter_maxima(const Pooling<T>& p, int64_t sample) {
  T* target = p.out + sample * p.positions() * p.r * p.channels;
  std::fill(target, target + p.positions() * p.r * p.channels, T(0));
  for (int64_t o = 0; o < p.outputs(); ++o) {
    const int64_t position = sample * p.outputs() + o;
    const T* source = p.grad + position * p.r * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t where = p.indices[position * p.channels + c];
      TORCH_CHECK_INDEX(where >= 0 && where < p.positions(),
                        "max_pool_input_gradient_: indices must lie in [0, ", p.positions(),
                        "), got ", where);
      const int64_t input = (sample * p.positions() + where) * p.channels + c;
      const T scale = p.factor == nullptr ? T(1) : p.factor[input];
      if (scale == T(0) || (p.relu != nullptr && !(p.relu[input] > T(0)))) continue;
      T* cell = target + where * p.r * p.channels + c;
      for (int64_t i = 0; i < p.r; ++i) cell[i * p.channels] += scale * source[i * p.channels + c];
    }
  }
}

// The windows [first, last) of all samples' windows; they do not overlap, so that every
// input in one is written once. scale is memory [C].
template <typename T>
void select_maxima(const Pooling<T>& p, int64_t first, int64_t last, T* scale) {
  const int64_t size = p.r * p.channels;
  with_simd([&](auto) HESSKERN_INLINE {
    for (int64_t position = first; position < last; ++position) {
      const int64_t sample = position / p.outputs(), o = position % p.outputs();
      const T* source = p.grad + position * size;
      const int64_t* index = p.indices + position * p.channels;
      const int64_t top = o / p.w.out * p.h.stride, left = o % p.w.out * p.w.stride;
      for (int64_t y = top; y < top + p.h.kernel; ++y) {
        for (int64_t x = left; x < left + p.w.kernel; ++x) {
          const int64_t where = y * p.w.in + x;
          const int64_t input = (sample * p.positions() + where) * p.channels;
          for (int64_t c = 0; c < p.channels; ++c) scale[c] = index[c] == where ? T(1) : T(0);
          if (p.factor != nullptr) {
            for (int64_t c = 0; c < p.channels; ++c) scale[c] *= p.factor[input + c];
          }
          if (p.relu != nullptr) {
            for (int64_t c = 0; c < p.channels; ++c) {
              scale[c] = p.relu[input + c] > T(0) ? scale[c] : T(0);
            }
          }
          T* cell = p.out + (sample * p.positions() + where) * size;
          for (int64_t i = 0; i < p.r; ++i) {
            const T* from = source + i * p.channels;
            T* to = cell + i * p.channels;
#pragma omp simd
            for (int64_t c = 0; c < p.channels; ++c) to[c] = scale[c] * from[c];
          }
        }
      }
    }
  });
}

// out [N, H, W, r, C] := gradients of every row, times the factor, where relu is positive; grad
// [N, Ho, Wo, r, C], indices [N, Ho, Wo, C] of positions in [0, H W), factor and relu [N, H, W, C]
// or none
void max_pool_input_gradient_(at::Tensor& out, const at::Tensor& grad, const at::Tensor& indices,
                              at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation,
                              const std::optional<at::Tensor>& factor,
                              const std::optional<at::Tensor>& relu) {
  check_max_pool_input_gradient(out, grad, indices, kernel_size, stride, padding, dilation, factor,
                                relu);
  if (out.numel() == 0) return;
  if (!out.is_contiguous()) {
    at::Tensor packed = at::empty_like(out, at::MemoryFormat::Contiguous);
    max_pool_input_gradient_(packed, grad, indices, kernel_size, stride, padding, dilation, factor,
                             relu);
    out.copy_(packed);
    return;
  }
  if (grad.numel() == 0) {
    out.zero_();
    return;
  }
  const int64_t n = grad.size(0), r = grad.size(3), channels = grad.size(4);
  const at::Tensor g = grad.contiguous(), index = indices.contiguous();
  const at::Tensor f = factor.has_value() ? factor->contiguous() : at::Tensor();
  const at::Tensor results = relu.has_value() ? relu->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "max_pool_input_gradient_", [&] {
    const auto axis = [&](int64_t i) {
      return Axis{out.size(1 + i), grad.size(1 + i), kernel_size[i],
                  stride[i],       padding[i],       dilation[i]};
    };
    const auto data = [](const at::Tensor& t) {
      return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr;
    };
    const Pooling<scalar_t> pooling{g.const_data_ptr<scalar_t>(),
                                    index.const_data_ptr<int64_t>(),
                                    data(f),
                                    data(results),
                                    out.mutable_data_ptr<scalar_t>(),
                                    axis(0),
                                    axis(1),
                                    r,
                                    channels};
    if (!pooling.disjoint()) {
      at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t sample = begin; sample < end; ++sample) scatter_maxima(pooling, sample);
      });
      return;
    }
    if (pooling.positions() != pooling.outputs() * pooling.h.kernel * pooling.w.kernel) {
      out.zero_();
    }
    at::parallel_for(0, n * pooling.outputs(), 16, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scale(channels);
      select_maxima(pooling, begin, end, scale.data());
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern_internal, CPU, m) {
  m.impl("conv_input_gradient_", &conv_input_gradient_);
  m.impl("max_pool_input_gradient_", &max_pool_input_gradient_);
}

}  // namespace hesskern::cpu
