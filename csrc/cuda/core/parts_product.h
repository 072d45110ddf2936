// Products of 16-bit matrices on the warpgroup tensor instructions of compute capability 9.0, with
// sums that keep float32 accuracy; float32 matrices come as two scaled float16 (hi/lo).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "axis.h"

namespace hesskern::cuda {

// What matrices are made of: 16-bit elements, or the sums of two float16, of whose four products
// three are taken.
enum class PartsType { kBFloat16, kFloat16, kTwoFloat16 };

template <typename T>
constexpr PartsType parts_type_of() {
  return sizeof(T) == 4                ? PartsType::kTwoFloat16
         : std::is_same_v<T, BFloat16> ? PartsType::kBFloat16
                                       : PartsType::kFloat16;
}

// [parts, rows, columns] of 16-bit elements, one or two parts; the address and both steps are
// multiples of 16 bytes. exponents of the columns (of the rows: along k): the elements are
// 2^exponent times what they stand for; null: 2^0.
struct PartsMatrix {
  const void* data;
  int64_t rows, columns, row_step, part_step;
  const int* exponents = nullptr;
  // Columns come in pieces of width, a multiple of 64, with a gap behind each; 0: in one.
  int64_t width = 0, gap = 0;
};

// c [m, n] (+)= alpha times the product, of a triangle its upper one.
struct PartsTarget {
  float* c;
  int64_t row_step, column_step;
  float alpha;
  bool add;
};

// How a product's work is cut, in tiles of 128 rows: first whole tiles, a multiple of the blocks
// that run at once, then splits (of so many chunks of k) of those that are left.
struct PartsSchedule {
  int m, n, row_tiles, column_tiles, column_tile, tiles, whole, chunks, splits, split_chunks;
  bool triangle;
  // Estimated, in microseconds.
  double cost;

  __host__ __device__ int rows_of(int column) const {
    if (!triangle) return row_tiles;
    const int rows = ((column + 1) * column_tile - 1) / 128 + 1;
    return rows < row_tiles ? rows : row_tiles;
  }
  __host__ __device__ int items() const { return whole + (tiles - whole) * splits; }
};

// Whether the current device multiplies this way.
bool parts_products_available();

// Rows that one float32 sum takes at most: its own rounding shows beyond.
constexpr int64_t kLongestPartsSum = 1 << 17;

// A^T B with A [k, m], B [k, n], or along k A B^T with A [m, k], B [n, k] (of two float16 only);
// triangle: A is B, and only row <= column is wanted. k is at most kLongestPartsSum.
class PartsProduct {
 public:
  // column_tile: 128 or 256 columns of a tile; 0: what is faster.
  PartsProduct(PartsType type, bool along_k, int64_t m, int64_t n, int64_t k, bool triangle,
               int column_tile = 0);

  // Elements of float that run needs.
  int64_t workspace() const;

  // Only B may have gaps, and not along k.
  cudaError_t run(const PartsMatrix& a, const PartsMatrix& b, const PartsTarget& target,
                  float* workspace, cudaStream_t stream) const;

  const PartsSchedule& schedule() const { return schedule_; }

 private:
  PartsType type_;
  bool along_k_;
  PartsSchedule schedule_;
};

}  // namespace hesskern::cuda
