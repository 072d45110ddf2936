// input_covariance.cu, conv_input_covariance.cu, output_hessian.cu and mirror.cu on the CPU.
#include <algorithm>
#include <limits>

#include "accumulator.h"
#include "check.h"
#include "checks.h"
#include "conv/conv_input_covariance.h"
#include "conv/lags.h"
#include "core/warp.h"
#include "input_covariance.h"
#include "mirror.h"
#include "output_hessian.h"

namespace hesskern::cuda::check {

namespace {

// x [n, d] in rows, or in columns where transposed
template <typename In, typename T>
void covariance(const char* type, int64_t n, int64_t d, bool ones, bool transposed, bool tf32,
                int processors) {
  multiprocessor_count_is(processors);
  const Memory<In> x(n * d);
  for (int64_t i = 0; i < n * d; ++i) x[i] = store<In>(normal());
  const Axis rows{transposed ? 1 : d}, columns{transposed ? n : 1};
  const int64_t order = d + (ones ? 1 : 0);
  Accumulator<T> acc(1, order, order + 3, T(0.7));
  const auto value = [&](int64_t k, int64_t i) {
    return i == d ? 1.0 : value_of(x[rows.offset(k) + columns.offset(i)]);
  };
  for (int64_t i = 0; i < order; ++i) {
    for (int64_t j = i; j < order; ++j) {
      double total = 0;
      for (int64_t k = 0; k < n; ++k) total += value(k, i) * value(k, j);
      acc.expected(0, i, j) += acc.sum.alpha * total;
    }
  }
  const InputCovariance<In, T> call{x.data(), rows, columns, n, d, ones, tf32, acc.sum};
  run(call, acc,
      std::string("input_covariance ") + type + " [" + std::to_string(n) + ", " +
          std::to_string(d) + "]" + (ones ? " ones" : "") + (transposed ? " transposed" : "") +
          (tf32 ? " tf32" : "") + " on " + std::to_string(processors),
      limit_of<T>(tf32));
}

template <typename In>
void half_covariance(const char* type) {
  covariance<In, float>(type, 300, 65, true, false, false, 4);
  covariance<In, float>(type, 50, 100, false, true, false, 1);
  covariance<In, float>(type, 300, 20, true, false, false, 4);
  covariance<In, float>(type, 300, 24, false, false, false, 4);
  covariance<In, float>(type, 200, 72, false, true, false, 2);
  covariance<In, float>(type, 50, 264, false, false, false, 1);
  covariance<In, float>(type, 31, 130, true, false, false, 1);
  covariance<In, float>(type, 50, 376, false, false, false, 1);
  covariance<In, float>(type, 136, 40, false, true, false, 1);
}

// Non-negative data, where sums that are cut off instead of rounded all err to the same side.
void long_sum() {
  multiprocessor_count_is(1);
  constexpr int64_t n = 6000, d = 4, pitch = 8;
  const Memory<float> x(n * pitch);
  for (int64_t i = 0; i < n * pitch; ++i) x[i] = static_cast<float>(std::fabs(normal()));
  Accumulator<float> acc(1, d, d, 1.0f);
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i; j < d; ++j) {
      for (int64_t k = 0; k < n; ++k) {
        acc.expected(0, i, j) += static_cast<double>(x[k * pitch + i]) * x[k * pitch + j];
      }
    }
  }
  run(InputCovariance<float, float>{x.data(), {pitch}, {1}, n, d, false, false, acc.sum}, acc,
      "input_covariance float [6000, 4] non-negative", 2e-6);
}

// One value that is no number spoils its row and column of the sum and nothing else.
void not_a_number(float bad, bool tf32) {
  multiprocessor_count_is(1);
  constexpr int64_t n = 20, d = 8, pitch = 12, at = 3;
  const Memory<float> x(n * pitch);
  for (int64_t i = 0; i < n * pitch; ++i) x[i] = static_cast<float>(normal());
  x[7 * pitch + at] = bad;
  Accumulator<float> acc(1, d, d, 1.0f);
  const InputCovariance<float, float> call{x.data(), {pitch}, {1}, n, d, false, tf32, acc.sum};
  const Work<float> work = call.plan();
  const Memory<float> workspace(work.workspace);
  bool good = work.run(workspace.data(), nullptr) == cudaSuccess;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i; j < d; ++j) {
      good = good && std::isfinite(acc.at(0, i, j)) == (i != at && j != at);
    }
  }
  report("input_covariance of " + std::to_string(bad) + (tf32 ? " tf32" : ""), good ? 0 : 1, 0);
}

struct Shape {
  int64_t n, channels, height, width, groups;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// What lies around images in memory, and what is in them.
struct Around {
  // Elements before them, and behind every row (of a pixel's channels, where these come last).
  int64_t before = 0, behind = 0;
  // Every channel has one value that all others vanish beside.
  bool spikes = false;
};

template <typename In, typename T>
void convolution(const char* type, const Shape& s, bool channels_last, bool tf32, int processors,
                 bool by_lags = false, const Around& around = {}) {
  multiprocessor_count_is(processors);
  const int64_t line = (channels_last ? s.channels : s.width) + around.behind;
  const int64_t channel = channels_last ? 1 : s.height * line;
  const int64_t row = channels_last ? s.width * line : line;
  const int64_t column = channels_last ? line : 1;
  const int64_t sample = channels_last ? s.height * row : s.channels * channel;
  const Memory<In> memory(s.n * sample + around.before);
  In* const x = memory.data() + around.before;
  for (int64_t i = 0; i < s.n * sample; ++i) {
    if (i % line < line - around.behind) x[i] = store<In>(normal());
  }
  for (int64_t c = 0; around.spikes && c < s.channels; ++c) {
    const int64_t at = (37 * c + 5) * 1031 % (s.n * s.height * s.width);
    x[at / s.width / s.height * sample + c * channel + at / s.width % s.height * row +
      at % s.width * column] = store<In>(1e6 * (c % 2 == 0 ? -1 : 1));
  }
  const auto out = [](int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                      int64_t dilation) {
    return (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  const int64_t out_h = out(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const int64_t out_w = out(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  const int64_t per_group = s.channels / s.groups, d = per_group * s.kernel_h * s.kernel_w;
  Accumulator<T> acc(s.groups, d, d, T(0.5));
  const auto value = [&](int64_t g, int64_t n, int64_t oy, int64_t ox, int64_t i) {
    const int64_t c = g * per_group + i / s.kernel_w / s.kernel_h;
    const int64_t y = oy * s.stride_h - s.padding_h + i / s.kernel_w % s.kernel_h * s.dilation_h;
    const int64_t z = ox * s.stride_w - s.padding_w + i % s.kernel_w * s.dilation_w;
    if (y < 0 || y >= s.height || z < 0 || z >= s.width) return 0.0;
    return value_of(x[n * sample + c * channel + y * row + z * column]);
  };
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t n = 0; n < s.n; ++n) {
      for (int64_t position = 0; position < out_h * out_w; ++position) {
        for (int64_t i = 0; i < d; ++i) {
          const double left = value(g, n, position / out_w, position % out_w, i);
          for (int64_t j = i; j < d; ++j) {
            acc.expected(g, i, j) +=
                acc.sum.alpha * left * value(g, n, position / out_w, position % out_w, j);
          }
        }
      }
    }
  }
  const ConvInputCovariance<In, T> call{
      x,           s.n,          per_group,    s.height,   s.width,    sample,     channel,
      row,         column,       s.kernel_h,   s.kernel_w, s.stride_h, s.stride_w, s.padding_h,
      s.padding_w, s.dilation_h, s.dilation_w, out_h,      out_w,      tf32,       acc.sum};
  const std::string name = std::string(by_lags ? "conv_lags " : "conv_input_covariance ") + type +
                           " [" + std::to_string(s.n) + ", " + std::to_string(s.channels) + ", " +
                           std::to_string(s.height) + ", " + std::to_string(s.width) + "] k " +
                           std::to_string(s.kernel_h) + "x" + std::to_string(s.kernel_w) + " g " +
                           std::to_string(s.groups) + (channels_last ? " channels last" : "") +
                           (tf32 ? " tf32" : "") + (around.spikes ? " spikes" : "");
  if constexpr (std::is_same_v<T, float>) {
    if (by_lags) return run(ConvLags<In>{call, 1, 50}, acc, name, limit_of<T>(tf32));
  }
  run(call, acc, name, limit_of<T>(tf32));
}

// One value that is no number spoils its channel's rows and columns of the sum and nothing else.
void not_a_number_in_lags(float bad) {
  multiprocessor_count_is(2);
  constexpr int64_t channels = 64, side = 4, taps = 9, at = 21, d = channels * taps;
  const Memory<float> x(2 * channels * side * side);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(normal());
  x[at * side * side] = bad;
  Accumulator<float> acc(1, d, d, 1.0f);
  ConvInputCovariance<float, float> call{};
  call.x = x.data();
  call.samples = 2, call.group_channels = channels;
  call.height = call.width = call.out_h = call.out_w = side;
  call.sample_stride = channels * side * side, call.channel_stride = side * side;
  call.row_stride = side, call.column_stride = 1;
  call.kernel_h = call.kernel_w = 3, call.padding_h = call.padding_w = 1;
  call.stride_h = call.stride_w = call.dilation_h = call.dilation_w = 1;
  call.sum = acc.sum;
  const Work<float> work = ConvLags<float>{call, 1}.plan();
  const Memory<float> workspace(work.workspace);
  bool good = work.run(workspace.data(), nullptr) == cudaSuccess;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i; j < d; ++j) {
      good = good && std::isfinite(acc.at(0, i, j)) == (i / taps != at && j / taps != at);
    }
  }
  report("conv_lags of " + std::to_string(bad), good ? 0 : 1, 0);
}

// jacobian [n, c, m, t]; positions_last: contiguous along t rather than along m
template <typename T>
void output(const char* type, int64_t n, int64_t c, int64_t m, int64_t t, bool positions_last,
            bool tf32, int processors, bool in_parts = false) {
  multiprocessor_count_is(processors);
  const Memory<T> jacobian(n * c * m * t), p(n * c);
  for (int64_t i = 0; i < n * c * m * t; ++i) jacobian[i] = static_cast<T>(1 + normal());
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t j = 0; j < c; ++j) total += p[i * c + j] = static_cast<T>(std::exp(normal()));
    for (int64_t j = 0; j < c; ++j) p[i * c + j] /= static_cast<T>(total);
  }
  const int64_t output_stride = positions_last ? t : 1, position_stride = positions_last ? 1 : m;
  Accumulator<T> acc(1, m, m, T(1.25));
  const auto value = [&](int64_t i, int64_t j, int64_t a, int64_t b) {
    return static_cast<double>(
        jacobian[(i * c + j) * m * t + a * output_stride + b * position_stride]);
  };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t b = 0; b < t; ++b) {
      std::vector<double> mean(static_cast<size_t>(m));
      for (int64_t a = 0; a < m; ++a) {
        for (int64_t j = 0; j < c; ++j) {
          mean[static_cast<size_t>(a)] += static_cast<double>(p[i * c + j]) * value(i, j, a, b);
        }
      }
      for (int64_t j = 0; j < c; ++j) {
        for (int64_t a = 0; a < m; ++a) {
          const double left = value(i, j, a, b) - mean[static_cast<size_t>(a)];
          for (int64_t e = a; e < m; ++e) {
            acc.expected(0, a, e) += acc.sum.alpha * static_cast<double>(p[i * c + j]) * left *
                                     (value(i, j, e, b) - mean[static_cast<size_t>(e)]);
          }
        }
      }
    }
  }
  OutputHessian<T> call{jacobian.data(), p.data(),        n,    c,      m, t, c * m * t, m * t,
                        output_stride,   position_stride, tf32, acc.sum};
  if (in_parts) call.least_in_parts = 0;
  run(call, acc,
      std::string("output_hessian ") + type + " [" + std::to_string(n) + ", " + std::to_string(c) +
          ", " + std::to_string(m) + ", " + std::to_string(t) + "]" +
          (positions_last ? " positions last" : "") + (tf32 ? " tf32" : "") +
          (in_parts ? " in parts" : ""),
      tf32 ? limit_of<T>(true) : 3 * limit_of<T>());
}

template <typename T>
void mirrored(int64_t groups, int64_t d, bool column_major) {
  const Memory<T> acc(groups * d * d);
  const int64_t row = column_major ? 1 : d, column = column_major ? d : 1;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = i; j < d; ++j)
        acc[g * d * d + i * row + j * column] = static_cast<T>(normal());
    }
  }
  if (mirror(acc.data(), groups, d, d * d, row, column, nullptr) != cudaSuccess) {
    return report("mirror: not launched", 1, 0);
  }
  double worst = 0;
  for (int64_t e = 0; e < groups * d * d; ++e) {
    const int64_t g = e / d / d, i = e / d % d, j = e % d;
    const double delta = acc[g * d * d + i * row + j * column] -
                         acc[g * d * d + std::min(i, j) * row + std::max(i, j) * column];
    worst = std::isnan(delta) ? 1.0 : std::max(worst, std::fabs(delta));
  }
  report("mirror " + std::to_string(8 * sizeof(T)) + " [" + std::to_string(groups) + ", " +
             std::to_string(d) + "]" + (column_major ? " column-major" : ""),
         worst, 0);
}

}  // namespace

void check_input_covariance(bool few) {
  // Orders about the sides of the tiles; one processor leaves no splits, many force them. Rows that
  // are multiples of 16 bytes are copied, others go through registers.
  covariance<float, float>("float", 40, 70, true, false, false, 1);
  covariance<float, float>("float", 600, 5, false, false, false, 2);
  covariance<float, float>("float", 200, 68, false, false, false, 2);
  if (few) return;
  covariance<float, float>("float", 1, 1, false, false, false, 2);
  covariance<float, float>("float", 17, 64, false, true, false, 1);
  covariance<float, float>("float", 33, 128, false, false, false, 1);
  covariance<float, float>("float", 33, 126, false, false, false, 1);
  covariance<float, float>("float", 19, 129, false, false, false, 1);
  covariance<float, float>("float", 2000, 3, true, true, false, 40);
  covariance<float, float>("float", 300, 100, false, false, true, 4);
  covariance<float, float>("float", 302, 98, false, false, true, 4);
  covariance<float, float>("float", 45, 33, true, false, true, 1);
  covariance<float, float>("float", 70, 132, false, false, true, 4);
  covariance<float, float>("float", 400, 130, false, true, false, 4);
  covariance<float, float>("float", 132, 40, false, true, true, 4);
  covariance<float, float>("float", 36, 128, false, true, false, 1);
  covariance<float, float>("float", 36, 128, false, true, true, 1);
  covariance<float, float>("float", 300, 16, false, true, false, 4);
  // Too many columns for kernels of their own.
  covariance<float, float>("float", 33, 384, false, false, false, 1);
  covariance<float, float>("float", 33, 384, false, false, true, 1);
  covariance<float, float>("float", 19, 383, true, false, true, 1);
  half_covariance<BFloat16>("bfloat16");
  half_covariance<Float16>("float16");
  covariance<double, double>("double", 700, 70, true, false, false, 4);
  covariance<double, double>("double", 18, 130, false, true, false, 1);
  long_sum();
  for (const bool tf32 : {false, true}) {
    // The bits of the canonical NaN of CUDA, all of the fraction's.
    not_a_number(float_of(0x7fffffffu), tf32);
    not_a_number(-std::numeric_limits<float>::infinity(), tf32);
  }
}

void check_conv_input_covariance(bool few) {
  convolution<float, float>("float", {2, 3, 7, 6, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 1);
  if (few) return;
  convolution<float, float>("float", {2, 13, 5, 5, 1, 3, 3, 2, 2, 1, 1, 1, 1}, false, false, 2);
  convolution<float, float>("float", {3, 4, 9, 9, 2, 3, 2, 2, 1, 1, 0, 1, 2}, false, false, 2);
  convolution<float, float>("float", {2, 12, 5, 5, 1, 3, 3, 1, 1, 1, 1, 1, 1}, true, false, 2);
  convolution<float, float>("float", {1, 1, 1, 40, 1, 1, 5, 1, 2, 0, 2, 1, 3}, false, false, 1);
  convolution<float, float>("float", {2, 3, 8, 8, 1, 5, 5, 1, 1, 2, 2, 1, 1}, false, true, 2);
  convolution<float, float>("float", {2, 6, 8, 8, 6, 3, 3, 1, 1, 4, 4, 1, 1}, true, true, 2);
  convolution<BFloat16, float>("bfloat16", {2, 3, 8, 8, 1, 5, 5, 1, 1, 2, 2, 1, 1}, false, false,
                               2);
  convolution<BFloat16, float>("bfloat16", {2, 3, 8, 8, 3, 3, 3, 1, 1, 2, 2, 1, 1}, false, false,
                               2);
  convolution<Float16, float>("float16", {2, 12, 4, 4, 1, 3, 3, 1, 1, 1, 1, 1, 1}, true, false, 2);
  convolution<Float16, float>("float16", {2, 2, 4, 4, 1, 3, 3, 1, 1, 1, 1, 1, 1}, true, false, 2);
  convolution<double, double>("double", {2, 8, 6, 5, 2, 3, 3, 2, 2, 1, 1, 1, 1}, false, false, 2);
}

void check_conv_few_channels(bool few) {
  // Every number of channels and kernel, with rows that are multiples of 16 bytes and others.
  convolution<float, float>("float", {2, 3, 6, 8, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 1);
  if (few) return;
  for (const int64_t channels : {1, 2, 3}) {
    for (const int64_t k : {3, 5, 7}) {
      for (const int64_t width : {int64_t{20}, 2 * k + 1}) {
        const int64_t padding = k / 2;
        convolution<float, float>(
            "float", {2, channels, 2 * k, width, 1, k, k, 1, 1, padding, padding, 1, 1}, false,
            false, 1);
      }
    }
  }
  // Rows in several tiles, several blocks, samples that share a block's strips, no padding and as
  // much as the kernel reaches, other types and strides, an image that begins anywhere.
  convolution<float, float>("float", {3, 1, 40, 12, 1, 3, 3, 1, 1, 0, 0, 1, 1}, false, false, 4);
  convolution<float, float>("float", {2, 1, 40, 36, 1, 5, 5, 1, 1, 4, 4, 1, 1}, false, false, 1);
  convolution<float, float>("float", {19, 1, 7, 8, 1, 3, 3, 1, 1, 0, 0, 1, 1}, false, false, 1);
  convolution<float, float>("float", {70, 2, 6, 7, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 2);
  convolution<float, float>("float", {2, 3, 9, 8, 1, 3, 3, 1, 1, 1, 1, 1, 1}, true, false, 2);
  convolution<BFloat16, float>("bfloat16", {2, 3, 9, 8, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false,
                               2);
  convolution<Float16, float>("float16", {2, 2, 9, 7, 1, 3, 3, 1, 1, 2, 2, 1, 1}, true, false, 2);
}

void check_conv_lags(bool few) {
  convolution<float, float>("float", {2, 3, 7, 6, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 1,
                            true);
  if (few) return;
  // No padding, more than an entry's reach of it, dilation, groups, a line, many splits.
  convolution<float, float>("float", {2, 5, 6, 9, 1, 3, 2, 1, 1, 0, 0, 1, 1}, true, false, 2, true);
  convolution<float, float>("float", {3, 4, 5, 4, 2, 3, 3, 1, 1, 3, 4, 1, 1}, false, false, 2,
                            true);
  convolution<float, float>("float", {2, 4, 9, 8, 1, 3, 3, 1, 1, 2, 1, 2, 3}, false, false, 2,
                            true);
  convolution<float, float>("float", {2, 70, 4, 4, 2, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 2,
                            true);
  convolution<float, float>("float", {1, 2, 1, 40, 1, 1, 5, 1, 1, 0, 2, 1, 1}, false, false, 1,
                            true);
  convolution<float, float>("float", {9, 2, 12, 12, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 20,
                            true);
  convolution<float, float>("float", {2, 3, 3, 3, 1, 5, 5, 1, 1, 2, 2, 1, 1}, false, true, 2, true);
  convolution<BFloat16, float>("bfloat16", {2, 6, 5, 6, 2, 3, 3, 1, 1, 1, 1, 1, 1}, true, false, 2,
                               true);
  convolution<Float16, float>("float16", {2, 6, 5, 6, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 2,
                              true);
  // Channels enough for whole images in 16-bit parts: channels last, groups, more rows than a sum.
  convolution<float, float>("float", {2, 33, 5, 4, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 2,
                            true);
  convolution<float, float>("float", {2, 72, 4, 4, 2, 3, 2, 1, 1, 1, 0, 1, 1}, true, false, 2,
                            true);
  convolution<BFloat16, float>("bfloat16", {3, 34, 4, 4, 1, 3, 3, 1, 1, 1, 1, 1, 1}, true, false, 2,
                               true);
  convolution<Float16, float>("float16", {2, 32, 4, 5, 1, 3, 3, 1, 1, 0, 0, 1, 1}, false, false, 2,
                              true);
  // Channels of two shifts fill a tile.
  convolution<float, float>("float", {2, 64, 3, 4, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 2,
                            true);
  convolution<BFloat16, float>("bfloat16", {1, 60, 4, 3, 1, 2, 3, 1, 1, 1, 1, 1, 1}, true, false, 2,
                               true);
  // The same with so much padding that there are no borders.
  convolution<BFloat16, float>("bfloat16", {1, 64, 4, 5, 1, 3, 3, 1, 1, 2, 2, 1, 1}, false, false,
                               2, true);
  // Every channel's largest value, in planes that are read in fours, one by one or row by row, in
  // pieces, and in samples that share a part; channels last.
  convolution<float, float>("float", {1, 33, 36, 40, 1, 1, 3, 1, 1, 0, 1, 1, 1}, false, false, 40,
                            true, {0, 0, true});
  convolution<float, float>("float", {9, 32, 3, 5, 1, 3, 1, 1, 1, 1, 0, 1, 1}, false, false, 1,
                            true, {1, 0, true});
  convolution<float, float>("float", {3, 32, 6, 7, 1, 1, 3, 1, 1, 0, 1, 1, 1}, false, false, 2,
                            true, {0, 3, true});
  convolution<float, float>("float", {2, 66, 19, 15, 2, 1, 2, 1, 1, 0, 0, 1, 1}, true, false, 40,
                            true, {0, 0, true});
  convolution<float, float>("float", {7, 40, 3, 5, 1, 3, 1, 1, 1, 1, 0, 1, 1}, true, false, 1, true,
                            {1, 5, true});
  not_a_number_in_lags(std::numeric_limits<float>::infinity());
  not_a_number_in_lags(std::numeric_limits<float>::quiet_NaN());
  // More products than a launch takes; more entries of the kernel than a block assembles.
  convolution<BFloat16, float>("bfloat16", {2, 128, 4, 4, 4, 3, 5, 1, 1, 1, 2, 1, 1}, false, false,
                               2, true);
  convolution<float, float>("float", {2, 9, 5, 6, 1, 7, 5, 1, 1, 2, 1, 1, 1}, false, false, 2,
                            true);
  // Other devices.
  emulation::device().capability = 80;
  convolution<float, float>("float", {2, 33, 5, 4, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 2,
                            true);
  emulation::device().capability = emulation::Properties().capability;
  ConvInputCovariance<float, float> layer{};
  layer.samples = 64, layer.height = layer.width = layer.out_h = layer.out_w = 32;
  layer.kernel_h = layer.kernel_w = 3, layer.padding_h = layer.padding_w = 1;
  layer.stride_h = layer.stride_w = layer.dilation_h = layer.dilation_w = 1;
  layer.group_channels = 64, layer.sum.groups = 1, layer.sum.order = 9 * 64;
  const bool pays = ConvLags<float>{layer}.pays();
  layer.stride_w = 2;
  report("conv_lags pay with stride 1", pays && !ConvLags<float>{layer}.pays() ? 0 : 1, 0);
  convolution<float, float>("float", {2, 16, 8, 8, 1, 3, 3, 1, 1, 1, 1, 1, 1}, false, false, 2);
}

void check_output_hessian(bool few) {
  output<float>("float", 7, 10, 20, 1, false, false, 2);
  if (few) return;
  output<float>("float", 1, 2, 1, 1, false, false, 1);
  // Rows that are copied: whole samples fill a tile or do not, splits, both sizes of tiles.
  output<float>("float", 1, 2, 4, 1, false, false, 1);
  output<float>("float", 12, 32, 68, 1, false, false, 4);
  output<float>("float", 150, 10, 12, 1, false, false, 4);
  output<float>("float", 15, 3, 128, 1, false, false, 1);
  output<float>("float", 9, 17, 124, 1, false, true, 1);
  output<float>("float", 6, 7, 41, 1, false, true, 2);
  output<float>("float", 12, 32, 65, 1, false, false, 4);
  output<float>("float", 30, 3, 130, 1, false, false, 1);
  output<float>("float", 5, 40, 70, 1, false, false, 2);
  output<float>("float", 4, 50, 110, 3, true, false, 2);
  output<float>("float", 7, 40, 30, 1, false, false, 2);
  output<float>("float", 4, 5, 9, 11, true, false, 2);
  output<float>("float", 4, 5, 110, 6, false, true, 2);
  output<float>("float", 4, 33, 40, 2, false, true, 2);
  output<float>("float", 4, 33, 100, 2, false, true, 2);
  output<float>("float", 6, 7, 132, 1, false, true, 2);
  // Too many outputs for kernels of their own; both sizes of tiles.
  for (const bool tf32 : {false, true}) {
    output<float>("float", 15, 3, 268, 1, false, tf32, 2);
    output<float>("float", 15, 3, 384, 1, false, tf32, 1);
  }
  // Centred into 16-bit parts.
  output<float>("float", 9, 4, 268, 1, false, false, 2, true);
  output<float>("float", 3, 33, 259, 1, false, false, 2, true);
  // A device with less shared memory takes smaller tiles.
  emulation::device().most_shared = 99 << 10;
  output<float>("float", 15, 3, 128, 1, false, false, 1);
  emulation::device().most_shared = emulation::Properties().most_shared;
  output<double>("double", 40, 10, 70, 2, true, false, 2);
  output<double>("double", 6, 35, 30, 1, false, false, 2);
}

void check_mirror(bool few) {
  mirrored<float>(2, 40, false);
  if (few) return;
  mirrored<float>(1, 1, false);
  mirrored<float>(3, 65, true);
  mirrored<double>(1, 64, true);
  mirrored<double>(2, 33, false);
}

}  // namespace hesskern::cuda::check
