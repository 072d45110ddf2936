#include <algorithm>
#include <limits>

#include "core/launch.h"
#include "core/triangle.h"
#include "mirror.h"

namespace hesskern::cuda {

namespace {

constexpr int kTile = 32;
constexpr int kRows = 8;

// acc [groups, d, d]; a block moves one tile at a time from the source triangle
// through shared memory, so that its reads and its writes both run along x.
template <typename T>
__global__ void __launch_bounds__(kTile* kRows)
    mirror_kernel(T* acc, int64_t groups, int64_t d, int64_t stride_group, int64_t stride_y,
                  int64_t stride_x, bool source_is_lower) {
  // One column more than a tile: a column is then read from distinct banks.
  __shared__ T tile[kTile][kTile + 1];
  const int64_t tiles = ceil_div(d, kTile);
  const int64_t per_matrix = triangle_size(tiles);
  const int x = threadIdx.x;

  for (int64_t item = blockIdx.x; item < groups * per_matrix; item += gridDim.x) {
    T* a = acc + item / per_matrix * stride_group;
    const TilePlace place = triangle_place(item % per_matrix, tiles);
    const int64_t i = place.row, j = place.column;
    const int64_t source_y0 = (source_is_lower ? j : i) * kTile;
    const int64_t source_x0 = (source_is_lower ? i : j) * kTile;

    for (int y = threadIdx.y; y < kTile; y += kRows) {
      if (source_y0 + y < d && source_x0 + x < d) {
        tile[y][x] = a[(source_y0 + y) * stride_y + (source_x0 + x) * stride_x];
      }
    }
    __syncthreads();
    for (int y = threadIdx.y; y < kTile; y += kRows) {
      const bool inside = source_x0 + y < d && source_y0 + x < d;
      // On a diagonal tile only the strict target triangle changes.
      const bool target = i != j || (source_is_lower ? x > y : x < y);
      if (inside && target) {
        a[(source_x0 + y) * stride_y + (source_y0 + x) * stride_x] = tile[x][y];
      }
    }
    __syncthreads();
  }
}

}  // namespace

template <typename T>
cudaError_t mirror(T* acc, int64_t groups, int64_t d, int64_t stride_group, int64_t stride_row,
                   int64_t stride_col, cudaStream_t stream) {
  const int64_t tiles = ceil_div(d, kTile);
  const int64_t items = groups * triangle_size(tiles);
  if (items == 0) return cudaSuccess;
  // Neighbouring threads take the axis with the smaller stride. Swapping the axes
  // of a column-major matrix turns its upper triangle into the lower one.
  const bool column_major = stride_row < stride_col;
  const int64_t stride_y = column_major ? stride_col : stride_row;
  const int64_t stride_x = column_major ? stride_row : stride_col;
  const int64_t blocks = std::min<int64_t>(items, std::numeric_limits<int32_t>::max());
  return launch(mirror_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kTile, kRows), 0,
                stream, acc, groups, d, stride_group, stride_y, stride_x, column_major);
}

template cudaError_t mirror<float>(float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                                   cudaStream_t);
template cudaError_t mirror<double>(double*, int64_t, int64_t, int64_t, int64_t, int64_t,
                                    cudaStream_t);

}  // namespace hesskern::cuda
