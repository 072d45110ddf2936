// Softmax samples to centred rows of two float16, which symmetric sums of many columns multiply.
//
// One read of G and one write of as many bytes: a lane has four columns and all classes of a sample
// in registers, or an eighth of them where eight warps share a sample. Columns' exponents are
// guessed from some samples, at most kSampledRows rows, and every column's largest scaled value is
// kept while the parts are written. What lies above float16's range, or so low that digits are
// lost, is written once more, by a kernel that else does nothing. Bound by memory.
//
// Of a guess: since p sums to one, |sqrt(p_c) (g_c - mean)| <= 2 sqrt(p_c) (1 - p_c) max |g|
// < 0.77 max |g|. Under the first exponent of a column, before its means are taken off, the largest
// sampled |g| is in [2^11, 2^12): no value of the sample goes above 2^12, and others may be twenty
// times as large. Where p says that all values are much smaller, a second exponent, after the
// means, brings the sample's bound to [2^8, 2^9). A column whose largest value is at least 2^4
// keeps what counts: lo loses less than 2^-29 of it. The second exponent alone is raised where that
// fails: g with p = 0 must not overflow.
#include <algorithm>
#include <type_traits>

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
// Of the sample that exponents are guessed from: rows at most, and a block.
constexpr int kSampledRows = 2048, kGuessThreads = 1024, kGuessColumns = 8;

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

// Of four columns: a value's mean is taken of values times 2^before, what is stored has 2^after
// besides.
struct Exponents {
  int before[4], after[4];

  __device__ Exponents(const CentreSplit& call, int column) : before{}, after{} {
    if (column >= call.pitch) return;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      before[q] = call.guesses[column + q];
      after[q] = call.guesses[call.pitch + column + q];
    }
  }

  // For what was found when the columns were written; whether one of them has to be written again.
  __device__ bool correct(const CentreSplit& call, int column) {
    constexpr uint32_t kLeast = 0x41800000u;  // 2^4
    constexpr uint32_t kEnd = 0x477fe000u;    // 65504
    bool changed = false;
    for (int q = 0; q < 4 && column < call.pitch; ++q) {
      const uint32_t largest = largest_values(call)[column + q];
      if (largest == 0 || (largest >= kLeast && largest < kEnd)) continue;
      const uint32_t numbers = largest_numbers(call)[column + q];
      if (largest < 0x7f800000u) {
        after[q] = normal(after[q] + packed_exponent(largest, 0));
      } else if (numbers != 0) {
        // Scaled values that were finite are below four times these numbers.
        before[q] = normal(packed_exponent(numbers, 2));
        after[q] = 0;
      }
      changed = true;
    }
    return changed;
  }

  // Bits of the largest magnitudes: of what was stored, [pitch], as float32; and of the samples'
  // numbers where that was infinite or NaN.
  __device__ static uint32_t* largest_values(const CentreSplit& call) {
    return reinterpret_cast<uint32_t*>(call.guesses) + 2 * call.pitch;
  }
  __device__ static uint32_t* largest_numbers(const CentreSplit& call) {
    return largest_values(call) + call.pitch;
  }

  // The nearest e whose 2^e is a normal number, and so is 2^-e.
  __device__ static int normal(int e) { return e < -126 ? -126 : e > 126 ? 126 : e; }
};

__device__ inline float power_of_two(int normal) {
  return float_of(static_cast<uint32_t>(normal + 127) << 23);
}

__device__ inline uint32_t magnitude(float value) {
  return bits_of(value) & 0x7fffffffu;
}

// Exponents of eight columns a block from so many samples, evenly taken.
__global__ void __launch_bounds__(kGuessThreads) guess_kernel(CentreSplit call, int sampled) {
  constexpr int kDown = kGuessThreads / kGuessColumns, kPitch = kDown + 4;
  constexpr int kRoomOfNumbers = 3, kRoomOfValues = 6;
  __shared__ float weights[kSampledRows];
  __shared__ uint32_t all[2][kGuessColumns][kPitch], found[2][kGuessColumns];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int classes = static_cast<int>(call.classes);
  const auto sample_of = [&](int s) { return s * call.samples / sampled; };
  // Values are at most twice as large as a sample's numbers times its weight.
  for (int s = thread; s < sampled; s += kGuessThreads) {
    const float* const p = call.probabilities + sample_of(s) * classes;
    float weight = 0.0f;
#pragma unroll 4
    for (int c = 0; c < classes; ++c) weight = fmaxf(weight, square_root(p[c]) * (1.0f - p[c]));
    weights[s] = weight;
  }
  __syncthreads();
  const int own = thread % kGuessColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kGuessColumns + own;
  uint32_t numbers = 0, values = 0;
  if (column < call.outputs) {
#pragma unroll 8
    for (int row = thread / kGuessColumns; row < sampled * classes; row += kDown) {
      const int s = row / classes;
      const float g = call.jacobian[sample_of(s) * call.sample_stride +
                                    row % classes * call.class_stride + column];
      const uint32_t number = magnitude(g), value = magnitude(weights[s] * g);
      numbers = number > numbers ? number : numbers;
      values = value > values ? value : values;
    }
  }
  all[0][own][thread / kGuessColumns] = numbers;
  all[1][own][thread / kGuessColumns] = values;
  __syncthreads();
  if (warp < 2 * kGuessColumns) {
    const uint32_t* const line = all[warp / kGuessColumns][warp % kGuessColumns];
    uint32_t most = 0;
    for (int i = lane; i < kDown; i += 32) most = line[i] > most ? line[i] : most;
    most = warp_max(most);
    if (lane == 0) found[warp / kGuessColumns][warp % kGuessColumns] = most;
  }
  __syncthreads();
  if (thread >= kGuessColumns || column >= call.pitch) return;
  numbers = found[0][own];
  values = found[1][own];
  // Of a column that is zero in the sample its neighbours say most.
  for (int i = 0; i < kGuessColumns && found[0][own] == 0; ++i) {
    numbers = found[0][i] > numbers ? found[0][i] : numbers;
    values = found[1][i] > values ? found[1][i] : values;
  }
  int before = 0, after = 0;
  if (numbers != 0) before = Exponents::normal(packed_exponent(numbers, kRoomOfNumbers));
  // Nothing that may come vanishes under another column's exponent.
  if (found[0][own] == 0 && before < 0) before = 0;
  if (values != 0 && values < 0x7f800000u) {
    after = Exponents::normal(packed_exponent(values, kRoomOfValues) - before);
  }
  call.guesses[column] = before;
  call.guesses[call.pitch + column] = after > 0 ? after : 0;
  Exponents::largest_values(call)[column] = 0;
  Exponents::largest_numbers(call)[column] = 0;
}

// What a lane found of its four columns, where it was infinite or NaN (seldom): the largest numbers
// of the sample. Of all classes, since the mean is theirs.
__device__ inline void keep_numbers(const CentreSplit& call, const float* rows, int column,
                                    const uint32_t (&most)[4]) {
  const auto infinite = [](uint32_t bits) { return bits >= 0x7f800000u; };
  if (!infinite(most[0]) && !infinite(most[1]) && !infinite(most[2]) && !infinite(most[3])) return;
#pragma unroll 1
  for (int q = 0; q < 4 && column + q < call.outputs; ++q) {
    uint32_t numbers = 0;
#pragma unroll 1
    for (int64_t c = 0; c < call.classes; ++c) {
      const uint32_t number = magnitude(rows[c * call.class_stride + column + q]);
      numbers = number > numbers ? number : numbers;
    }
    raise_to(Exponents::largest_numbers(call) + column + q, numbers);
  }
}

// What the block's lanes found of their four columns each.
__device__ inline void keep_largest(const CentreSplit& call, const uint32_t (&most)[4]) {
  __shared__ uint32_t largest[kWarps][kColumns];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int q = 0; q < 4; ++q) largest[warp][4 * lane + q] = most[q];
  __syncthreads();
  const int column = static_cast<int>(blockIdx.y) * kColumns + thread;
  if (thread >= kColumns || column >= call.pitch) return;
  uint32_t of_block = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    of_block = largest[w][thread] > of_block ? largest[w][thread] : of_block;
  }
  raise_to(Exponents::largest_values(call) + column, of_block);
}

// Share warps take a sample, with Rows of its classes each. Again: only columns whose guess did not
// do, in blocks that take several samples one after another; and all exponents are written.
template <int Rows, int Share, bool Aligned, bool Again>
__global__ void __launch_bounds__(kThreads) centre_split_kernel(CentreSplit call) {
  constexpr int kSamples = kWarps / Share;
  __shared__ Four<float> sums[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int member = warp % Share, classes = static_cast<int>(call.classes);
  const int outputs = static_cast<int>(call.outputs);
  const int column = static_cast<int>(blockIdx.y) * kColumns + 4 * lane;
  Exponents exponents(call, column);
  if constexpr (Again) {
    const bool changed = exponents.correct(call, column);
    if (blockIdx.x == 0 && warp == 0 && column < call.pitch) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        call.exponents[column + q] = exponents.before[q] + exponents.after[q];
      }
    }
    // All warps have the same columns.
    if (warp_or(changed ? 1 : 0) == 0) return;
  }
  float before[4], after[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    before[q] = power_of_two(exponents.before[q]);
    after[q] = power_of_two(exponents.after[q]);
  }
  uint32_t most[4] = {0, 0, 0, 0};
  int64_t group = blockIdx.x;
  do {
    const int64_t sample = group * kSamples + warp / Share;
    const bool inside = sample < call.samples;
    const float* const rows = call.jacobian + (inside ? sample : 0) * call.sample_stride;
    Four<float> v[Rows], mean{};
    float weight[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int c = r * Share + member;
      v[r] = Four<float>{};
      weight[r] = 0.0f;
      if (inside && c < classes) {
        v[r] = load_columns<Aligned>(rows + c * call.class_stride, column, outputs);
        weight[r] = call.probabilities[sample * classes + c];
      }
    }
    // Scaled at once: means of the smallest numbers would lose digits.
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        v[r].value[q] *= before[q];
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
      if constexpr (Again) __syncthreads();
    }
    const bool stored = inside && column < call.pitch;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int c = r * Share + member;
      if (!stored || c >= classes) continue;
      const float root = square_root(weight[r]);
      float scaled[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        scaled[q] = root * (v[r].value[q] - mean.value[q]) * after[q];
        const uint32_t size = magnitude(scaled[q]);
        most[q] = size > most[q] ? size : most[q];
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
    if constexpr (!Again) {
      if (stored) keep_numbers(call, rows, column, most);
    }
    group += gridDim.x;
  } while (Again && group * kSamples < call.samples);
  if constexpr (!Again) keep_largest(call, most);
}

template <bool Aligned>
cudaError_t run_rows(const CentreSplit& call, cudaStream_t stream) {
  const int64_t sampled = std::min(call.samples, std::max<int64_t>(kSampledRows / call.classes, 1));
  cudaError_t error =
      launch(guess_kernel, dim3(static_cast<unsigned>(ceil_div(call.pitch, kGuessColumns))),
             dim3(kGuessThreads), 0, stream, call, static_cast<int>(sampled));
  if (error != cudaSuccess) return error;
  const auto across = static_cast<unsigned>(ceil_div(call.pitch, kColumns));
  const auto start = [&](auto rows, auto share) {
    constexpr int kRows = decltype(rows)::value, kShare = decltype(share)::value;
    const int64_t blocks = ceil_div(call.samples, kWarps / kShare);
    // Blocks that find nothing to do should be few.
    const int64_t few = std::min(blocks, ceil_div(4 * current_device().processors, across));
    error = launch(centre_split_kernel<kRows, kShare, Aligned, false>,
                   dim3(static_cast<unsigned>(blocks), across), dim3(kThreads), 0, stream, call);
    if (error != cudaSuccess) return error;
    return launch(centre_split_kernel<kRows, kShare, false, true>,
                  dim3(static_cast<unsigned>(few), across), dim3(kThreads), 0, stream, call);
  };
  constexpr std::integral_constant<int, 1> kAlone;
  constexpr std::integral_constant<int, kWarps> kTogether;
  if (call.classes <= 4) return start(std::integral_constant<int, 4>(), kAlone);
  if (call.classes <= 10) return start(std::integral_constant<int, 10>(), kAlone);
  if (call.classes <= 64) return start(std::integral_constant<int, 8>(), kTogether);
  if (call.classes <= 104) return start(std::integral_constant<int, 13>(), kTogether);
  return start(std::integral_constant<int, 20>(), kTogether);
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
