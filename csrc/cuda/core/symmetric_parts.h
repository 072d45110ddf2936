// acc += alpha sum_k r_k r_k^T over rows r_k on the products of parts_product.h, a block of rows at
// a time: as they lie in memory, or packed into a buffer first.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "axis.h"
#include "packed_rows.h"
#include "parts_product.h"
#include "work.h"

namespace hesskern::cuda {

struct SymmetricPartsLimits {
  // Rows of a block at most; fewer, so many at least, where the buffer would take more bytes.
  int64_t most_rows = kLongestPartsSum, least_rows = 1 << 14, bytes = int64_t{1} << 28;
  // Of a tile; 0: what is faster.
  int column_tile = 0;
};

// Products of all blocks of rows: most alike, the last one with fewer rows.
struct SymmetricPartsBlocks {
  int64_t rows, block;
  PartsProduct whole, last;

  SymmetricPartsBlocks(PartsType type, int64_t order, int64_t all, int64_t most, int column_tile)
      : rows(all),
        block(std::min(all, most)),
        whole(type, false, order, order, block, true, column_tile),
        last(all % block == 0
                 ? whole
                 : PartsProduct(type, false, order, order, all % block, true, column_tile)) {}

  // Elements of float, a multiple of four.
  int64_t workspace() const { return whole_pieces(std::max(whole.workspace(), last.workspace())); }

  // visit(first row, rows, product) until there is an error.
  template <class Visit>
  cudaError_t each(Visit visit) const {
    for (int64_t first = 0; first < rows; first += block) {
      const bool full = rows - first >= block;
      const cudaError_t error = visit(first, full ? block : rows - first, full ? whole : last);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
};

inline PartsTarget added_to(const SymmetricSum<float>& sum) {
  return {sum.acc, sum.row_stride, sum.column_stride, sum.alpha, true};
}

// Whether products can read rows of x [rows, columns] where they lie.
template <typename In>
bool rows_are_parts(const In* x, const Axis& row, const Axis& column, int64_t rows,
                    int64_t columns) {
  return sizeof(In) == 2 && reinterpret_cast<uintptr_t>(x) % 16 == 0 && column.step == 1 &&
         column.inner == 0 && row.inner == 0 && row.step % 8 == 0 && row.step >= columns &&
         std::min(rows, kLongestPartsSum) * row.step < int64_t{1} << 39;
}

// sum (of one group) += alpha x^T x, x [rows, sum.order] for which rows_are_parts holds.
template <typename In>
Work<float> plan_symmetric_parts(const In* x, int64_t row_step, int64_t rows,
                                 const SymmetricSum<float>& sum,
                                 const SymmetricPartsLimits& limits = {}) {
  const SymmetricPartsBlocks blocks(parts_type_of<In>(), sum.order, rows, limits.most_rows,
                                    limits.column_tile);
  return {blocks.workspace(), [=](float* workspace, cudaStream_t stream) {
            return blocks.each([&](int64_t first, int64_t count, const PartsProduct& product) {
              const PartsMatrix matrix{x + first * row_step, count, sum.order, row_step,
                                       count * row_step};
              return product.run(matrix, matrix, added_to(sum), workspace, stream);
            });
          }};
}

// The same from rows that pack(first row, PackedRows to, stream) writes, to.rows of them, as parts
// of that type; scaled: and their exponents. together: a block of rows is a multiple of so many.
template <class Pack>
Work<float> plan_packed_symmetric(PartsType type, bool scaled, int64_t rows, int64_t together,
                                  const SymmetricSum<float>& sum,
                                  const SymmetricPartsLimits& limits, Pack pack) {
  const int64_t part_count = type == PartsType::kTwoFloat16 ? 2 : 1;
  const int64_t row_bytes = part_count * (ceil_div(sum.order, 8) * 8) * 2;
  const int64_t most =
      std::min(std::max(limits.bytes / row_bytes, limits.least_rows), limits.most_rows);
  const SymmetricPartsBlocks blocks(
      type, sum.order, rows, std::max<int64_t>(most / together, 1) * together, limits.column_tile);
  const PackedPlace place(blocks.workspace(), part_count, blocks.block, sum.order);
  return {place.end, [=](float* workspace, cudaStream_t stream) {
            return blocks.each([&](int64_t first, int64_t count, const PartsProduct& product) {
              const PackedRows to = place.in(workspace, count);
              const cudaError_t error = pack(first, to, stream);
              if (error != cudaSuccess) return error;
              const PartsMatrix matrix = matrix_of(to, scaled ? to.exponents : nullptr);
              return product.run(matrix, matrix, added_to(sum), workspace, stream);
            });
          }};
}

// The same from any source of float32, bfloat16 or float16 with sum.order columns; Parts: 2, or 1
// of float32 where TF32 is allowed. along_rows: rows lie side by side in memory.
template <int Parts, class Source>
Work<float> plan_packed_symmetric(const Source& source, bool along_rows, int64_t rows,
                                  const SymmetricSum<float>& sum,
                                  const SymmetricPartsLimits& limits = {}) {
  using Value = typename Source::Value;
  constexpr PartsType kType = Parts == 2                        ? PartsType::kTwoFloat16
                              : std::is_same_v<Value, BFloat16> ? PartsType::kBFloat16
                                                                : PartsType::kFloat16;
  return plan_packed_symmetric(kType, sizeof(Value) == 4, rows, 1, sum, limits,
                               [=](int64_t first, const PackedRows& to, cudaStream_t stream) {
                                 return pack_rows<Parts>(source, first, along_rows, to, stream);
                               });
}

}  // namespace hesskern::cuda
