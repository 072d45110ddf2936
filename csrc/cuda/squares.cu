#include <algorithm>

#include "core/elements.h"
#include "core/launch.h"
#include "squares.h"

namespace hesskern::cuda {

namespace {

// Rows whose squares go into one sum in T, which are added in double: float32 sums of many terms
// drift.
constexpr int64_t kLevel = 16;
// Blocks per multiprocessor that keep enough reads under way.
constexpr int64_t kResident = 8;

// Neighbours that a thread reads at once.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Piece {
  T value[kWidth];
};

// The sum of squares of rows [begin, end) of one piece.
template <typename T, int kWidth>
__device__ Piece<T, kWidth> sum_rows(const T* rows, int64_t size, int64_t begin, int64_t end) {
  double total[kWidth] = {};
  for (int64_t first = begin; first < end; first += kLevel) {
    const int64_t last = first + kLevel < end ? first + kLevel : end;
    Piece<T, kWidth> recent{};
#pragma unroll 4
    for (int64_t k = first; k < last; ++k) {
      const auto piece = *reinterpret_cast<const Piece<T, kWidth>*>(rows + k * size);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) recent.value[i] += piece.value[i] * piece.value[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total[i] += recent.value[i];
  }
  Piece<T, kWidth> rounded;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) rounded.value[i] = static_cast<T>(total[i]);
  return rounded;
}

// partial null: into sum; else into partial [gridDim.y, size], of share rows each.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    square_sum_kernel(SquareSum<T> call, int64_t share, T* partial) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = piece * kWidth;
  if (first >= call.size) return;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = begin + share < call.count ? begin + share : call.count;
  const auto total = sum_rows<T, kWidth>(call.rows + first, call.size, begin, end);
  if (partial != nullptr) {
    *reinterpret_cast<Piece<T, kWidth>*>(partial + blockIdx.y * call.size + first) = total;
    return;
  }
  auto& sum = *reinterpret_cast<Piece<T, kWidth>*>(call.sum + first);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.value[i] += total.value[i];
}

// sum += the parts, in their order
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(T* sum, const T* partial, int64_t parts, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += partial[part * size + i];
  sum[i] += static_cast<T>(total);
}

}  // namespace

template <typename T>
Work<T> SquareSum<T>::plan() const {
  const SquareSum call = *this;
  constexpr int kWidth = 16 / sizeof(T);
  const bool wide = size % kWidth == 0 && is_aligned(sum, 16) && is_aligned(rows, 16);
  const int64_t blocks = ceil_div(ceil_div(size, wide ? kWidth : 1), kThreads);
  const int64_t slots = kResident * current_device().processors;
  // As many parts as fill the device, of whole levels; a grid takes 65535.
  const int64_t wanted = std::clamp<int64_t>(slots / std::max<int64_t>(blocks, 1), 1,
                                             std::clamp<int64_t>(count / kLevel, 1, 65535));
  const int64_t share = std::max<int64_t>(ceil_div(count, wanted), 1);
  const int64_t parts = std::max<int64_t>(ceil_div(count, share), 1);
  return {parts > 1 ? parts * size : 0, [=](T* workspace, cudaStream_t stream) {
            if (call.size == 0 || call.count == 0) return cudaSuccess;
            const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
            const auto kernel = wide ? square_sum_kernel<T, kWidth> : square_sum_kernel<T, 1>;
            T* partial = parts > 1 ? workspace : nullptr;
            const cudaError_t error =
                launch(kernel, grid, dim3(kThreads), 0, stream, call, share, partial);
            if (error != cudaSuccess || parts == 1) return error;
            const dim3 pieces(static_cast<unsigned>(ceil_div(call.size, kThreads)));
            return launch(add_parts_kernel<T>, pieces, dim3(kThreads), 0, stream, call.sum,
                          static_cast<const T*>(partial), parts, call.size);
          }};
}

template struct SquareSum<float>;
template struct SquareSum<double>;

}  // namespace hesskern::cuda
