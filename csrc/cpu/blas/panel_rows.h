// Panels of columns: what Gram products take a matrix in.
#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace hesskern::cpu {

// Columns of a panel.
template <class T, class Isa>
constexpr int kPanel = kLanes<T, Isa> * Isa::kVectors;

template <class T>
inline int64_t panel_width() {
  return simd_lanes<T>() * 2;
}
static_assert(Avx512::kVectors == 2 && Avx2::kVectors == 2 && Baseline::kVectors == 2);

// Rows of P that a panel holds at once: 16 KB of float32, half the first-level cache.
constexpr int64_t kPanelRows = 128;

// Where the panels of a range of rows are: element (k, c) of panel p is at
// base[p * stride + k * ld + c]. Row-major storage has stride = W. Columns from `columns` on,
// counted over all panels, are not there to be read.
template <class T>
struct Panels {
  const T* base;
  int64_t stride, ld, columns;
};

}  // namespace hesskern::cpu
