// Input covariance of a 1 x 1 convolution with few channels per group: dot products of whole
// channels, straight from the images. With a stride the visited pixels are gathered first.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/blas/dot_tile.h"
#include "cpu/scratch.h"
#include "paths.h"

namespace hesskern::cpu {

namespace {

// Multiply-adds that are worth a thread.
constexpr int64_t kThreadWork = 1 << 17;
// Pixels below which samples are put together first.
constexpr int64_t kShort = 1024;
// Independent sums of one array's squares: as many as hide the latency of an addition.
constexpr int kSquares = 8;

// The pixels of one axis that windows of one pixel see: first, first + step, ...
struct VisitedAxis {
  int64_t first, step, count;

  VisitedAxis(int64_t size, int64_t stride, int64_t padding, int64_t out) {
    const int64_t begin = (padding + stride - 1) / stride;
    const int64_t end = std::min(out, (size + padding + stride - 1) / stride);
    first = begin * stride - padding;
    step = stride;
    count = std::max<int64_t>(end - begin, 0);
  }
};

// sum of squares of K elements, K a multiple of the vector.
template <class T, class Isa>
HESSKERN_FORCE_INLINE T square_sum(int64_t K, const T* x) {
  using V = Vector<T, Isa>;
  constexpr int L = kLanes<T, Isa>;
  V sum[kSquares];
  HESSKERN_UNROLL
  for (int i = 0; i < kSquares; ++i) sum[i] = V{};
  int64_t k = 0;
  for (; k + kSquares * L <= K; k += kSquares * L) {
    HESSKERN_UNROLL
    for (int i = 0; i < kSquares; ++i) {
      V v;
      load<T, Isa>(v, x + k + i * L);
      sum[i] += v * v;
    }
  }
  for (; k < K; k += L) {
    V v;
    load<T, Isa>(v, x + k);
    sum[0] += v * v;
  }
  HESSKERN_UNROLL
  for (int i = 1; i < kSquares; ++i) sum[0] += sum[i];
  T lanes[L], total = 0;
  store<T, Isa>(lanes, sum[0]);
  for (int i = 0; i < L; ++i) total += lanes[i];
  return total;
}

// sums [C, C], upper triangle += dot products of arrays of K elements, K whole vectors.
template <class T, class Isa>
HESSKERN_FORCE_INLINE void add_products(double* sums, int64_t channels, const T* const* arrays,
                                        int64_t offset, int64_t K) {
  constexpr int R = Isa::kDotRows, N = Isa::kDotColumns;
  if (channels == 1) {
    sums[0] += square_sum<T, Isa>(K, arrays[0] + offset);
    return;
  }
  for (int64_t row = 0; row < channels; row += R) {
    const int64_t rows = std::min<int64_t>(R, channels - row);
    const T* left[R];
    for (int64_t i = 0; i < R; ++i) left[i] = arrays[row + std::min(i, rows - 1)] + offset;
    for (int64_t column = row; column < channels; column += N) {
      const int64_t columns = std::min<int64_t>(N, channels - column);
      const T* right[N];
      for (int64_t j = 0; j < N; ++j) {
        right[j] = arrays[column + std::min(j, columns - 1)] + offset;
      }
      T products[R * N];
      if (rows > 2) {
        dot_tile<T, Isa, R, N>(K, left, right, products);
      } else {
        dot_tile<T, Isa, 2, N>(K, left, right, products);
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = std::max<int64_t>(row + i - column, 0); j < columns; ++j) {
          sums[(row + i) * channels + column + j] += products[i * N + j];
        }
      }
    }
  }
}

template <class T>
struct Pointwise {
  const T* x;
  int64_t samples, groups, channels;
  int64_t sample_stride, channel_stride, row_stride;
  VisitedAxis h, w;

  int64_t pixels() const { return h.count * w.count; }
  // All pixels of a channel are one run of memory, long enough to be multiplied where it lies.
  bool direct() const {
    return w.step == 1 && h.step == 1 && row_stride == w.count && pixels() >= kShort;
  }

  // to [pixels] := the visited pixels of a channel
  T* gather(T* to, const T* channel) const {
    for (int64_t i = 0; i < h.count; ++i) {
      const T* row = channel + (h.first + i * h.step) * row_stride + w.first;
      if (w.step == 1) {
        to = std::copy_n(row, w.count, to);
      } else {
        for (int64_t j = 0; j < w.count; ++j) *to++ = row[j * w.step];
      }
    }
    return to;
  }

  // sums [g, C, C] += products of samples [begin, end)
  void accumulate(double* sums, int64_t begin, int64_t end) const {
    with_simd([&](auto isa) HESSKERN_INLINE {
      using Isa = decltype(isa);
      constexpr int64_t L = kLanes<T, Isa>;
      // Samples whose pixels are gathered one after another, so that a sum is worth its reduction.
      const int64_t size = pixels();
      const int64_t batch = direct() ? 1 : std::clamp<int64_t>(kRun / size, 1, end - begin);
      const int64_t stride = direct() ? L : (batch * size + L - 1) / L * L;
      const Scratch<T> gathered(channels * stride);
      std::vector<const T*> arrays(static_cast<size_t>(channels)), rest(arrays.size());
      for (int64_t c = 0; c < channels; ++c) rest[c] = gathered.data() + c * stride;
      for (int64_t n = begin; n < end; n += batch) {
        const int64_t count = std::min(batch, end - n);
        const int64_t body = direct() ? size / L * L : 0;
        const int64_t length = (count * size - body + L - 1) / L * L;
        for (int64_t g = 0; g < groups; ++g) {
          double* group_sums = sums + g * channels * channels;
          for (int64_t c = 0; c < channels; ++c) {
            const T* channel = x + n * sample_stride + (g * channels + c) * channel_stride;
            T *to = gathered.data() + c * stride, *last = to + length;
            if (direct()) {
              arrays[c] = channel;
              to = std::copy(channel + body, channel + size, to);
            } else {
              for (int64_t i = 0; i < count; ++i) to = gather(to, channel + i * sample_stride);
            }
            std::fill(to, last, T(0));
          }
          for (int64_t from = 0; from < body; from += kRun) {
            add_products<T, Isa>(group_sums, channels, arrays.data(), from,
                                 std::min(kRun, body - from));
          }
          for (int64_t from = 0; from < length; from += kRun) {
            add_products<T, Isa>(group_sums, channels, rest.data(), from,
                                 std::min(kRun, length - from));
          }
        }
      }
    });
  }

  // sums [g, C, C] of all samples; threads take samples, and their sums are added in order.
  std::vector<double> run() const {
    const int64_t size = groups * channels * channels;
    const int64_t work = samples * groups * channels * (channels + 1) / 2 * pixels();
    const int64_t threads =
        std::clamp<int64_t>(std::min(work / kThreadWork, samples), 1, at::get_num_threads());
    std::vector<double> sums(static_cast<size_t>(threads * size), 0.0);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        accumulate(sums.data() + thread * size, samples * thread / threads,
                   samples * (thread + 1) / threads);
      }
    });
    for (int64_t i = size; i < threads * size; ++i) sums[i % size] += sums[i];
    return sums;
  }
};

}  // namespace

bool pointwise_fits(const ConvCall& call) {
  constexpr int64_t kMostChannels = 16;
  const at::Tensor& x = call.images;
  return call.geometry.taps() == 1 && call.group_channels() <= kMostChannels &&
         (x.stride(3) == 1 || x.size(3) == 1);
}

namespace {

// x [N, C, H, W] of acc's dtype
void add_images(const ConvCall& call, const at::Tensor& x) {
  const ConvGeometry& g = call.geometry;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_pointwise", [&] {
    const Pointwise<scalar_t> pointwise{x.const_data_ptr<scalar_t>(),
                                        x.size(0),
                                        g.groups,
                                        call.group_channels(),
                                        x.stride(0),
                                        x.stride(1),
                                        x.stride(2),
                                        {x.size(2), g.stride_h, g.padding_h, g.out_h},
                                        {x.size(3), g.stride_w, g.padding_w, g.out_w}};
    if (pointwise.pixels() == 0) return;
    const std::vector<double> sums = pointwise.run();
    const int64_t channels = pointwise.channels;
    for (int64_t group = 0; group < g.groups; ++group) {
      scalar_t* acc = call.acc.mutable_data_ptr<scalar_t>() + group * call.acc.stride(0);
      const double* from = sums.data() + group * channels * channels;
      for (int64_t i = 0; i < channels; ++i) {
        for (int64_t j = i; j < channels; ++j) {
          acc[i * call.acc.stride(1) + j] +=
              static_cast<scalar_t>(call.alpha * from[i * channels + j]);
        }
      }
    }
  });
}

}  // namespace

void conv_pointwise(const ConvCall& call) {
  const bool direct = call.images.scalar_type() == call.acc.scalar_type();
  const int64_t step = direct ? call.samples() : call.chunk_samples();
  for (int64_t start = 0; start < call.samples(); start += step) {
    add_images(call, call.chunk(start, std::min(step, call.samples() - start)));
  }
}

}  // namespace hesskern::cpu
