// Products of 16-bit matrices on the warpgroup tensor instructions of compute capability 9.0, with
// sums that keep float32 accuracy; float32 matrices come as two scaled float16 (hi/lo).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <vector>

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

// What a product is multiplied with, element by element: data(row, column); rows other than 0: of
// row % rows. Null: nothing.
struct PartsScale {
  const float* data = nullptr;
  int64_t row_step = 0, column_step = 0;
  int rows = 0;

  __device__ const float* row(int i) const { return data + (rows == 0 ? i : i % rows) * row_step; }
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
  // Tiles whose splits are added, and the elements of float of their partial sums.
  int split_tiles() const { return splits > 1 ? tiles - whole : 0; }
  int64_t partial() const { return int64_t{split_tiles()} * splits * (128 * column_tile); }
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

// Products of one launch.
constexpr int kMostProducts = 64;

struct PartsSize {
  int64_t m, n, k;
};

// A and B as PartsProduct takes them.
struct GroupedPart {
  PartsMatrix a, b;
  PartsTarget to;
  PartsScale scale;
};

// Up to kMostProducts products of one type, times a scale each, in one launch (grouped): small ones
// fill the device together, and what long ones leave of it.
class GroupedPartsProduct {
 public:
  // Of at least one product, none of them empty.
  GroupedPartsProduct(PartsType type, bool along_k, const std::vector<PartsSize>& sizes,
                      int column_tile = 0);

  // Elements of float that run needs.
  int64_t workspace() const { return workspace_; }
  // Estimated, in microseconds.
  double cost() const { return cost_; }

  // In the order of the sizes.
  cudaError_t run(const std::vector<GroupedPart>& products, float* workspace,
                  cudaStream_t stream) const;

  // Longer items first.
  const std::vector<PartsSchedule>& schedules() const { return schedules_; }

 private:
  PartsType type_;
  bool along_k_;
  std::vector<PartsSchedule> schedules_;
  std::vector<size_t> order_;
  int64_t workspace_ = 0;
  double cost_ = 0;
};

}  // namespace hesskern::cuda
