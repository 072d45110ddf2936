// The upper triangle of a Gram matrix of 65 to 256 columns in the registers of a block, a warp's
// share of it in units of two blocks [16, 16] above one another, and where its elements belong.
//
// Operands are matrices [8, 8] of 128 contiguous bytes, which ldmatrix reads as left operands and
// as right ones without a bank conflict or a move. Every sixteen rows are multiplied into fresh
// registers and added in float32, because tensor cores cut sums off.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/core/warp.h"
#include "cuda/core/warp_gram.h"

namespace hesskern::cuda {

// 32 Groups columns, Warps warps of Units units each.
template <int Groups, int Warps, int Units>
struct BlockShape {
  static constexpr int kGroups = Groups, kUnits = Units;
  // Blocks of 16 and of 8 columns.
  static constexpr int kBlocks = 2 * Groups, kEights = 4 * Groups;
  static constexpr int kBlockThreads = 32 * Warps;
  // The triangle as it lies in registers: [unit, tile, element, lane].
  static constexpr int kSize = Warps * Units * 16 * 32;
  // Operands of eight rows in words and bytes, of one part.
  static constexpr int kHalf = kEights * 32, kHalfBytes = kHalf * 4;
  // Rows that are read at once to make operands of them, as registers allow.
  static constexpr int kAhead = Units > 5 ? 2 : 5;
  // Units beyond the triangle compute something that nobody looks at.
  static constexpr bool kExact = Groups * (Groups + 1) == Warps * Units;
  static_assert(Groups * (Groups + 1) <= Warps * Units && Groups <= Warps);
};

// A unit: blocks 2 row and 2 row + 1 of the left columns with block `column` of the right ones.
struct BlockUnit {
  int row, column;
};

// The unit of an index; its row is past the last one where there is none.
__device__ inline BlockUnit block_unit_of(int index, int blocks) {
  BlockUnit unit{0, 0};
  while (2 * unit.row < blocks && index >= blocks - 2 * unit.row) {
    index -= blocks - 2 * unit.row;
    ++unit.row;
  }
  unit.column = 2 * unit.row + index;
  return unit;
}

// Where an element of a block's triangle belongs; (0, -1) for one that belongs nowhere.
template <class S, ColumnOrder kOrder>
struct BlockPlace {
  __device__ void operator()(int f, int& row, int& column) const {
    const int lane = f % 32, element = f / 32 % 4, tile = f / 128 % 4;
    const BlockUnit unit = block_unit_of(f / 512, S::kBlocks);
    const int i = 2 * unit.row + tile / 2, j = unit.column;
    const int a = gram_column<kOrder>(2 * i + element / 2, lane / 4);
    const int b = gram_column<kOrder>(2 * j + tile % 2, 2 * (lane % 4) + element % 2);
    row = a, column = b;
    if (unit.row >= S::kGroups || i > j) {
      row = 0, column = -1;
    } else if (a > b) {
      // A block on the diagonal holds both of an element and its mirror image.
      row = i == j ? 0 : b, column = i == j ? -1 : a;
    }
  }
};

// The warp's share of the triangle.
template <class S>
class WarpUnits {
 public:
  __device__ WarpUnits() {
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u) {
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[u][tile][e] = 0.0f;
      }
    }
  }

  // Adds sixteens of rows; backs [groups].
  __device__ void add(const uint32_t* operands, int steps, const float* backs) {
    const int thread = anew(static_cast<int>(threadIdx.x)), lane = thread % 32;
    const BlockUnit first = block_unit_of(thread / 32 * S::kUnits, S::kBlocks);
    // Which matrix's row a lane names: of a left operand the blocks of 8 columns come first, of a
    // right one the halves of sixteen rows.
    const int left_lane = lane / 16 * 2 * S::kHalfBytes + lane / 8 % 2 * 128 + lane % 8 * 16;
    const int right_lane = lane / 8 % 2 * 2 * S::kHalfBytes + lane / 16 * 128 + lane % 8 * 16;
    const auto factor_of = [&](const Places& place) {
      return backs[place.row() / kRowBytes] * backs[place.column() / kRowBytes];
    };
    // Of many units registers have room neither for the factors nor for the places.
    constexpr bool kKept = S::kUnits < 6;
    float factor[S::kUnits];
    Places at(first);
#pragma unroll
    for (int u = 0; kKept && u < S::kUnits; ++u, at.next()) factor[u] = factor_of(at);
    const auto* from = reinterpret_cast<const unsigned char*>(operands);
#pragma unroll 1
    for (int s = 0; s < steps; ++s, from += 4 * S::kHalfBytes) {
      at = Places(kKept ? first : BlockUnit{anew(first.row), anew(first.column)});
      uint32_t large[2][4], small[2][4];
#pragma unroll
      for (int u = 0; u < S::kUnits; ++u, at.next()) {
        if (u == 0 || at.begins()) {
          const unsigned char* a = from + left_lane + at.row();
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            load_matrices(large[half], a + half * kColumnBytes, false);
            load_matrices(small[half], a + half * kColumnBytes + S::kHalfBytes, false);
          }
        }
        const unsigned char* b = from + right_lane + at.column();
        uint32_t words[4], high[2][2], low[2][2];
        load_matrices(words, b, false);
        pair(words, high);
        load_matrices(words, b + S::kHalfBytes, false);
        pair(words, low);
        add(large, small, high, low, kKept ? factor[u] : factor_of(at), sum_[u]);
      }
    }
  }

  // Adds rows of In, BFloat16 or Float16, whose products are exact: operands of one part,
  // thirty-two rows at a time. kTransposed: a matrix's lines in memory are eight neighbours of a
  // row, instead of eight rows of a column.
  template <typename In, bool kTransposed>
  __device__ void add_exact(const unsigned char* from, int times) {
    const int thread = anew(static_cast<int>(threadIdx.x)), lane = thread % 32;
    const BlockUnit first = block_unit_of(thread / 32 * S::kUnits, S::kBlocks);
    const int left_lane = lane / 16 * S::kHalfBytes + lane / 8 % 2 * 128 + lane % 8 * 16;
    const int right_lane = lane / 8 % 2 * S::kHalfBytes + lane / 16 * 128 + lane % 8 * 16;
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int time = 0; time < times; ++time, from += 4 * S::kHalfBytes) {
      Places at(BlockUnit{anew(first.row), anew(first.column)});
      uint32_t left[2][2][4];
#pragma unroll
      for (int u = 0; u < S::kUnits; ++u, at.next()) {
        if (u == 0 || at.begins()) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            load_matrices(
                left[i / 2][i % 2],
                from + left_lane + at.row() + i / 2 * 2 * S::kHalfBytes + i % 2 * kColumnBytes,
                kTransposed);
          }
        }
        uint32_t right[2][2][2];
#pragma unroll
        for (int sixteen = 0; sixteen < 2; ++sixteen) {
          uint32_t words[4];
          load_matrices(words, from + right_lane + at.column() + sixteen * 2 * S::kHalfBytes,
                        kTransposed);
          pair(words, right[sixteen]);
        }
        // Of many units registers have no room for all four sums at once.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float recent[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_half(recent[i], left[0][half], right[0][i], zero, In{});
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_half(recent[i], left[1][half], right[1][i], recent[i], In{});
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum_[u][2 * half + i][e] += recent[i][e];
          }
        }
      }
    }
  }

  // To the block's place in partial [blocks, kSize].
  __device__ void finish(float* partial) const {
    const int thread = static_cast<int>(threadIdx.x);
    float* const out = partial + static_cast<int64_t>(blockIdx.x) * S::kSize +
                       thread / 32 * S::kUnits * 16 * 32 + thread % 32;
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u) {
#pragma unroll
      for (int e = 0; e < 16; ++e) out[(u * 16 + e) * 32] = sum_[u][e / 4][e % 4];
    }
  }

 private:
  // Operands of a block and of a row of units lie so many bytes apart.
  static constexpr int kColumnBytes = 256, kRowBytes = 2 * kColumnBytes;

  // Where the operands of a unit lie, and of those after it. A row begins at its own diagonal.
  class Places {
   public:
    __device__ explicit Places(const BlockUnit& unit)
        : row_(unit.row * kRowBytes), column_(unit.column * kColumnBytes) {}

    __device__ int row() const { return existing(row_, S::kGroups * kRowBytes - kRowBytes); }
    __device__ int column() const {
      return existing(column_, S::kBlocks * kColumnBytes - kColumnBytes);
    }
    __device__ bool begins() const { return row_ == column_; }
    __device__ void next() {
      column_ += kColumnBytes;
      if (column_ == S::kBlocks * kColumnBytes) row_ += kRowBytes, column_ = row_;
    }

   private:
    // Units that do not exist read what others do.
    __device__ static int existing(int place, int last) {
      return S::kExact || place < last ? place : last;
    }

    int row_, column_;
  };

  __device__ static void pair(const uint32_t (&words)[4], uint32_t (&pairs)[2][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i / 2][i % 2] = words[i];
  }

  // Sixteen rows of a unit: small products first, which fresh sums keep whole.
  __device__ static void add(const uint32_t (&large)[2][4], const uint32_t (&small)[2][4],
                             const uint32_t (&high)[2][2], const uint32_t (&low)[2][2],
                             float factor, float (&sum)[4][4]) {
    // Of many units registers have no room for all four sums at once.
    constexpr int kChains = 4;
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int first = 0; first < 4; first += kChains) {
      float recent[kChains][4];
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        multiply_half(recent[i], small[(first + i) / 2], high[i % 2], zero, Float16{});
      }
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        multiply_half(recent[i], large[(first + i) / 2], low[i % 2], recent[i], Float16{});
      }
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        multiply_half(recent[i], large[(first + i) / 2], high[i % 2], recent[i], Float16{});
      }
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[first + i][e] += recent[i][e] * factor;
      }
    }
  }

  float sum_[S::kUnits][4][4];
};

// visit(BlockShape, how many blocks of it a multiprocessor has registers for) for so many columns.
template <class Visit>
auto with_block_shape(int columns, Visit visit) {
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 3> three;
  switch ((columns + 31) / 32) {
    case 4:
      return visit(BlockShape<4, 4, 5>{}, three);
    case 5:
      return visit(BlockShape<5, 8, 4>{}, one);
    case 6:
      return visit(BlockShape<6, 8, 6>{}, one);
    case 7:
      return visit(BlockShape<7, 12, 5>{}, one);
    case 8:
      return visit(BlockShape<8, 12, 6>{}, one);
    default:
      return visit(BlockShape<3, 4, 3>{}, three);
  }
}

}  // namespace hesskern::cuda
