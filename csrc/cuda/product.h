// The loop of every product: tiles of both operands through double-buffered shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "warp.h"

namespace hesskern::cuda {

// A block's dynamic shared memory: two buffers for tiles of both operands, then their tables.
template <class StageA, class StageB>
struct ProductMemory {
  using Value = typename StageA::Value;
  static constexpr int kSizeA = StageA::Layout::kSize;
  static constexpr int kSize = kSizeA + StageB::Layout::kSize;
  static constexpr size_t kTileBytes = 2 * sizeof(Value) * kSize;
  static constexpr size_t kBytes = kTileBytes + StageA::kTableBytes + StageB::kTableBytes;
  static_assert(kTileBytes % 16 == 0);

  __device__ static Value* tiles() { return reinterpret_cast<Value*>(dynamic_shared()); }
  __device__ static unsigned char* table_a() { return dynamic_shared() + kTileBytes; }
  __device__ static unsigned char* table_b() { return table_a() + StageA::kTableBytes; }
};

// tile += the product of the operands over rows begin, ..., end - 1, begin a multiple of the depth.
// same: both operands are a.
template <class Tile, class StageA, class StageB>
__device__ void multiply(Tile& tile, StageA& a, StageB& b, bool same, int64_t begin, int64_t end) {
  using Memory = ProductMemory<StageA, StageB>;
  typename Tile::Value* shared = Memory::tiles();
  // The tables are complete.
  __syncthreads();
  if (begin >= end) return;
  a.load(begin);
  if (!same) b.load(begin);
  a.store(shared);
  if (!same) b.store(shared + Memory::kSizeA);
  __syncthreads();
  for (int64_t k = begin;; k += Tile::kDepth) {
    const bool more = k + Tile::kDepth < end;
    if (more) {
      a.load(k + Tile::kDepth);
      if (!same) b.load(k + Tile::kDepth);
    }
    tile.add(shared, a.layout(), same ? shared : shared + Memory::kSizeA, b.layout());
    if (!more) break;
    // The other buffer was last read before the last barrier.
    shared = shared == Memory::tiles() ? shared + Memory::kSize : Memory::tiles();
    a.store(shared);
    if (!same) b.store(shared + Memory::kSizeA);
    __syncthreads();
  }
}

}  // namespace hesskern::cuda
