// A block's tile of a product: C [Rows, Columns] += A^T B with A [Depth, Rows] and
// B [Depth, Columns] in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "warp.h"

namespace hesskern::cuda {

// What a block's threads hold of a tile that tensor cores sum up. Tensor cores cut their sums off
// instead of rounding them, so these are kept short, Longest rows, and added to others in
// registers.
template <int Rows, int Columns, int Depth, int Longest>
class TensorSums {
 public:
  using Sum = float;
  static constexpr int kRows = Rows, kColumns = Columns, kDepth = Depth;

  __device__ TensorSums() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    row0_ = warp / kWarpColumns * (Rows / kWarpRows);
    column0_ = warp % kWarpColumns * (Columns / kWarpColumns);
    group_ = lane / 4;
    member_ = lane % 4;
    clear(sum_);
    clear(recent_);
  }

  // visit(row, column, value) of every element that this thread holds.
  template <class Visit>
  __device__ void each(Visit visit) {
    flush();
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          visit(row0_ + i * 16 + group_ + part / 2 * 8, column0_ + j * 8 + 2 * member_ + part % 2,
                sum_[i][j][part]);
        }
      }
    }
  }

 protected:
  static constexpr int kWarpRows = 2, kWarpColumns = 4;
  static constexpr int kDown = Rows / kWarpRows / 16, kAcross = Columns / kWarpColumns / 8;
  static_assert(kDown * kWarpRows * 16 == Rows && kAcross * kWarpColumns * 8 == Columns &&
                kWarpRows * kWarpColumns * 32 == kThreads);

  // One more tile of Depth rows is in recent_.
  __device__ void count_tile() {
    if (++pending_ == Longest / Depth) flush();
  }

  int row0_, column0_, group_, member_;
  float recent_[kDown][kAcross][4];

 private:
  using Sums = float[kDown][kAcross][4];

  __device__ static void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) sums[i][j][part] = 0.0f;
      }
    }
  }

  __device__ void flush() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) sum_[i][j][part] += recent_[i][j][part];
      }
    }
    clear(recent_);
    pending_ = 0;
  }

  int pending_ = 0;
  Sums sum_;
};

// float32 on tensor cores. With three terms a value is the sum of two tf32 numbers, 22 bits, and
// three of the four products are taken: nearly float32's own accuracy. With one term it is rounded
// to tf32.
template <int Terms, int Rows, int Columns, int Depth = 16>
class TensorTile : public TensorSums<Rows, Columns, Depth, 64> {
 public:
  using Value = float;
  static constexpr int kTerms = Terms;

  // a, b: tiles of Depth in shared memory with their layouts.
  template <class LayoutA, class LayoutB>
  __device__ void add(const float* a, const LayoutA& la, const float* b, const LayoutB& lb) {
#pragma unroll 2
    for (int k = 0; k < Depth; k += 8) {
      float high[kAcross][2], low[kAcross][2];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const int column = this->column0_ + j * 8 + this->group_;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          split(b[lb.index(k + this->member_ + 4 * part, column)], high[j][part], low[j][part]);
        }
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int row = this->row0_ + i * 16 + this->group_;
        float large[4], small[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          split(a[la.index(k + this->member_ + part / 2 * 4, row + part % 2 * 8)], large[part],
                small[part]);
        }
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          float (&recent)[4] = this->recent_[i][j];
          if constexpr (Terms == 3) {
            multiply_tf32(recent, small, high[j]);
            multiply_tf32(recent, large, low[j]);
          }
          multiply_tf32(recent, large, high[j]);
        }
      }
    }
    this->count_tile();
  }

 private:
  using Base = TensorSums<Rows, Columns, Depth, 64>;
  static constexpr int kDown = Base::kDown, kAcross = Base::kAcross;

  // The low part has up to 12 bits, of which tensor cores cut off one or two.
  __device__ static void split(float value, float& high, float& low) {
    high = Terms == 3 ? high_part(value) : rounded_operand(value);
    low = Terms == 3 ? value - high : 0.0f;
  }
};

// bfloat16 or float16 on tensor cores, sums in float32. Products of such numbers are exact in
// float32, and there are as few bits in them as in the data: sums may be longer.
template <typename In, int Rows, int Columns, int Depth = 32>
class HalfTile : public TensorSums<Rows, Columns, Depth, 256> {
 public:
  using Value = In;

  template <class LayoutA, class LayoutB>
  __device__ void add(const In* a, const LayoutA& la, const In* b, const LayoutB& lb) {
    // Words of memory hold neighbours along k, or along i: then the matrices come transposed.
    const bool transposed_a = la.k_step != 1, transposed_b = lb.k_step != 1;
    const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8, line = lane % 8;
#pragma unroll
    for (int k = 0; k < Depth; k += 16) {
      uint32_t right[kAcross / 2][4];
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) {
        const int row = k + matrix % 2 * 8, column = this->column0_ + (2 * j + matrix / 2) * 8;
        load_matrices(
            right[j],
            b + (transposed_b ? lb.index(row + line, column) : lb.index(row, column + line)),
            transposed_b);
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int row = k + matrix / 2 * 8, column = this->row0_ + i * 16 + matrix % 2 * 8;
        uint32_t left[4];
        load_matrices(
            left, a + (transposed_a ? la.index(row + line, column) : la.index(row, column + line)),
            transposed_a);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          multiply_half(this->recent_[i][j], left, right[j / 2] + j % 2 * 2, In{});
        }
      }
    }
    this->count_tile();
  }

 private:
  using Base = TensorSums<Rows, Columns, Depth, 256>;
  static constexpr int kDown = Base::kDown, kAcross = Base::kAcross;
  static_assert(kAcross % 2 == 0);
};

// float64 by fused multiply-adds; 16 x 16 threads.
template <int Rows, int Columns, int Depth = 16>
class FmaTile {
 public:
  using Value = double;
  using Sum = double;
  static constexpr int kRows = Rows, kColumns = Columns, kDepth = Depth;

  __device__ FmaTile()
      : row0_(static_cast<int>(threadIdx.x) / kSide),
        column0_(static_cast<int>(threadIdx.x) % kSide) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sum_[i][j] = 0.0;
    }
  }

  template <class LayoutA, class LayoutB>
  __device__ void add(const double* a, const LayoutA& la, const double* b, const LayoutB& lb) {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      double left[kDown], right[kAcross];
#pragma unroll
      for (int i = 0; i < kDown; ++i) left[i] = a[la.index(k, row0_ + i * kSide)];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) right[j] = b[lb.index(k, column0_ + j * kSide)];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) sum_[i][j] += left[i] * right[j];
      }
    }
  }

  template <class Visit>
  __device__ void each(Visit visit) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        visit(row0_ + i * kSide, column0_ + j * kSide, sum_[i][j]);
      }
    }
  }

 private:
  static constexpr int kSide = 16;
  static constexpr int kDown = Rows / kSide, kAcross = Columns / kSide;
  static_assert(kSide * kSide == kThreads);

  int row0_, column0_;
  double sum_[kDown][kAcross];
};

// Blocks that registers leave room for on a multiprocessor.
template <class Tile>
constexpr int blocks_per_processor() {
  return Tile::kRows * Tile::kColumns > 64 * 64 ? 1 : 2;
}

}  // namespace hesskern::cuda
