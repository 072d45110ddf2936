// Bound by memory: 4 bytes an element read, 4 written. Rows of up to 6,144 elements that lie along
// k stay in registers between the search for the largest and the scaling, others are read twice,
// the second time from a cache for the most part. Of many rows a block takes several, as to find
// its matrix among many costs as much as a row.
#include <algorithm>

#include "device.h"
#include "launch.h"
#include "pack_along_k.h"
#include "warp.h"

namespace hesskern::cuda {

namespace {

constexpr int kMost = 128;
// Pairs of neighbours that a thread keeps; and columns that a warp takes: what it cannot keep of
// them it reads twice, which costs less than a block's barriers.
constexpr int kHeld = 12;
constexpr int64_t kWarpColumns = 1024;
// Rows of a block that lie side by side in memory, and how much of k it turns at a time.
constexpr int kTurnedRows = 32, kTurnedDepth = 128;
// Times that a block takes its rows, and for how many blocks a multiprocessor that may be.
constexpr int64_t kMostRounds = 4, kBlocksEach = 16;

// How a block's threads take a matrix: a warp or all of them a row, or 32 rows that lie side by
// side in memory.
enum class Way { kWarps, kBlocks, kTurned };

struct AlongKList {
  struct Entry {
    AlongK source;
    Way way;
    // The matrix's first block.
    unsigned first;
  };
  int count, rounds;
  Entry entries[kMost];
};

// What the largest magnitude of a row is found by; kScaled: under exponents along k.
template <bool kScaled>
class Largest {
 public:
  __device__ void take(float value, int k_exponent) {
    uint32_t here = bits_of(value) & 0x7fffffffu;
    if constexpr (kScaled) {
      // Exponents from 1 on; 0xffffffff: the row holds what is not finite.
      const uint32_t size = static_cast<uint32_t>(exponent_of_bits(here) - k_exponent + kZero);
      here = here == 0 ? 0 : here >= 0x7f800000u ? 0xffffffffu : size;
    }
    most_ = here > most_ ? here : most_;
  }
  __device__ void take(uint32_t other) { most_ = other > most_ ? other : most_; }
  __device__ uint32_t value() const { return most_; }
  // Values times 2^exponent fit float16; 0 where all are zero or one is not finite.
  __device__ int exponent() const {
    if (most_ == 0) return 0;
    if constexpr (!kScaled) return packed_exponent(most_, 0);
    return most_ == 0xffffffffu ? 0 : 14 - (static_cast<int>(most_) - kZero);
  }

 private:
  static constexpr int kZero = 1024;
  uint32_t most_ = 0;
};

// A row's power of two, less one of each column where there are such.
template <bool kScaled>
class RowScale {
 public:
  __device__ explicit RowScale(int exponent) : exponent_(exponent), row_(&exponent, 0) {}
  __device__ float scaled(float value, int k_exponent) const {
    if constexpr (kScaled) return times_power(value, exponent_ - k_exponent);
    return row_.scaled(0, value);
  }

 private:
  int exponent_;
  ColumnScales<1> row_;
};

// A row by so many threads, 32 or all of the block.
template <int Count, bool kScaled>
__device__ inline void pack_row(const AlongK& s, int64_t block,
                                uint32_t (&highest)[kThreads / 32][kTurnedRows]) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = block * (kThreads / Count) + thread / Count;
  if (row >= s.to.rows) return;  // of a whole warp
  const int first = 2 * (thread % Count);
  const int columns = static_cast<int>(s.to.columns), padded = static_cast<int>(s.to.padded());
  const float* const from = s.matrix + row * s.row_step;
  const bool pairs = s.column_step == 1 && reinterpret_cast<uintptr_t>(from) % 8 == 0;
  const auto load = [&](int j) -> Pair<float> {
    if (pairs && j + 1 < columns) return *reinterpret_cast<const Pair<float>*>(from + j);
    return {{j < columns ? from[j * s.column_step] : 0.0f,
             j + 1 < columns ? from[(j + 1) * s.column_step] : 0.0f}};
  };
  // Beyond the columns values are zero, whatever the exponent.
  const auto exponent_along = [&](int j) {
    return kScaled ? s.k_exponents[j < columns ? j : columns - 1] : 0;
  };
  Largest<kScaled> largest;
  const auto take = [&](const Pair<float>& pair, int j) {
    largest.take(pair.value[0], exponent_along(j));
    largest.take(pair.value[1], exponent_along(j + 1));
  };
  // With exponents along k there are no registers for the row.
  constexpr int kKept = kScaled ? 0 : kHeld, kAll = 2 * Count * kKept;
  Pair<float> held[kHeld];
#pragma unroll
  for (int i = 0; i < kKept; ++i) held[i] = load(first + 2 * Count * i);
#pragma unroll
  for (int i = 0; i < kKept; ++i) take(held[i], first + 2 * Count * i);
#pragma unroll 4
  for (int j = kAll + first; j < columns; j += 2 * Count) take(load(j), j);
  largest.take(warp_max(largest.value()));
  if constexpr (Count > 32) {
    if (thread % 32 == 0) highest[thread / 32][0] = largest.value();
    __syncthreads();
    for (int i = 0; i < Count / 32; ++i) largest.take(highest[i][0]);
    // It may be written again.
    __syncthreads();
  }
  const int exponent = largest.exponent();
  if (first == 0) s.to.exponents[row] = exponent;
  const RowScale<kScaled> scale(exponent);
  uint16_t* const out = s.to.parts + row * padded;
  const auto put = [&](const Pair<float>& pair, int j) {
    if (j >= padded) return;
    uint32_t high, low;
    split_pair(scale.scaled(pair.value[0], exponent_along(j)),
               scale.scaled(pair.value[1], exponent_along(j + 1)), high, low);
    *reinterpret_cast<uint32_t*>(out + j) = high;
    *reinterpret_cast<uint32_t*>(out + j + s.to.part_step()) = low;
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) put(held[i], first + 2 * Count * i);
#pragma unroll 4
  for (int j = kAll + first; j < padded; j += 2 * Count) put(load(j), j);
}

// 32 rows that lie side by side, each the neighbour of the next, by way of shared memory.
template <bool kScaled>
__device__ inline void pack_turned(const AlongK& s, int64_t block,
                                   uint32_t (&highest)[kThreads / 32][kTurnedRows],
                                   float (&turned)[kTurnedDepth][kTurnedRows + 1]) {
  constexpr int kWarps = kThreads / 32, kLoads = kTurnedDepth / kWarps;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t row = block * kTurnedRows + lane;
  const bool inside = row < s.to.rows;
  const int columns = static_cast<int>(s.to.columns), padded = static_cast<int>(s.to.padded());
  const float* const from = s.matrix + row * s.row_step;
  const auto load = [&](int j) { return inside && j < columns ? from[j * s.column_step] : 0.0f; };
  const auto exponent_along = [&](int j) {
    return kScaled ? s.k_exponents[j < columns ? j : columns - 1] : 0;
  };
  Largest<kScaled> largest;
  for (int first = warp; first < columns; first += kTurnedDepth) {
    float values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) values[i] = load(first + kWarps * i);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) largest.take(values[i], exponent_along(first + kWarps * i));
  }
  highest[warp][lane] = largest.value();
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) largest.take(highest[i][lane]);
  const int exponent = largest.exponent();
  if (warp == 0 && inside) s.to.exponents[row] = exponent;
  const RowScale<kScaled> scale(exponent);
  for (int begin = 0; begin < padded; begin += kTurnedDepth) {
    float values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) values[i] = load(begin + warp + kWarps * i);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int j = begin + warp + kWarps * i;
      turned[warp + kWarps * i][lane] = scale.scaled(values[i], exponent_along(j));
    }
    __syncthreads();
    // Eight threads a row, each eight neighbours along k and then the ones 64 further.
    const int to_lane = thread / 8;
    const int64_t to_row = block * kTurnedRows + to_lane;
#pragma unroll
    for (int half = 0; half < kTurnedDepth / 64; ++half) {
      const int k = 64 * half + 8 * (thread % 8);
      if (to_row < s.to.rows && begin + k < padded) {
        Halves<8> high, low;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          split_pair(turned[k + 2 * i][to_lane], turned[k + 2 * i + 1][to_lane], high.words[i],
                     low.words[i]);
        }
        uint16_t* const out = s.to.parts + to_row * padded + begin + k;
        *reinterpret_cast<Halves<8>*>(out) = high;
        *reinterpret_cast<Halves<8>*>(out + s.to.part_step()) = low;
      }
    }
    __syncthreads();
  }
}

template <bool kScaled>
__device__ inline void pack(const AlongKList::Entry& entry, int64_t block,
                            uint32_t (&highest)[kThreads / 32][kTurnedRows],
                            float (&turned)[kTurnedDepth][kTurnedRows + 1]) {
  if (entry.way == Way::kWarps) {
    pack_row<32, kScaled>(entry.source, block, highest);
  } else if (entry.way == Way::kBlocks) {
    pack_row<kThreads, kScaled>(entry.source, block, highest);
  } else {
    pack_turned<kScaled>(entry.source, block, highest, turned);
  }
}

template <int Threads>
__global__ void __launch_bounds__(Threads, 3)
    pack_along_k_kernel(const __grid_constant__ AlongKList list) {
  static_assert(Threads == kThreads);
  __shared__ uint32_t highest[Threads / 32][kTurnedRows];
  __shared__ float turned[kTurnedDepth][kTurnedRows + 1];
  // The last matrix that does not begin behind this block.
  int low = 0, high = list.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.entries[middle].first <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const AlongKList::Entry& entry = list.entries[low];
  const int64_t first = static_cast<int64_t>(blockIdx.x - entry.first) * list.rounds;
  for (int64_t block = first; block < first + list.rounds; ++block) {
    if (entry.source.k_exponents != nullptr) {
      pack<true>(entry, block, highest, turned);
    } else {
      pack<false>(entry, block, highest, turned);
    }
  }
}

Way way_of(const AlongK& source) {
  if (source.row_step == 1 && source.column_step != 1 && source.to.rows > 1) return Way::kTurned;
  return source.to.columns <= kWarpColumns ? Way::kWarps : Way::kBlocks;
}

int64_t rows_of_block(Way way) {
  return way == Way::kWarps ? kThreads / 32 : way == Way::kBlocks ? 1 : kTurnedRows;
}

// How often a block's threads take rows of a matrix.
int64_t shares_of(const AlongK& source) {
  return ceil_div(source.to.rows, rows_of_block(way_of(source)));
}

}  // namespace

cudaError_t pack_along_k(const std::vector<AlongK>& matrices, cudaStream_t stream) {
  for (size_t begin = 0; begin < matrices.size(); begin += kMost) {
    AlongKList list{};
    list.count = static_cast<int>(std::min<size_t>(kMost, matrices.size() - begin));
    int64_t shares = 0;
    for (int i = 0; i < list.count; ++i)
      shares += shares_of(matrices[begin + static_cast<size_t>(i)]);
    list.rounds = static_cast<int>(
        std::clamp<int64_t>(shares / (kBlocksEach * current_device().processors), 1, kMostRounds));
    int64_t blocks = 0;
    for (int i = 0; i < list.count; ++i) {
      const AlongK& source = matrices[begin + static_cast<size_t>(i)];
      list.entries[i] = {source, way_of(source), static_cast<unsigned>(blocks)};
      blocks += ceil_div(shares_of(source), int64_t{list.rounds});
    }
    if (blocks == 0) continue;
    const cudaError_t error =
        launch(pack_along_k_kernel<kThreads>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
               0, stream, list);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace hesskern::cuda
