// A block's tile of a product: C [Rows, Columns] += A^T B with A [Depth, Rows] and
// B [Depth, Columns] in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "warp.h"

namespace hesskern::cuda {

// float32 on tensor cores. With three terms a value is the sum of two tf32 numbers, 22 bits, and
// three of the four products are taken: nearly float32's own accuracy. With one term it is rounded
// to tf32, which is exact for bfloat16 and float16. Tensor cores cut their sums off instead of
// rounding them, so these are kept short and added to others in registers.
template <int Terms, int Rows, int Columns, int Depth = 16>
class TensorTile {
 public:
  using Value = float;
  static constexpr int kRows = Rows, kColumns = Columns, kDepth = Depth;

  __device__ TensorTile() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    row0_ = warp / kWarpColumns * (Rows / kWarpRows);
    column0_ = warp % kWarpColumns * (Columns / kWarpColumns);
    group_ = lane / 4;
    member_ = lane % 4;
    clear(sum_);
    clear(recent_);
  }

  // a, b: tiles of kDepth in shared memory with their layouts.
  template <class LayoutA, class LayoutB>
  __device__ void add(const float* a, const LayoutA& la, const float* b, const LayoutB& lb) {
#pragma unroll 2
    for (int k = 0; k < kDepth; k += 8) {
      float high[kAcross][2], low[kAcross][2];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const int column = column0_ + j * 8 + group_;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          split(b[lb.index(k + member_ + 4 * part, column)], high[j][part], low[j][part]);
        }
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int row = row0_ + i * 16 + group_;
        float large[4], small[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          split(a[la.index(k + member_ + part / 2 * 4, row + part % 2 * 8)], large[part],
                small[part]);
        }
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          if constexpr (Terms == 3) {
            multiply_tf32(recent_[i][j], small, high[j]);
            multiply_tf32(recent_[i][j], large, low[j]);
          }
          multiply_tf32(recent_[i][j], large, high[j]);
        }
      }
    }
    if (++pending_ == kLimit) flush();
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

 private:
  static constexpr int kWarpRows = 2, kWarpColumns = 4;
  static constexpr int kDown = Rows / kWarpRows / 16, kAcross = Columns / kWarpColumns / 8;
  static_assert(kDown * kWarpRows * 16 == Rows && kAcross * kWarpColumns * 8 == Columns &&
                kWarpRows * kWarpColumns * 32 == kThreads);
  // Tiles of kDepth rows in one sum of the tensor cores.
  static constexpr int kLimit = 64 / Depth;
  using Sums = float[kDown][kAcross][4];

  __device__ static void split(float value, float& high, float& low) {
    high = round_to_tf32(value);
    low = Terms == 3 ? round_to_tf32(value - high) : 0.0f;
  }

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

  int row0_, column0_, group_, member_, pending_ = 0;
  Sums sum_, recent_;
};

// float64 by fused multiply-adds; 16 x 16 threads.
template <int Rows, int Columns, int Depth = 16>
class FmaTile {
 public:
  using Value = double;
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
