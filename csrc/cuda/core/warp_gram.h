// Gram matrices of at most 64 columns, a whole upper triangle in the registers of every warp.
//
// Rows enter sixteen at a time. In a Gram matrix the left operand is the right one and rows may
// come in any order, so that a lane reads its operands straight from where it copied them: no
// transposition, no barrier between warps. Tensor cores cut their sums off, which is why every
// sixteen rows are multiplied into fresh registers and added in float32 arithmetic. A block's warps
// are added in shared memory and the blocks by a second kernel, both in fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "axis.h"
#include "launch.h"
#include "symmetric.h"
#include "warp.h"

namespace hesskern::cuda {

constexpr int kGramWarps = 4, kGramThreads = 32 * kGramWarps;
// Blocks that registers leave room for on a multiprocessor.
constexpr int kGramBlocks = 2;

// Which column element g of the operands' block of eight columns is: the blocks one after another,
// or four blocks taking turns, so that a lane reads its four columns at once.
enum class ColumnOrder { kInTurn, kByFours };

template <ColumnOrder kOrder>
__host__ __device__ constexpr int gram_column(int block, int g) {
  return kOrder == ColumnOrder::kByFours ? block / 4 * 32 + 4 * g + block % 4 : 8 * block + g;
}

// The upper triangle of blocks [16, 16] of 16 Blocks columns.
template <int Blocks>
class WarpTriangle {
 public:
  static constexpr int kEights = 2 * Blocks, kPairs = Blocks * (Blocks + 1) / 2;
  // A triangle as it lies in registers: [pair, half, element, lane].
  static constexpr int kSize = kPairs * 8 * 32;
  static constexpr size_t kBytes = sizeof(float) * kGramWarps * kSize;

  // Of every block of eight columns two words: rows 2 t, 2 t + 1 of the sixteen, then 8 further on.
  using Words = uint32_t[kEights][2];

  __device__ WarpTriangle() {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[p][half][e] = 0.0f;
      }
    }
  }

  // Of half as many rows.
  using FewWords = uint32_t[kEights];

  // Sixteen rows (Words) or eight (FewWords) as two float16 parts each; factor undoes the scales.
  // nothing is zero, which the compiler must not know: the left operand is several neighbouring
  // registers and the right one others, and without values of their own for both it moves registers
  // before every product.
  template <class RowWords>
  __device__ void add(const RowWords& high, const RowWords& low, float factor, uint32_t nothing) {
    each_pair([&](int i, int j, float (&sum)[2][4]) {
      const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const auto large = left(high, i, nothing), small = left(low, i, nothing);
      float recent[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_half(recent[half], small.words, high[2 * j + half], zero, Float16{});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_half(recent[half], large.words, low[2 * j + half], recent[half], Float16{});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_half(recent[half], large.words, high[2 * j + half], recent[half], Float16{});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[half][e] += recent[half][e] * factor;
      }
    });
  }

  // Sixteen rows of In: BFloat16 or Float16, whose products are exact.
  template <typename In>
  __device__ void add(const Words& words, uint32_t nothing, In type) {
    each_pair([&](int i, int j, float (&sum)[2][4]) {
      const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const auto rows = left(words, i, nothing);
      float recent[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_half(recent[half], rows.words, words[2 * j + half], zero, type);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[half][e] += recent[half][e];
      }
    });
  }

  // The sum over the block's warps to its place in partial [blocks, kSize]; memory: kBytes of
  // shared memory that nobody reads or copies to any more once all threads are here.
  __device__ void finish(float* memory, float* partial) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    __syncthreads();
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          memory[warp * kSize + ((p * 2 + half) * 4 + e) * 32 + lane] = sum_[p][half][e];
        }
      }
    }
    __syncthreads();
    float* out = partial + static_cast<int64_t>(blockIdx.x) * kSize;
    for (int f = thread; f < kSize; f += kGramThreads) {
      float total = memory[f];
#pragma unroll
      for (int other = 1; other < kGramWarps; ++other) total += memory[other * kSize + f];
      out[f] = total;
    }
  }

 private:
  template <class Visit>
  __device__ void each_pair(Visit visit) {
    int pair = 0;
#pragma unroll
    for (int i = 0; i < Blocks; ++i) {
#pragma unroll
      for (int j = i; j < Blocks; ++j, ++pair) visit(i, j, sum_[pair]);
    }
  }

  template <int Count>
  struct Left {
    uint32_t words[Count];
  };
  // Blocks 2 i and 2 i + 1 of eight columns as the sixteen rows of a left operand.
  __device__ static Left<4> left(const Words& words, int i, uint32_t nothing) {
    return {{words[2 * i][0] ^ nothing, words[2 * i + 1][0] ^ nothing, words[2 * i][1] ^ nothing,
             words[2 * i + 1][1] ^ nothing}};
  }
  __device__ static Left<2> left(const FewWords& words, int i, uint32_t nothing) {
    return {{words[2 * i] ^ nothing, words[2 * i + 1] ^ nothing}};
  }

  float sum_[kPairs][2][4];
};

// Where an element of a WarpTriangle belongs; (0, -1) for one that belongs nowhere.
template <int Blocks, ColumnOrder kOrder>
struct WarpTrianglePlace {
  __device__ void operator()(int f, int& row, int& column) const {
    const int lane = f % 32, element = f / 32 % 4, half = f / 128 % 2;
    int pair = f / 256, i = 0;
    while (pair >= Blocks - i) pair -= Blocks - i++;
    const int j = i + pair;
    const int a = gram_column<kOrder>(2 * i + element / 2, lane / 4);
    const int b = gram_column<kOrder>(2 * j + half, 2 * (lane % 4) + element % 2);
    // A block on the diagonal holds both of an element and its mirror image.
    row = a, column = b;
    if (a > b) row = i == j ? 0 : b, column = i == j ? -1 : a;
  }
};

// Warps that share the sum over blocks of 32 elements.
constexpr int kPartWarps = kThreads / 32;

// sum += the total of partial [blocks, size] over its blocks, in fixed order: element f belongs to
// the place that Place finds for it.
template <class Place>
__global__ void __launch_bounds__(kThreads)
    add_blocks_kernel(const float* partial, int64_t blocks, int64_t size, Place place,
                      SymmetricSum<float> sum) {
  __shared__ float totals[kPartWarps][32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t f = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float total = 0.0f;
#pragma unroll 16
  for (int64_t block = warp; block < blocks; block += kPartWarps) {
    total += partial[block * size + f];
  }
  totals[warp][lane] = total;
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int other = 1; other < kPartWarps; ++other) total += totals[other][lane];
  int row, column;
  place(static_cast<int>(f), row, column);
  add_to(sum, 0, row, column, total);
}

// size: of a block's part, a multiple of 32.
template <class Place>
cudaError_t add_blocks(const float* partial, int64_t blocks, int64_t size, Place place,
                       const SymmetricSum<float>& sum, cudaStream_t stream) {
  return launch(add_blocks_kernel<Place>, dim3(static_cast<unsigned>(size / 32)), dim3(kThreads), 0,
                stream, partial, blocks, size, place, sum);
}

}  // namespace hesskern::cuda
