// Input covariance of a convolution: acc += alpha sum_n X_n X_n^T over unfolded samples X_n.
//
// Where lags pay, those of lags.cu; otherwise
// the kernel of input_covariance.cu over rows that are read from the image itself: row
// (n, oy, ox), column (channel, ky, kx). Nothing unfolded is written; neighbouring threads take
// neighbouring positions, and an image's values are read again for every offset from the caches.
// N P d^2 operations on one triangle (three times on tensor cores): bound by these.
#include <type_traits>

#include "conv_input_covariance.h"
#include "cuda/core/elements.h"
#include "cuda/core/stage.h"
#include "cuda/core/symmetric.h"
#include "few_channels.h"
#include "lags.h"

namespace hesskern::cuda {

namespace {

// Unfolded samples as rows (n, oy, ox) and columns (channel, ky, kx) of one group.
template <typename In, typename T>
struct Patches {
  using Value = In;
  ConvInputCovariance<In, T> call;

  struct Row {
    int64_t offset, y, x;
    bool inside;
  };
  using Column = Row;

  __device__ void select(int64_t group) {
    call.x += group * call.group_channels * call.channel_stride;
  }
  __device__ Row row(int64_t k) const {
    const int64_t line = k / call.out_w, n = line / call.out_h;
    return {n * call.sample_stride, line % call.out_h * call.stride_h - call.padding_h,
            k % call.out_w * call.stride_w - call.padding_w, n < call.samples};
  }
  __device__ Column column(int64_t i) const {
    const int64_t tap = i / call.kernel_w, channel = tap / call.kernel_h;
    return {channel * call.channel_stride, tap % call.kernel_h * call.dilation_h,
            i % call.kernel_w * call.dilation_w, channel < call.group_channels};
  }
  __device__ Value load(const Row& row, const Column& column) const {
    const int64_t y = row.y + column.y, x = row.x + column.x;
    const bool inside =
        row.inside && column.inside && y >= 0 && y < call.height && x >= 0 && x < call.width;
    if (!inside) return Value{};
    return call.x[row.offset + column.offset + y * call.row_stride + x * call.column_stride];
  }
};

constexpr int kDepth = 16;

}  // namespace

template <typename In, typename T>
Work<T> ConvInputCovariance<In, T>::plan() const {
  if constexpr (std::is_same_v<T, float>) {
    const ConvFewChannels<In> few{*this};
    if (few.fits()) return few.plan();
    const ConvLags<In> lags{*this};
    if (lags.pays()) return lags.plan();
  }
  return with_symmetric_tile<In, kDepth>(sum.order, tf32, [&](auto tag) {
    using Tile = typename decltype(tag)::Type;
    using Source = Patches<In, T>;
    return plan_update<Tile, Stage<Source, Tile::kRows, Tile::kDepth>, Order::kAlongK>(
        Source{*this}, true, samples * out_h * out_w, sum);
  });
}

template struct ConvInputCovariance<float, float>;
template struct ConvInputCovariance<BFloat16, float>;
template struct ConvInputCovariance<Float16, float>;
template struct ConvInputCovariance<double, double>;

}  // namespace hesskern::cuda
