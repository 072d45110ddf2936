// One operand's way from global to shared memory: a tile [Depth, Extent] at a time, held in
// registers while the tile before it is multiplied.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace hesskern::cuda {

// Which index neighbouring threads take and neighbouring words of shared memory hold. The padding
// spreads what a warp reads for one product over all banks.
template <typename T, int Extent, int Depth>
struct TileLayout {
  static constexpr int kPadding = sizeof(T) == 4 ? 4 : 1;
  static constexpr int kSize = Depth * (Extent + 8) > Extent*(Depth + kPadding)
                                   ? Depth * (Extent + 8)
                                   : Extent * (Depth + kPadding);

  // along_k: memory is contiguous along k rather than along i.
  __device__ explicit TileLayout(bool along_k)
      : k_step(along_k ? 1 : Extent + 8), i_step(along_k ? Depth + kPadding : 1) {
    const int thread = static_cast<int>(threadIdx.x);
    k0 = along_k ? thread % Depth : thread / Extent;
    i0 = along_k ? thread / Depth : thread % Extent;
    k_next = along_k ? 0 : kThreads / Extent;
    i_next = along_k ? kThreads / Depth : 0;
  }

  int k_step, i_step;
  // The thread's elements are (k0 + n k_next, i0 + n i_next).
  int k0, i0, k_next, i_next;

  __device__ int index(int k, int i) const { return k * k_step + i * i_step; }
};

// Source: Value, Row row(k), Column column(i), Value load(Row, Column); zeros outside. Finding a
// column may take divisions, and remembering several would take registers: a block finds its
// columns once and keeps them in shared memory.
template <class Source, int Extent, int Depth>
class Stage {
 public:
  using Value = typename Source::Value;
  using Column = typename Source::Column;
  using Layout = TileLayout<Value, Extent, Depth>;
  static constexpr int kCount = Extent * Depth / kThreads;
  static constexpr size_t kTableBytes = Extent * sizeof(Column);
  static_assert(kCount * kThreads == Extent * Depth && Extent <= kThreads && Depth <= kThreads);
  static_assert(kTableBytes % 16 == 0);

  // first: the tile's first column i; table: kTableBytes of shared memory, to be read after the
  // next barrier.
  __device__ Stage(const Source& source, bool along_k, int64_t first, unsigned char* table)
      : source_(source), layout_(along_k), columns_(reinterpret_cast<Column*>(table)) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < Extent) columns_[thread] = source.column(first + thread);
  }

  __device__ const Layout& layout() const { return layout_; }

  // Rows k, ..., k + Depth - 1 into registers.
  __device__ void load(int64_t k) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      values_[n] = source_.load(source_.row(k + layout_.k0 + n * layout_.k_next),
                                columns_[layout_.i0 + n * layout_.i_next]);
    }
  }

  // From there to tile [kSize] in shared memory.
  __device__ void store(Value* tile) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      tile[layout_.index(layout_.k0 + n * layout_.k_next, layout_.i0 + n * layout_.i_next)] =
          values_[n];
    }
  }

 private:
  const Source& source_;
  Layout layout_;
  Column* columns_;
  Value values_[kCount];
};

}  // namespace hesskern::cuda
