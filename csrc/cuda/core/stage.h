// One operand's way from global to shared memory, a tile [Depth, Extent] at a time: held in
// registers while the tile before it is multiplied, or copied past them, some tiles ahead.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "elements.h"
#include "launch.h"
#include "warp.h"

namespace hesskern::cuda {

// Along which index memory is contiguous: fixed where a kernel is compiled for it, so that places
// in shared memory are constants, or known when it runs.
enum class Order { kAlongI, kAlongK, kEither };

template <Order kOrder>
__device__ inline bool is_along_k(bool along_k) {
  return kOrder == Order::kEither ? along_k : kOrder == Order::kAlongK;
}

// Which index neighbouring threads take and neighbouring words of shared memory hold. The padding
// spreads what a warp reads for one product over all banks.
template <typename T, int Extent, int Depth>
struct TileLayout {
  // Rows of 16-bit elements begin at multiples of 16 bytes, as load_matrices wants them.
  static constexpr int kPadding = sizeof(T) == 2 ? 8 : sizeof(T) == 4 ? 4 : 1;
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

// Through registers, from any source: Value, Row row(k), Column column(i), Value load(Row, Column);
// zeros outside. Finding a column may take divisions, and remembering several would take registers:
// a block finds its columns once and keeps them in shared memory.
template <class Source, int Extent, int Depth>
class Stage {
 public:
  using Value = typename Source::Value;
  using Column = typename Source::Column;
  using Layout = TileLayout<Value, Extent, Depth>;
  static constexpr int kBuffers = 2;
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

// Past the registers, from a matrix for which copies_in_pieces holds.
template <typename Value_, int Extent, int Depth>
class CopyStage {
 public:
  using Value = Value_;
  using Layout = TileLayout<Value, Extent, Depth>;
  static constexpr int kBuffers = 4;
  static constexpr int kPiece = 16 / sizeof(Value);
  static constexpr int kCount = Extent * Depth / kPiece / kThreads;
  static constexpr size_t kTableBytes = 0;
  static_assert(kCount * kThreads * kPiece == Extent * Depth);
  static_assert(Layout::kSize * sizeof(Value) % 16 == 0);

  // rows: of a tile that hold something; the others are zero.
  __device__ CopyStage(const Elements<Value>& source, bool along_k, int64_t first, unsigned char*,
                       int rows = Depth)
      : layout_(along_k),
        along_k_(along_k),
        rows_(rows),
        row_step_(source.k_axis.step),
        k_end_(source.k_end) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int64_t columns = source.i_end - first - column(n);
      inside_[n] = columns >= kPiece ? kPiece : columns > 0 ? static_cast<int>(columns) : 0;
      // A place outside is never read.
      from_[n] = source.data + row(n) * row_step_ + (first + column(n)) * source.i_axis.step;
    }
  }

  __device__ const Layout& layout() const { return layout_; }

  // The next tile to copy begins with row k, along k a multiple of kPiece.
  __device__ void start(int64_t k) {
    left_ = k_end_ - k;
#pragma unroll
    for (int n = 0; n < kCount; ++n) from_[n] += k * row_step_;
  }

  // Starts to copy the next rows to tile [kSize].
  __device__ void copy(Value* tile) {
    const int rows = left_ < rows_ ? static_cast<int>(left_) : rows_;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int here = rows - row(n);
      int count = here > 0 ? inside_[n] : 0;
      if (along_k_) count = inside_[n] == 0 || here < 0 ? 0 : here < kPiece ? here : kPiece;
      copy_piece(tile + layout_.index(row(n), column(n)), from_[n],
                 count * static_cast<int>(sizeof(Value)));
      from_[n] += rows_ * row_step_;
    }
    left_ -= rows_;
  }

 private:
  // Where the thread's piece n begins within a tile.
  __device__ int across() const { return (along_k_ ? Depth : Extent) / kPiece; }
  __device__ int along() const { return static_cast<int>(threadIdx.x) % across() * kPiece; }
  __device__ int other(int n) const {
    return static_cast<int>(threadIdx.x) / across() + n * (kThreads / across());
  }
  __device__ int row(int n) const { return along_k_ ? along() : other(n); }
  __device__ int column(int n) const { return along_k_ ? other(n) : along(); }

  Layout layout_;
  bool along_k_;
  int rows_;
  int64_t row_step_, k_end_, left_ = 0;
  const Value* from_[kCount];
  int inside_[kCount];
};

// Whether the matrix can be copied 16 bytes at a time along the axis in which it is contiguous.
template <typename T>
bool copies_in_pieces(const T* data, const Axis& contiguous, const Axis& other) {
  constexpr int64_t piece = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && contiguous.step == 1 &&
         contiguous.inner == 0 && other.inner == 0 && other.step % piece == 0;
}

}  // namespace hesskern::cuda
