// acc += alpha sum_k r_k r_k^T over rows r_k of any source, one triangle of tiles. Where the
// triangle has too few tiles to fill the device, blocks share the rows and leave partial sums,
// which a second kernel adds in fixed order: the result never depends on timing.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "axis.h"
#include "launch.h"
#include "product.h"
#include "splits.h"
#include "tile.h"
#include "triangle.h"
#include "work.h"

namespace hesskern::cuda {

template <class T>
struct Tag {
  using Type = T;
};

// visit(Tag<Large>) or visit(Tag<Small>), tiles of 128 x 128 and 64 x 64, for sums of that order.
template <class Large, class Small, class Visit>
auto with_larger_or_smaller(int64_t order, Visit visit) {
  // Large tiles read less per product, small ones fit small orders more closely.
  const int64_t small = triangle_size(ceil_div(order, 64)) * (64 * 64);
  const int64_t large = triangle_size(ceil_div(order, 128)) * (128 * 128);
  if (3 * small < 2 * large) return visit(Tag<Small>());
  return visit(Tag<Large>());
}

// visit(Tag<Tile>) with the tile for elements of In and sums of that order; tf32: float32 may be
// rounded to it.
template <typename In, int Depth, class Visit>
auto with_symmetric_tile(int64_t order, bool tf32, Visit visit) {
  if constexpr (sizeof(In) == 8) {
    return visit(Tag<FmaTile<64, 64, Depth>>());
  } else if constexpr (sizeof(In) == 2) {
    return with_larger_or_smaller<HalfTile<In, 128, 128, Depth>, HalfTile<In, 64, 64, Depth>>(
        order, visit);
  } else if (tf32) {
    return with_larger_or_smaller<TensorTile<1, 128, 128, Depth>, TensorTile<1, 64, 64, Depth>>(
        order, visit);
  } else {
    return with_larger_or_smaller<TensorTile<3, 128, 128, Depth>, TensorTile<3, 64, 64, Depth>>(
        order, visit);
  }
}

// How the work is cut: tiles of the triangle, and splits of the rows, each of so many rows.
struct SymmetricPlan {
  int64_t tiles, splits, split_rows;
};

// Rows in one float32 sum of a thread, which takes sums of 64 rows: longer ones lose digits.
constexpr int64_t kLongestSplit = 1 << 17;

// order: of acc; rows: of the source.
template <class Tile>
SymmetricPlan plan_symmetric(int64_t groups, int64_t order, int64_t rows) {
  constexpr int64_t depth = Tile::kDepth;
  const int64_t slots = current_device().processors * blocks_per_processor<Tile>();
  const int64_t tiles = triangle_size(ceil_div(order, Tile::kRows));
  const int64_t steps = ceil_div(rows, depth);
  constexpr int64_t kWrite = 8, kFewest = 16, kMost = 64;
  const int64_t least = ceil_div(rows, kLongestSplit);
  const Splits splits =
      plan_splits(groups * tiles, steps, slots, kWrite, least, std::min(kMost, steps / kFewest));
  return {tiles, splits.count, splits.share * depth};
}

// What one block does of a plan: a tile of one group's sum, over some rows.
template <class Tile>
struct SymmetricBlock {
  int64_t group, row0, column0, begin, end, part;
  bool diagonal;

  __device__ SymmetricBlock(const SymmetricPlan& plan, int64_t order, int64_t rows) {
    static_assert(Tile::kRows == Tile::kColumns);
    // Neighbouring blocks take different tiles of the same rows, which they find in the L2 cache.
    const int64_t item = blockIdx.x;
    const int64_t index = item % plan.tiles, split = item / plan.tiles % plan.splits;
    group = item / plan.tiles / plan.splits;
    const TilePlace place = triangle_place(index, ceil_div(order, Tile::kRows));
    row0 = place.row * Tile::kRows;
    column0 = place.column * Tile::kColumns;
    diagonal = place.row == place.column;
    begin = split * plan.split_rows;
    end = begin + plan.split_rows < rows ? begin + plan.split_rows : rows;
    part = (group * plan.tiles + index) * plan.splits + split;
  }

  // The tile to the sum, or to its place in partial [groups, tiles, splits, rows x columns of a
  // tile], which is null with one split.
  template <typename Sum>
  __device__ void finish(Tile& tile, const SymmetricSum<Sum>& sum, Sum* partial) const {
    if (partial == nullptr) {
      tile.each([&](int i, int j, Sum value) { add_to(sum, group, row0 + i, column0 + j, value); });
      return;
    }
    Sum* out = partial + part * (Tile::kRows * Tile::kColumns);
    tile.each([&](int i, int j, Sum value) { out[i * Tile::kColumns + j] = value; });
  }
};

template <class Tile, class StageType, Order kOrder, class Source>
__global__ void __launch_bounds__(kThreads, blocks_per_processor<Tile>())
    symmetric_kernel(Source source, bool along_k, int64_t rows, SymmetricPlan plan,
                     SymmetricSum<typename Tile::Sum> sum, typename Tile::Sum* partial) {
  const SymmetricBlock<Tile> block(plan, sum.order, rows);
  source.select(block.group);
  Tile tile;
  using Memory = ProductMemory<StageType, StageType>;
  StageType a(source, is_along_k<kOrder>(along_k), block.row0, Memory::table_a());
  StageType b(source, is_along_k<kOrder>(along_k), block.column0, Memory::table_b());
  multiply(tile, a, b, block.diagonal, block.begin, block.end);
  block.finish(tile, sum, partial);
}

// Adds the partial sums of every tile in the order of the splits.
template <typename T, int Side>
__global__ void __launch_bounds__(kThreads)
    add_partial_kernel(SymmetricPlan plan, SymmetricSum<T> sum, const T* partial) {
  const int64_t parts = ceil_div(Side * Side, kThreads);
  const int64_t item = blockIdx.x / parts;
  const int64_t element = blockIdx.x % parts * kThreads + threadIdx.x;
  const TilePlace place = triangle_place(item % plan.tiles, ceil_div(sum.order, Side));
  const T* values = partial + item * plan.splits * (Side * Side) + element;
  T total = values[0];
  for (int64_t split = 1; split < plan.splits; ++split) total += values[split * (Side * Side)];
  add_to(sum, item / plan.tiles, place.row * Side + element / Side,
         place.column * Side + element % Side, total);
}

// Work of a kernel with one block per tile and split, which start(launcher, partial) starts: what
// the splits leave in the workspace is added up.
template <class Tile, class Kernel, class Start>
Work<typename Tile::Sum> symmetric_work(Kernel kernel, size_t shared_bytes,
                                        const SymmetricPlan& plan,
                                        const SymmetricSum<typename Tile::Sum>& sum, Start start) {
  using Sum = typename Tile::Sum;
  constexpr int kSide = Tile::kRows;
  const int64_t tiles = sum.groups * plan.tiles;
  const int64_t workspace = plan.splits == 1 ? 0 : tiles * plan.splits * kSide * kSide;
  return {workspace, [=](Sum* memory, cudaStream_t stream) {
            Sum* partial = plan.splits == 1 ? nullptr : memory;
            const cudaError_t error = start(
                [&](const auto&... arguments) {
                  return launch(kernel, dim3(static_cast<unsigned>(tiles * plan.splits)),
                                dim3(kThreads), shared_bytes, stream, arguments...);
                },
                partial);
            if (error != cudaSuccess || partial == nullptr) return error;
            return launch(add_partial_kernel<Sum, kSide>,
                          dim3(static_cast<unsigned>(tiles * ceil_div(kSide * kSide, kThreads))),
                          dim3(kThreads), 0, stream, plan, sum, partial);
          }};
}

// sum += alpha times the products of the source's rows.
template <class Tile, class StageType, Order kOrder, class Source>
Work<typename Tile::Sum> plan_update(const Source& source, bool along_k, int64_t rows,
                                     const SymmetricSum<typename Tile::Sum>& sum) {
  const SymmetricPlan plan = plan_symmetric<Tile>(sum.groups, sum.order, rows);
  return symmetric_work<Tile>(symmetric_kernel<Tile, StageType, kOrder, Source>,
                              ProductMemory<StageType, StageType>::kBytes, plan, sum,
                              [=](auto start, typename Tile::Sum* partial) {
                                return start(source, along_k, rows, plan, sum, partial);
                              });
}

}  // namespace hesskern::cuda
