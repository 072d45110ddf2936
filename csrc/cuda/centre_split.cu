// Softmax samples to centred rows of two float16, which symmetric sums of many columns multiply.
//
// Since p sums to one, |sqrt(p_c) (g_c - mean)| <= 2 sqrt(p_c) (1 - p_c) max |g| < 0.77 max |g|
// over a column: the largest magnitudes of G's columns give the exponents, and values stay below
// 2^15. One read of G for them, then one read of G and one write of as many bytes: a lane has four
// columns and all classes of a sample in registers, or an eighth of them where eight warps share a
// sample. Bound by memory.
#include <algorithm>

#include "centre_split.h"
#include "core/elements.h"
#include "core/float16_parts.h"
#include "core/launch.h"
#include "core/warp.h"

namespace hesskern::cuda {

namespace {

constexpr int kWarps = kThreads / 32;
// Of a block: four for every lane.
constexpr int kColumns = 128;

// Four of a row's columns from `column` on, zeros past its end. Aligned: rows begin and end at
// multiples of 16 bytes.
template <bool Aligned>
__device__ inline Four<float> load_columns(const float* row, int column, int end) {
  Four<float> four{};
  if constexpr (Aligned) {
    if (column < end) read_once(four.value, row + column);
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (column + q < end) four.value[q] = row[column + q];
    }
  }
  return four;
}

// most [blocks, pitch]: bits of the largest magnitudes of every column over a block's rows; bits
// are ordered as magnitudes are, infinities and NaN last.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads) column_most_kernel(CentreSplit call, uint32_t* most) {
  __shared__ uint32_t shared[kWarps][kColumns];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first = static_cast<int>(blockIdx.x) * kColumns, column = first + 4 * lane;
  const int outputs = static_cast<int>(call.outputs), classes = static_cast<int>(call.classes);
  uint32_t bits[4] = {0, 0, 0, 0};
  for (int64_t sample = static_cast<int64_t>(blockIdx.y) * kWarps + warp; sample < call.samples;
       sample += static_cast<int64_t>(gridDim.y) * kWarps) {
    const float* const rows = call.jacobian + sample * call.sample_stride;
#pragma unroll 4
    for (int c = 0; c < classes; ++c) {
      const Four<float> v = load_columns<Aligned>(rows + c * call.class_stride, column, outputs);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint32_t other = bits_of(v.value[q]) & 0x7fffffffu;
        bits[q] = other > bits[q] ? other : bits[q];
      }
    }
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) shared[warp][4 * lane + q] = bits[q];
  __syncthreads();
  if (thread >= kColumns || first + thread >= call.pitch) return;
  uint32_t largest = 0;
  for (int w = 0; w < kWarps; ++w) {
    largest = shared[w][thread] > largest ? shared[w][thread] : largest;
  }
  most[blockIdx.y * call.pitch + first + thread] = largest;
}

// The exponent under which the largest magnitude of a column is in [2^14, 2^15); 0 of zeros and of
// what is no number.
__global__ void __launch_bounds__(kThreads)
    exponent_kernel(const uint32_t* most, int64_t blocks, int64_t pitch, int* exponents) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= pitch) return;
  uint32_t bits = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint32_t other = most[block * pitch + column];
    bits = other > bits ? other : bits;
  }
  exponents[column] = packed_exponent(bits, 0);
}

// Share warps take a sample, with Rows of its classes each.
template <int Rows, int Share, bool Aligned>
__global__ void __launch_bounds__(kThreads) centre_split_kernel(CentreSplit call) {
  __shared__ Four<float> sums[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int member = warp % Share, classes = static_cast<int>(call.classes);
  const int outputs = static_cast<int>(call.outputs);
  const int column = static_cast<int>(blockIdx.y) * kColumns + 4 * lane;
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * (kWarps / Share) + warp / Share;
  const bool inside = sample < call.samples;
  // Scaled at once: means of the smallest numbers would lose digits.
  int exponents[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) exponents[q] = column < call.pitch ? call.exponents[column + q] : 0;
  Four<float> v[Rows], mean{};
  float weight[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const int c = r * Share + member;
    v[r] = Four<float>{};
    weight[r] = 0.0f;
    if (inside && c < classes) {
      const float* row = call.jacobian + sample * call.sample_stride + c * call.class_stride;
      v[r] = load_columns<Aligned>(row, column, outputs);
      weight[r] = call.probabilities[sample * classes + c];
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      v[r].value[q] = times_power(v[r].value[q], exponents[q]);
      mean.value[q] += weight[r] * v[r].value[q];
    }
  }
  if constexpr (Share > 1) {
    sums[warp][lane] = mean;
    __syncthreads();
    mean = Four<float>{};
#pragma unroll
    for (int other = 0; other < Share; ++other) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        mean.value[q] += sums[warp / Share * Share + other][lane].value[q];
      }
    }
  }
  if (!inside || column >= call.pitch) return;
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const int c = r * Share + member;
    if (c >= classes) continue;
    const float root = square_root(weight[r]);
    float scaled[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      scaled[q] = root * (v[r].value[q] - mean.value[q]);
    }
    struct alignas(8) Pairs {
      uint32_t word[2];
    } high, low;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      split_pair(scaled[2 * half], scaled[2 * half + 1], high.word[half], low.word[half]);
    }
    uint16_t* const to = call.parts + (sample * classes + c) * call.pitch + column;
    *reinterpret_cast<Pairs*>(to) = high;
    *reinterpret_cast<Pairs*>(to + call.part_step) = low;
  }
}

template <bool Aligned>
cudaError_t run_rows(const CentreSplit& call, cudaStream_t stream) {
  const auto across = static_cast<unsigned>(ceil_div(call.pitch, kColumns));
  // Blocks that fill the device; the parts, which come later, have room for their findings.
  const int64_t wanted = ceil_div(8 * current_device().processors, across);
  const int64_t blocks = std::min({ceil_div(call.samples, kWarps), wanted, int64_t{65535}});
  auto* const most = reinterpret_cast<uint32_t*>(call.parts);
  cudaError_t error =
      launch(column_most_kernel<Aligned>, dim3(across, static_cast<unsigned>(blocks)),
             dim3(kThreads), 0, stream, call, most);
  if (error != cudaSuccess) return error;
  error = launch(exponent_kernel, dim3(static_cast<unsigned>(ceil_div(call.pitch, kThreads))),
                 dim3(kThreads), 0, stream, most, blocks, call.pitch, call.exponents);
  if (error != cudaSuccess) return error;
  const auto start = [&](auto kernel, int share) {
    return launch(kernel,
                  dim3(static_cast<unsigned>(ceil_div(call.samples, kWarps / share)), across),
                  dim3(kThreads), 0, stream, call);
  };
  if (call.classes <= 4) return start(centre_split_kernel<4, 1, Aligned>, 1);
  if (call.classes <= 10) return start(centre_split_kernel<10, 1, Aligned>, 1);
  if (call.classes <= 64) return start(centre_split_kernel<8, kWarps, Aligned>, kWarps);
  if (call.classes <= 104) return start(centre_split_kernel<13, kWarps, Aligned>, kWarps);
  return start(centre_split_kernel<20, kWarps, Aligned>, kWarps);
}

}  // namespace

bool CentreSplit::fits() const {
  constexpr int64_t kMostClasses = 160, kMostColumns = int64_t{65535} * kColumns;
  return samples > 0 && classes > 0 && classes <= kMostClasses && outputs > 0 &&
         pitch <= kMostColumns;
}

cudaError_t CentreSplit::run(cudaStream_t stream) const {
  const bool aligned = is_aligned(jacobian, 16) && outputs % 4 == 0 &&
                       (samples == 1 || sample_stride % 4 == 0) &&
                       (classes == 1 || class_stride % 4 == 0);
  return aligned ? run_rows<true>(*this, stream) : run_rows<false>(*this, stream);
}

}  // namespace hesskern::cuda
