// The loop of every product: tiles of both operands through buffers in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "stage.h"
#include "warp.h"

namespace hesskern::cuda {

// A block's dynamic shared memory: buffers for tiles of both operands, then their tables.
template <class StageA, class StageB>
struct ProductMemory {
  using Value = typename StageA::Value;
  static constexpr int kSizeA = StageA::Layout::kSize;
  static constexpr int kSize = kSizeA + StageB::Layout::kSize;
  static constexpr int kBuffers = StageA::kBuffers;
  static constexpr size_t kTileBytes = kBuffers * sizeof(Value) * kSize;
  static constexpr size_t kBytes = kTileBytes + StageA::kTableBytes + StageB::kTableBytes;
  static_assert(kTileBytes % 16 == 0 && StageB::kBuffers == kBuffers);

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

// The same with tiles that are copied while those before them are multiplied, as many ahead as
// there are buffers but one.
template <class Tile, typename T, int Rows, int Columns, int Depth>
__device__ void multiply(Tile& tile, CopyStage<T, Rows, Depth>& a, CopyStage<T, Columns, Depth>& b,
                         bool same, int64_t begin, int64_t end) {
  using Memory = ProductMemory<CopyStage<T, Rows, Depth>, CopyStage<T, Columns, Depth>>;
  constexpr int kAhead = Memory::kBuffers - 1;
  static_assert((Memory::kBuffers & kAhead) == 0);
  const auto buffer = [](int step) { return Memory::tiles() + (step & kAhead) * Memory::kSize; };
  const int steps = begin < end ? static_cast<int>((end - begin + Depth - 1) / Depth) : 0;
  const auto start = [&](int step) {
    if (step < steps) {
      a.copy(buffer(step));
      if (!same) b.copy(buffer(step) + Memory::kSizeA);
    }
    // Groups are counted by steps, so that steps without copies have one too.
    close_copies();
  };
  a.start(begin);
  b.start(begin);
#pragma unroll
  for (int step = 0; step < kAhead; ++step) start(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kAhead - 1>();
    // Every thread's copies of this step are there, and the buffer of the step before is free.
    __syncthreads();
    start(step + kAhead);
    const T* shared = buffer(step);
    tile.add(shared, a.layout(), same ? shared : shared + Memory::kSizeA, b.layout());
  }
}

}  // namespace hesskern::cuda
