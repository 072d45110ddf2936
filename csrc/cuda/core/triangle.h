// The upper triangle of a square of tiles, one after another.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hesskern::cuda {

struct TilePlace {
  int64_t row, column;
};

__host__ __device__ inline int64_t triangle_size(int64_t tiles) {
  return tiles * (tiles + 1) / 2;
}

// Place of a tile of the triangle row <= column < tiles. The triangle is folded into a rectangle,
// row r beside the row that completes it, so that no place needs a square root.
__host__ __device__ inline TilePlace triangle_place(int64_t index, int64_t tiles) {
  const int64_t even = 1 - tiles % 2, width = tiles + even;
  const int64_t row = index / width, column = index % width;
  if (column >= row + even) return {row, column - even};
  return {tiles - even - row, tiles - 1 - column};
}

}  // namespace hesskern::cuda
