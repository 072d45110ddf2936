// max_pool.cu on the CPU.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "checks.h"
#include "max_pool.h"

namespace hesskern::cuda::check {

namespace {

struct Window {
  int kernel, stride, padding, dilation;

  int reach() const { return dilation * (kernel - 1) + 1; }
  // As torch counts them: with ceil_mode no window begins behind the inputs and their padding.
  int outputs(int in, bool ceil_mode) const {
    const int room = in + 2 * padding - reach();
    int count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    if (ceil_mode && (count - 1) * stride >= in + padding) --count;
    return count;
  }
};

// How [N, H, W, r, C] or [N, H, W, C] lies in memory, with gaps behind lines of pixels and images.
enum class Format { kChannelsLast, kChannelsFirst };

struct Layout {
  ImageStrides strides;
  int64_t row, size;

  Layout(Format format, int64_t n, int64_t h, int64_t w, int64_t r, int64_t c, int64_t gap,
         int64_t image_gap = 0) {
    // [N, r, H, W, C] or [N, r, C, H, W].
    if (format == Format::kChannelsLast) {
      strides = {0, w * c + gap, c, 1};
      row = h * strides.y + image_gap;
    } else {
      strides = {0, w + gap, 1, h * (w + gap)};
      row = c * strides.channel + image_gap;
    }
    strides.sample = r * row;
    size = n * strides.sample;
  }
  int64_t at(int64_t n, int64_t y, int64_t x, int64_t i, int64_t c) const {
    return n * strides.sample + y * strides.y + x * strides.x + i * row + c * strides.channel;
  }
};

struct Case {
  int64_t samples, rows, channels;
  int height, width;
  Window window;
  Format out = Format::kChannelsLast, forward = Format::kChannelsFirst;
  bool relu = true, factor = false, ceil_mode = false;
  int64_t offset = 0;  // of gradients, in elements from a multiple of 16 bytes
  int64_t gap = 0;
  int processors = 2;
  int64_t image_gap = 0;
  bool bad = false;  // NaN and infinities among the gradients, indices out of range
};

template <typename T>
void pooled(const char* type, const Case& s) {
  multiprocessor_count_is(s.processors);
  const int64_t n = s.samples, r = s.rows, c = s.channels;
  const int h = s.height, w = s.width;
  const Window& window = s.window;
  const int ho = window.outputs(h, s.ceil_mode), wo = window.outputs(w, s.ceil_mode);
  const Layout out(s.out, n, h, w, r, c, s.gap, s.image_gap);
  const Layout grad(s.out, n, ho, wo, r, c, s.gap, s.image_gap);
  const Layout relu(s.forward, n, h, w, 1, c, 0), index(s.forward, n, ho, wo, 1, c, 0);
  const Layout factor(s.out, n, h, w, 1, c, 0);
  const Memory<T> results(relu.size), factors(factor.size);
  const Memory<int64_t> indices(index.size);
  const Memory<T> gradients(s.offset + grad.size), found(s.offset + out.size);
  const Memory<double> expected(out.size);
  for (int64_t i = 0; i < out.size; ++i) expected[i] = 0;
  for (int64_t i = 0; i < relu.size; ++i) {
    results[i] = static_cast<T>(std::fmax(normal(), 0.0));
  }
  for (int64_t i = 0; i < factor.size; ++i) factors[i] = static_cast<T>(normal());
  for (int64_t i = 0; i < grad.size; ++i) gradients[s.offset + i] = static_cast<T>(normal());

  for (int64_t b = 0; b < n; ++b) {
    for (int64_t k = 0; k < c; ++k) {
      for (int oy = 0; oy < ho; ++oy) {
        for (int ox = 0; ox < wo; ++ox) {
          // The first maximum, as torch finds it.
          double best = -std::numeric_limits<double>::infinity();
          int top = -1, left = -1;
          for (int ky = 0; ky < window.kernel; ++ky) {
            for (int kx = 0; kx < window.kernel; ++kx) {
              const int y = oy * window.stride - window.padding + ky * window.dilation;
              const int x = ox * window.stride - window.padding + kx * window.dilation;
              if (y < 0 || y >= h || x < 0 || x >= w) continue;
              const double value = results[relu.at(b, y, x, 0, k)];
              if (value > best) {
                best = value;
                top = y;
                left = x;
              }
            }
          }
          int64_t& place = indices[index.at(b, oy, ox, 0, k)];
          place = static_cast<int64_t>(top) * w + left;
          if (s.bad && (oy + ox) % 3 == 0) {
            place = oy % 2 == 0 ? -5 : static_cast<int64_t>(h) * w;
            continue;
          }
          if (s.bad && best == 0) {
            // Cut off whatever arrives.
            const int64_t some = s.offset + grad.at(b, oy, ox, 0, k);
            gradients[some] = static_cast<T>(k % 2 == 0 ? NAN : INFINITY);
          }
          if (s.relu && best <= 0) continue;
          for (int64_t i = 0; i < r; ++i) {
            const double scale = s.factor ? factors[factor.at(b, top, left, 0, k)] : 1.0;
            expected[out.at(b, top, left, i, k)] +=
                scale * gradients[s.offset + grad.at(b, oy, ox, i, k)];
          }
        }
      }
    }
  }
  const MaxPoolInputGradient<T> call{gradients.data() + s.offset,
                                     indices.data(),
                                     s.relu ? results.data() : nullptr,
                                     s.factor ? factors.data() : nullptr,
                                     found.data() + s.offset,
                                     n,
                                     r,
                                     c,
                                     {h, ho, window.reach(), window.stride, window.padding},
                                     {w, wo, window.reach(), window.stride, window.padding},
                                     grad.strides,
                                     index.strides,
                                     relu.strides,
                                     factor.strides,
                                     out.strides,
                                     grad.row,
                                     out.row};
  const Work<float> work = call.plan();
  const Memory<float> workspace(work.workspace);
  const bool ran = work.run(workspace.data(), nullptr) == cudaSuccess;
  // Every element is written, none behind or between them: there the NaN stays.
  std::vector<bool> ours(static_cast<size_t>(out.size));
  double worst = ran ? 0 : 1;
  for (int64_t b = 0; b < n; ++b) {
    for (int y = 0; y < h; ++y) {
      for (int x = 0; x < w; ++x) {
        for (int64_t i = 0; i < r; ++i) {
          for (int64_t k = 0; k < c; ++k) {
            const int64_t at = out.at(b, y, x, i, k);
            ours[static_cast<size_t>(at)] = true;
            const double value = found[s.offset + at];
            const double error = std::fabs(value - expected[at]) / (1 + std::fabs(expected[at]));
            worst = error <= worst ? worst : std::isfinite(error) ? error : 1e30;
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < s.offset; ++i) worst = std::isnan(double(found[i])) ? worst : 1e30;
  for (int64_t i = 0; i < out.size; ++i) {
    const bool kept = ours[static_cast<size_t>(i)] || std::isnan(double(found[s.offset + i]));
    worst = kept ? worst : 1e30;
  }
  const auto number = [](int64_t value) { return std::to_string(value); };
  const std::string name =
      std::string("max_pool ") + type + " [" + number(n) + ", " + number(r) + ", " + number(c) +
      ", " + number(h) + ", " + number(w) + "] by " + number(window.kernel) + "/" +
      number(window.stride) + "/" + number(window.padding) + "/" + number(window.dilation) +
      (s.out == Format::kChannelsLast ? " channels last" : "") +
      (s.forward == Format::kChannelsLast ? ", forward too" : "") + (s.relu ? " relu" : "") +
      (s.factor ? " factor" : "") + (s.ceil_mode ? " ceil" : "") +
      (s.offset != 0 ? " unaligned" : "") + (s.bad ? " bad" : "");
  report(name, worst, limit_of<T>());
}

}  // namespace

void check_max_pool(bool few) {
  constexpr Format kLast = Format::kChannelsLast, kFirst = Format::kChannelsFirst;
  const Window halves{2, 2, 0, 1}, overlapping{3, 2, 1, 1};
  pooled<float>("float", {2, 9, 36, 6, 8, halves});
  pooled<float>("float", {2, 3, 8, 7, 5, overlapping});
  if (few) return;
  for (const Format out : {kLast, kFirst}) {
    for (const Format forward : {kLast, kFirst}) {
      pooled<float>("float", {3, 9, 8, 8, 6, halves, out, forward});
      pooled<float>("float", {2, 5, 12, 9, 7, overlapping, out, forward, true, true});
      pooled<double>("double", {2, 4, 6, 5, 7, overlapping, out, forward, false, true, true});
    }
  }
  // Inputs in no window at the ends and in between; windows that stick out; every input a window.
  pooled<float>("float", {2, 2, 4, 7, 9, {2, 2, 0, 1}});
  pooled<float>("float", {2, 2, 4, 11, 8, {2, 3, 0, 1}, kLast, kLast});
  pooled<float>("float", {1, 10, 5, 7, 9, {2, 2, 0, 1}, kFirst, kFirst, true, false, true});
  pooled<float>("float", {1, 3, 4, 9, 11, {3, 1, 1, 2}, kLast, kFirst, false});
  pooled<float>("float", {1, 3, 4, 9, 12, {2, 4, 1, 3}, kLast, kFirst, false});
  pooled<float>("float", {2, 2, 4, 4, 4, {1, 1, 0, 1}});
  pooled<float>("float", {1, 2, 4, 6, 6, {5, 1, 2, 1}, kLast, kFirst, true, true});
  // Gradients that are no whole vectors; more channels than a tile; memory between pixels.
  pooled<float>("float", {2, 6, 7, 6, 6, halves});
  pooled<float>("float", {1, 5, 8, 6, 6, halves, kLast, kFirst, true, false, false, 1});
  pooled<float>("float", {1, 2, 68, 12, 14, halves, kLast, kFirst, true, true, false, 0, 4});
  pooled<float>("float", {1, 2, 8, 12, 14, halves, kLast, kFirst, true, true, false, 0, 3});
  pooled<float>("float", {3, 4, 8, 6, 6, halves, kLast, kFirst, true, false, false, 0, 0, 2, 1});
  pooled<float>("float", {2, 3, 3, 5, 6, overlapping, kFirst, kFirst, true, true, false, 2, 5});
  // Blocks with all rows, and with a few of them each.
  pooled<float>("float", {5, 13, 16, 16, 16, halves, kLast, kFirst, true, false, false, 0, 0, 1});
  pooled<float>("float", {1, 13, 4, 4, 4, halves, kLast, kFirst, true, false, false, 0, 0, 132});
  pooled<float>("float", {1, 1, 1, 2, 2, halves});
  pooled<double>("double", {1, 1, 1, 1, 1, {1, 1, 0, 1}, kFirst});
  pooled<float>("float", {0, 2, 4, 4, 4, halves});
  pooled<float>("float", {2, 0, 4, 4, 4, halves});
  pooled<float>("float",
                {2, 3, 8, 6, 6, halves, kLast, kFirst, true, false, false, 0, 0, 2, 0, true});
  pooled<double>(
      "double", {2, 3, 8, 6, 6, overlapping, kFirst, kFirst, true, false, false, 0, 0, 2, 0, true});
}

}  // namespace hesskern::cuda::check
