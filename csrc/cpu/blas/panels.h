// Whole operands in panels for the microkernels: a matrix [rows, columns] becomes
// [ceil(columns / width), rows, width], zero beyond its last column.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/vector.h"
#include "pack.h"

namespace hesskern::cpu {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Row stride of at least n elements that spreads the rows over all cache sets:
// an odd number of cache lines.
template <typename T>
inline int64_t spread_stride(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((n + kLine - 1) / kLine | 1) * kLine;
}

// Rows [row0, row0 + rows) of panels with panel_rows rows each, from
// x [rows, columns] with any strides. Contiguous rows are read in order.
template <typename T>
void pack_panels(T* panels, int64_t panel_rows, int64_t row0, const T* x, int64_t rows,
                 int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t width = 2 * simd_lanes<T>(), panel_stride = panel_rows * width;
  T* first = panels + row0 * width;
  int64_t column = 0;
  if (column_stride == 1) {
    column = columns / width * width;
    with_simd([=](auto isa) HESSKERN_INLINE {
      using Isa = decltype(isa);
      constexpr int kWidth = 2 * kLanes<T, Isa>;
      for (int64_t r = 0; r < rows; ++r) {
        const T* source = x + r * row_stride;
        T* target = first + r * kWidth;
        for (int64_t j = 0; j < column; j += kWidth, target += panel_stride) {
          Vector<T, Isa> left, right;
          load<T, Isa>(left, source + j);
          load<T, Isa>(right, source + j + kWidth / 2);
          store<T, Isa>(target, left);
          store<T, Isa>(target + kWidth / 2, right);
        }
      }
    });
  }
  for (; column < columns; column += width) {
    pack_panel<T>(first + column / width * panel_stride, width, x + column * column_stride,
                  row_stride, column_stride, rows, std::min(width, columns - column));
  }
}

}  // namespace hesskern::cpu
