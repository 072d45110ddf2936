// A block is one producer thread, which has boxes of both operands copied to a ring of stages in
// shared memory, and two warpgroups, each with half of a tile of 128 x N in registers. One block a
// multiprocessor takes items: whole tiles, as many as fill all multiprocessors some times over, and
// splits of k (split-K) of the tiles that are left, whose sums a second kernel adds in fixed order.
// All blocks walk along the same rows, so that these come from memory once a wave of tiles.
//
// Tensor cores cut their sums off: with non-negative data every sixteen rows lose about 10^-8 of
// the sum, all in one direction. So sums run over 64 rows (128 of one product) only and are then
// added, rounded, to others (flushed). Both do not fit into registers for a tile of 128 x 256: a
// warpgroup multiplies the left and the right half of its 64 x 256 in turn, with a chunk of stages
// that stay until both are done, and needs 128 + 64 registers. While it flushes, the other one
// multiplies.
//
// Floor: 2 m n k operations, three times for two float16, at the rate of 16-bit products, which the
// card's power sets; shared memory: of its 128 bytes a cycle the instructions' reads take 96 and
// the copies' writes 32 with three products of 128 x 256 (43 of 128 x 128), 48 (64) with one.
#include <algorithm>
#include <type_traits>

#include "barrier.h"
#include "device.h"
#include "elements.h"
#include "float16_parts.h"
#include "launch.h"
#include "parts_product.h"
#include "splits.h"
#include "tensor_map.h"
#include "warp.h"
#include "wgmma.h"

namespace hesskern::cuda {

// Not without a name: where the kernel's body is left out, much of it would be unused.
namespace parts {

constexpr int kTileRows = 128;

// T: of the elements. Parts: 1 or 2, with 1 or 3 products. Columns: of a block's tile. Rows: of k
// in a stage. Chunk: stages that are multiplied before their sums are flushed.
template <typename T_, int Parts, bool AlongK, int Columns, int Rows, int Chunk>
struct Config {
  using T = T_;
  static constexpr int kParts = Parts, kColumns = Columns, kRows = Rows, kChunk = Chunk;
  static constexpr bool kAlongK = AlongK;
  static constexpr int kWide = 128, kHalves = Columns / kWide, kThreads = 384;
  static constexpr int kProducts = Parts == 1 ? 1 : 3;
  static constexpr int kLine = 2 * kBoxColumns;
  // Across k: boxes of 64 columns of the tile, all parts of them. Along k: 64 of k, one part.
  static constexpr int kBox = kLine * Rows * Parts;
  static constexpr int kBoxesA = kTileRows / kBoxColumns, kBoxesB = Columns / kBoxColumns;
  static constexpr int kBytesA = 2 * kTileRows * Rows * Parts, kBytesB = 2 * Columns * Rows * Parts;
  static constexpr int kStage = kBytesA + kBytesB;
  // What a block may have, less the barriers and what it takes to begin at a multiple of 1024.
  static constexpr int kStages = (227 * 1024 - 2048) / kStage / Chunk * Chunk;
  static constexpr size_t kShared = kStages * kStage + 1024;
  static_assert(Columns % kWide == 0 && kHalves <= 2 && kStages >= 2 * Chunk);
  static_assert(kBox % 1024 == 0 && kBytesA % 1024 == 0);
  static_assert(!AlongK || Rows == kBoxColumns);

  // What wgmma is told about an operand, 64 bits: 0-13, address / 16; 16-29, "leading" and 32-45,
  // "stride" distance / 16; 62-63, swizzle: 1, of 128 bytes.
  // Across k (neighbours in memory along M or N): eight k are 1024 bytes, a row of 128 bytes (64
  // columns) each, whose 16-byte piece i is at i ^ k % 8; "stride": to the next eight k; "leading":
  // to the next 64 columns. Sixteen k on, the address is 2048 larger.
  // Along k: eight rows of 128 bytes, piece i of row r at i ^ r % 8; "stride": to the next eight
  // rows; "leading" is not used. Sixteen k on, the address is 32 larger.
  // The copies write the same exchange of pieces; it goes by address bits: every stage begins at a
  // multiple of 1024.
  static constexpr uint32_t kDescriptorHigh = 1u << 30 | 1024 / 16;
  static constexpr uint32_t kDescriptorLow = (AlongK ? 1u : kBox / 16u) << 16;
  // Bytes from one part, 16 of k, 64 rows of A, and kWide columns of B to the next.
  static constexpr int kPartA = AlongK ? kTileRows * kLine : Rows * kLine;
  static constexpr int kPartB = AlongK ? Columns * kLine : Rows * kLine;
  static constexpr int kStep = AlongK ? 32 : 16 * kLine;
  static constexpr int kGroupA = AlongK ? 64 * kLine : kBox;
  static constexpr int kGroupB = AlongK ? kWide * kLine : kWide / kBoxColumns * kBox;

  // Small products first, low by high: the sums that tensor cores cut off are small then.
  __host__ __device__ static constexpr int part_a(int product) {
    return kParts == 2 && product == 0 ? 1 : 0;
  }
  __host__ __device__ static constexpr int part_b(int product) {
    return kParts == 2 && product == 1 ? 1 : 0;
  }
};

template <typename T, int Columns>
using OneProduct = Config<T, 1, false, Columns, 64, 2>;
template <int Columns>
using ThreeProducts = Config<Float16, 2, false, Columns, 32, 2>;
template <int Columns>
using ThreeAlongK = Config<Float16, 2, true, Columns, 64, 1>;

using Two = Pair<float>;
using Four = cuda::Four<float>;

struct Target {
  PartsTarget to;
  const int *exponents_a, *exponents_b;
  int m, n;
  bool triangle;
  PartsScale scale;

  __device__ float* place(int row, int column) const {
    return to.c + row * to.row_step + column * to.column_step;
  }
  __device__ bool wanted(int row, int column) const {
    return row < m && column < n && !(triangle && row > column);
  }
  // Both this element and the next in the row are wanted, and lie side by side at a multiple of 8
  // bytes.
  __device__ bool pair(int row, int column) const {
    return to.column_step == 1 && wanted(row, column) && column + 1 < n &&
           reinterpret_cast<uintptr_t>(place(row, column)) % 8 == 0;
  }
  __device__ int exponent_a(int row) const {
    return exponents_a != nullptr && row < m ? read_only(exponents_a + row) : 0;
  }
  __device__ int exponent_b(int column) const {
    return exponents_b != nullptr && column < n ? read_only(exponents_b + column) : 0;
  }
};

// Where a matrix's columns lie that come in pieces.
struct Gaps {
  int width = 0, gap = 0;

  Gaps() = default;
  explicit Gaps(const PartsMatrix& matrix)
      : width(static_cast<int>(matrix.width)), gap(static_cast<int>(matrix.gap)) {}
  __device__ int place(int column) const {
    return width == 0 ? column : column + column / width * gap;
  }
};

// values(j), j < Count, of a thread: elements (row, column + 8 j), the next in the row, and the
// two in row + 8. Scaled: the target has a scale. What several j need of memory is read before
// anything is written: the compiler must assume that one changes the other, and would wait for
// each.
template <int Count, bool Scaled, class Values>
__device__ inline void put_rows(const Target& target, int row, int column, Values values) {
  constexpr int kGroup = Count < 4 ? Count : 4;
  static_assert(Count % kGroup == 0);
  const int down[2] = {target.exponent_a(row), target.exponent_a(row + 8)};
#pragma unroll
  for (int first = 0; first < Count; first += kGroup) {
    int across[kGroup][2];
    Two old[kGroup][2];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int at = column + 8 * (first + i);
      across[i][0] = target.exponent_b(at);
      across[i][1] = target.exponent_b(at + 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        old[i][r] = {};
        if (target.to.add && target.pair(row + 8 * r, at)) {
          old[i][r] = *reinterpret_cast<const Two*>(target.place(row + 8 * r, at));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int at = column + 8 * (first + i);
      const Four sum = values(first + i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float left = sum.value[2 * r], right = sum.value[2 * r + 1];
        if (target.exponents_a != nullptr || target.exponents_b != nullptr) {
          left = times_power(left, -down[r] - across[i][0]);
          right = times_power(right, -down[r] - across[i][1]);
        }
        left *= target.to.alpha;
        right *= target.to.alpha;
        const int here = row + 8 * r;
        if constexpr (Scaled) {
          const float* scale = target.scale.row(here) + at * target.scale.column_step;
          if (target.wanted(here, at)) left *= read_only(scale);
          scale += target.scale.column_step;
          if (target.wanted(here, at + 1)) right *= read_only(scale);
        }
        float* c = target.place(here, at);
        if (target.pair(here, at)) {
          *reinterpret_cast<Two*>(c) = {{old[i][r].value[0] + left, old[i][r].value[1] + right}};
        } else {
          if (target.wanted(here, at)) *c = target.to.add ? *c + left : left;
          c += target.to.column_step;
          if (target.wanted(here, at + 1)) *c = target.to.add ? *c + right : right;
        }
      }
    }
  }
}

// put(whether it has a scale); of one product it has none.
template <int Most, class Put>
__device__ inline void with_scale(const Target& target, Put put) {
  if constexpr (Most > 1) {
    if (target.scale.data != nullptr) return put(std::true_type());
  }
  put(std::false_type());
}

// Tiles in bands of eight rows of tiles, column by column: a wave reads few columns.
__device__ inline void place(const PartsSchedule& schedule, int tile, int& row, int& column) {
  constexpr int kBand = 8;
  for (int first = 0; first < schedule.row_tiles; first += kBand) {
    for (column = 0; column < schedule.column_tiles; ++column) {
      int rows = schedule.rows_of(column) - first;
      if (rows > kBand) rows = kBand;
      if (rows <= 0) continue;
      if (tile < rows) {
        row = first + tile;
        return;
      }
      tile -= rows;
    }
  }
  row = column = 0;
}

// What a block does at a time: chunks begin, ..., end - 1 of a tile; part: where the sums go among
// the partial ones, -1: to the target.
struct Item {
  int row, column, begin, end, part;
};

__device__ inline Item item_of(const PartsSchedule& schedule, int index) {
  Item item;
  int tile = index;
  item.begin = 0;
  item.end = schedule.chunks;
  item.part = -1;
  if (index >= schedule.whole) {
    const int rest = schedule.tiles - schedule.whole, split = (index - schedule.whole) / rest;
    tile = schedule.whole + (index - schedule.whole) % rest;
    item.begin = split * schedule.split_chunks;
    item.end = item.begin + schedule.split_chunks;
    if (item.end > schedule.chunks) item.end = schedule.chunks;
    if (schedule.splits > 1) item.part = (tile - schedule.whole) * schedule.splits + split;
  }
  place(schedule, tile, item.row, item.column);
  return item;
}

// One product, or up to Most, whose tiles follow each other.
template <int Most>
struct Products {
  struct Maps {
    TensorMap a, b;
  };
  struct Entry {
    PartsSchedule schedule;
    Target target;
    Gaps gaps_b;
    // Where the partial sums begin, in elements of float.
    int64_t partial;
    // The first of its items, and of the blocks that add its splits.
    int first_item, first_sum;
  };
  Maps maps[Most];
  int count, items;
  Entry entries[Most];

  // What a block does in a round, nothing from `items` on. Longer items come first; every second
  // round goes backwards, so that no block always gets the longer ones.
  __device__ int item(int round, int block, int blocks) const {
    const bool backwards = Most > 1 && round % 2 == 1;
    return round * blocks + (backwards ? blocks - 1 - block : block);
  }
  // The product of an item: `from` or a later one.
  __device__ int product_of(int item, int from) const {
    if constexpr (Most > 1) {
      while (from + 1 < count && item >= entries[from + 1].first_item) ++from;
    }
    return from;
  }
};

// partial [tiles of splits, splits, column / 8, threads, 4] of every product
template <class C, int Most>
__global__ void __launch_bounds__(C::kThreads, 1)
    parts_product_kernel(const __grid_constant__ Products<Most> products, float* partial) {
#ifdef HESSKERN_WGMMA
  __shared__ uint64_t full[C::kStages], empty[C::kStages], turns[2];
  unsigned char* const stages =
      dynamic_shared() + ((1024 - shared_address(dynamic_shared()) % 1024) & 1023);
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(full + stage, 1);
      // The eight warps that multiply.
      barrier_init(empty + stage, 8);
    }
    barrier_init(turns, 4);
    barrier_init(turns + 1, 4);
    barriers_are_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    give_up_registers<24>();
    if (threadIdx.x != 0) return;
    int stage = 0;
    uint32_t parity = 1;
    for (int round = 0, which = 0;; ++round) {
      const int index = products.item(round, block, blocks);
      if (index >= products.items) break;
      which = products.product_of(index, which);
      const auto& one = products.entries[which];
      const auto& maps = products.maps[which];
      const Item item = item_of(one.schedule, index - one.first_item);
      const int row0 = item.row * kTileRows, column0 = item.column * C::kColumns;
      for (int step = item.begin * C::kChunk; step < item.end * C::kChunk; ++step) {
        const int k = step * C::kRows;
        uint64_t* const here = full + stage;
        unsigned char* const to = stages + stage * C::kStage;
        barrier_wait(empty + stage, parity);
        barrier_expect(here, C::kStage);
        if constexpr (C::kAlongK) {
#pragma unroll
          for (int part = 0; part < C::kParts; ++part) {
            copy_box(to + part * C::kPartA, maps.a, here, k, row0, part);
            copy_box(to + C::kBytesA + part * C::kPartB, maps.b, here, k, column0, part);
          }
        } else {
#pragma unroll
          for (int box = 0; box < C::kBoxesA; ++box) {
            copy_box(to + box * C::kBox, maps.a, here, row0 + kBoxColumns * box, k, 0);
          }
#pragma unroll
          for (int box = 0; box < C::kBoxesB; ++box) {
            copy_box(to + C::kBytesA + box * C::kBox, maps.b, here,
                     one.gaps_b.place(column0 + kBoxColumns * box), k, 0);
          }
        }
        if (++stage == C::kStages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  take_registers<240>();
  const int thread = static_cast<int>(threadIdx.x) - 128;
  const int group = thread / 128, lane = thread % 32;
  // The lower halves of the descriptors: addresses within the block in units of 16 bytes.
  const uint32_t local = shared_address(stages) & 0x3ffff;
  const uint32_t place_a = C::kDescriptorLow + ((local + group * C::kGroupA) >> 4);
  const uint32_t place_b = C::kDescriptorLow + ((local + C::kBytesA) >> 4);
  const auto descriptor = [](uint32_t low) {
    return static_cast<uint64_t>(C::kDescriptorHigh) << 32 | low;
  };
  float recent[C::kWide / 2];
  float sums[C::kHalves][C::kWide / 2];
  int stage = 0;
  uint32_t parity = 0;
  // The warpgroups take turns to multiply: flushing at once would leave the tensor cores idle.
  // Named barriers would do, but with them the compiler spills.
  uint32_t turn = group == 0 ? 1 : 0;

  for (int round = 0, which = 0;; ++round) {
    const int index = products.item(round, block, blocks);
    if (index >= products.items) break;
    which = products.product_of(index, which);
    const auto& one = products.entries[which];
    const Item item = item_of(one.schedule, index - one.first_item);
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < C::kWide / 2; ++i) sums[half][i] = 0.0f;
    }
    // So that they are dead while the last tile was written, for the compiler.
#pragma unroll
    for (int i = 0; i < C::kWide / 2; ++i) recent[i] = 0.0f;
    for (int chunk = item.begin; chunk < item.end; ++chunk) {
#pragma unroll
      for (int half = 0; half < C::kHalves; ++half) {
        if (half == 0) {
#pragma unroll
          for (int s = 0; s < C::kChunk; ++s) barrier_wait(full + stage + s, parity);
        }
        barrier_wait(turns + group, turn);
        turn ^= 1;
        pin(recent);
        wgmma_fence();
        const uint32_t start = stage * (C::kStage >> 4);
#pragma unroll
        for (int product = 0; product < C::kProducts; ++product) {
#pragma unroll
          for (int s = 0; s < C::kChunk; ++s) {
#pragma unroll
            for (int k = 0; k < C::kRows / 16; ++k) {
              const int offset = s * C::kStage + k * C::kStep;
              const int offset_a = offset + C::part_a(product) * C::kPartA;
              const int offset_b = offset + C::part_b(product) * C::kPartB + half * C::kGroupB;
              const int keep = product == 0 && s == 0 && k == 0 ? 0 : 1;
              wgmma<typename C::T, C::kWide, !C::kAlongK>(
                  recent, descriptor(place_a + start + (offset_a >> 4)),
                  descriptor(place_b + start + (offset_b >> 4)), keep);
            }
          }
        }
        wgmma_commit();
        if (lane == 0) barrier_arrive(turns + 1 - group);
        wgmma_wait<0>();
        if (half == C::kHalves - 1) {
#pragma unroll
          for (int s = 0; s < C::kChunk; ++s) {
            if (lane == 0) barrier_arrive(empty + stage + s);
          }
        }
        pin(recent);
#pragma unroll
        for (int i = 0; i < C::kWide / 2; ++i) sums[half][i] += recent[i];
      }
      stage += C::kChunk;
      if (stage == C::kStages) stage = 0, parity ^= 1;
    }

    constexpr int kPieces = C::kWide / 8;
    const auto values = [&](int half, int j) {
      const float* sum = sums[half] + 4 * j;
      return Four{{sum[0], sum[1], sum[2], sum[3]}};
    };
    if (item.part >= 0) {
      Four* to =
          reinterpret_cast<Four*>(partial + one.partial +
                                  static_cast<int64_t>(item.part) * (kTileRows * C::kColumns)) +
          thread;
#pragma unroll
      for (int half = 0; half < C::kHalves; ++half) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) to[(half * kPieces + j) * 256] = values(half, j);
      }
    } else {
      const int row = item.row * kTileRows + thread / 32 * 16 + lane / 4;
      const int column = item.column * C::kColumns + 2 * (lane % 4);
      with_scale<Most>(one.target, [&](auto scaled) {
#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {
          put_rows<kPieces, decltype(scaled)::value>(one.target, row, column + half * C::kWide,
                                                     [&](int j) { return values(half, j); });
        }
      });
    }
  }
#endif
}

// Adds the splits of every tile in their order. One block: eight columns of a tile.
template <int Columns, int Most>
__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(const __grid_constant__ Products<Most> products, const float* partial) {
  constexpr int kPieces = Columns / 8;
  int which = 0;
  if constexpr (Most > 1) {
    while (which + 1 < products.count &&
           static_cast<int>(blockIdx.x) >= products.entries[which + 1].first_sum) {
      ++which;
    }
  }
  const auto& one = products.entries[which];
  const PartsSchedule& schedule = one.schedule;
  const int index = static_cast<int>(blockIdx.x) - one.first_sum;
  const int piece = index % kPieces, tile = index / kPieces;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  constexpr int64_t kTile = kTileRows * Columns / 4;
  const Four* from = reinterpret_cast<const Four*>(partial + one.partial) +
                     static_cast<int64_t>(tile) * schedule.splits * kTile + piece * kThreads +
                     thread;
  Four total = from[0];
#pragma unroll 4
  for (int split = 1; split < schedule.splits; ++split) {
    const Four value = from[split * kTile];
#pragma unroll
    for (int i = 0; i < 4; ++i) total.value[i] += value.value[i];
  }
  int tile_row, tile_column;
  place(schedule, schedule.whole + tile, tile_row, tile_column);
  const int row = tile_row * kTileRows + thread / 32 * 16 + lane / 4;
  const int column = tile_column * Columns + piece * 8 + 2 * (lane % 4);
  with_scale<Most>(one.target, [&](auto scaled) {
    put_rows<1, decltype(scaled)::value>(one.target, row, column, [&](int) { return total; });
  });
}

template <class C, int Most>
int64_t slots_of() {
  return resident_blocks(reinterpret_cast<const void*>(parts_product_kernel<C, Most>), C::kThreads,
                         C::kShared);
}

// In microseconds, from what an H200 took: a chunk (operations at its rate, more where shared
// memory holds them up), a block's writing of its sums, and a tile's sums' way to memory and back.
template <class C>
struct Times {
  static constexpr int kTile = kTileRows * C::kColumns;
  static constexpr double kHeldUp =
      C::kProducts == 1 ? (C::kHalves == 2 ? 1.2 : 1.35) : (C::kHalves == 2 ? 1.0 : 1.03);
  static constexpr double kChunk =
      2.0 * kTile * C::kRows * C::kChunk * C::kProducts * kHeldUp / 5.5e6;
  static constexpr double kWrite = 5, kTraffic = kTile * 4 / 3e6;
};

// All tiles whole.
template <class C>
PartsSchedule whole_schedule(int64_t m, int64_t n, int64_t k, bool triangle) {
  PartsSchedule schedule{};
  schedule.m = static_cast<int>(m);
  schedule.n = static_cast<int>(n);
  schedule.column_tile = C::kColumns;
  schedule.row_tiles = static_cast<int>(ceil_div(m, kTileRows));
  schedule.column_tiles = static_cast<int>(ceil_div(n, C::kColumns));
  schedule.triangle = triangle;
  for (int column = 0; column < schedule.column_tiles; ++column) {
    schedule.tiles += schedule.rows_of(column);
  }
  schedule.chunks =
      static_cast<int>(std::max<int64_t>(ceil_div(k, int64_t{C::kRows * C::kChunk}), 1));
  schedule.whole = schedule.tiles;
  schedule.splits = 1;
  schedule.split_chunks = schedule.chunks;
  return schedule;
}

// Of one product.
template <class C>
PartsSchedule schedule_of(int64_t m, int64_t n, int64_t k, bool triangle) {
  using Time = Times<C>;
  constexpr int kTile = Time::kTile;
  constexpr double kChunkTime = Time::kChunk, kWriteTime = Time::kWrite;
  const int64_t slots = slots_of<C, 1>();
  PartsSchedule schedule = whole_schedule<C>(m, n, k, triangle);
  const int64_t chunks = schedule.chunks;
  schedule.whole = static_cast<int>(schedule.tiles / slots * slots);
  const int64_t rest = schedule.tiles - schedule.whole;
  const double traffic = static_cast<double>(rest) * Time::kTraffic;
  // Partial sums of 64 MB at most, and no more than eight rounds of blocks: the host tries all.
  constexpr int64_t kMostPartial = 1 << 24, kRounds = 8, kMost = 256;
  const int64_t most =
      rest == 0 ? 1
                : std::min({chunks, kMost, std::max<int64_t>(kMostPartial / kTile / rest, 1),
                            ceil_div(kRounds * slots, rest)});
  const Splits splits =
      plan_splits(rest, chunks, slots, static_cast<int64_t>(kWriteTime / kChunkTime + 0.5), 1, most,
                  static_cast<int64_t>(traffic / kChunkTime + 0.5));
  schedule.splits = static_cast<int>(splits.count);
  schedule.split_chunks = static_cast<int>(splits.share);
  const auto waves = [&](int64_t blocks, int64_t share) {
    return static_cast<double>(ceil_div(blocks, slots)) *
           (static_cast<double>(share) * kChunkTime + kWriteTime);
  };
  schedule.cost = waves(schedule.whole, chunks) + waves(rest * splits.count, splits.share) +
                  (splits.count > 1 ? traffic * static_cast<double>(splits.count) : 0.0);
  return schedule;
}

// visit(Config) of the kernel.
template <class C>
struct ConfigTag {
  using Type = C;
};
template <class Visit>
auto with_config(PartsType type, bool along_k, int columns, Visit visit) {
  const bool wide = columns == 256;
  if (along_k) {
    return wide ? visit(ConfigTag<ThreeAlongK<256>>()) : visit(ConfigTag<ThreeAlongK<128>>());
  }
  switch (type) {
    case PartsType::kBFloat16:
      return wide ? visit(ConfigTag<OneProduct<BFloat16, 256>>())
                  : visit(ConfigTag<OneProduct<BFloat16, 128>>());
    case PartsType::kFloat16:
      return wide ? visit(ConfigTag<OneProduct<Float16, 256>>())
                  : visit(ConfigTag<OneProduct<Float16, 128>>());
    default:
      return wide ? visit(ConfigTag<ThreeProducts<256>>()) : visit(ConfigTag<ThreeProducts<128>>());
  }
}

template <class C, int Most>
bool add_product(Products<Most>& products, const PartsSchedule& schedule, const GroupedPart& one) {
  const auto boxed = [](const PartsMatrix& matrix) {
    const int64_t gaps =
        matrix.width == 0 ? 0 : (ceil_div(matrix.columns, matrix.width) - 1) * matrix.gap;
    return BoxedParts{matrix.data, matrix.columns + gaps, matrix.rows,
                      C::kParts,   matrix.row_step,       matrix.part_step};
  };
  constexpr int kParts = C::kAlongK ? 1 : C::kParts;
  const PartsMatrix &a = one.a, &b = one.b;
  auto& maps = products.maps[products.count];
  auto& entry = products.entries[products.count];
  ++products.count;
  entry.schedule = schedule;
  entry.target = {one.to,     a.exponents,       b.exponents, schedule.m,
                  schedule.n, schedule.triangle, one.scale};
  entry.gaps_b = Gaps(b);
  return encode<typename C::T>(maps.a, boxed(a), C::kAlongK ? kTileRows : C::kRows, kParts) &&
         encode<typename C::T>(maps.b, boxed(b), C::kAlongK ? C::kColumns : C::kRows, kParts);
}

// products: longer items first. workspace: their partial sums.
template <class C, int Most>
cudaError_t run_products(Products<Most>& products, float* workspace, cudaStream_t stream) {
  int items = 0, sums = 0;
  int64_t partial = 0;
  for (int i = 0; i < products.count; ++i) {
    auto& entry = products.entries[i];
    entry.first_item = items;
    entry.first_sum = sums;
    entry.partial = partial;
    items += entry.schedule.items();
    sums += entry.schedule.split_tiles() * (C::kColumns / 8);
    partial += entry.schedule.partial();
  }
  products.items = items;
  // What a kernel's parameters may take.
  static_assert(sizeof(products) + sizeof(workspace) <= 32764);
  const int64_t blocks = std::min<int64_t>(slots_of<C, Most>(), items);
  cudaError_t error = launch(parts_product_kernel<C, Most>, dim3(static_cast<unsigned>(blocks)),
                             dim3(C::kThreads), C::kShared, stream, products, workspace);
  if (error == cudaSuccess && sums > 0) {
    error = launch(add_splits_kernel<C::kColumns, Most>, dim3(static_cast<unsigned>(sums)),
                   dim3(kThreads), 0, stream, products, workspace);
  }
  return error;
}

}  // namespace parts

bool parts_products_available() {
  return current_device().hopper() && tensor_maps_available();
}

PartsProduct::PartsProduct(PartsType type, bool along_k, int64_t m, int64_t n, int64_t k,
                           bool triangle, int column_tile)
    : type_(type), along_k_(along_k) {
  const auto schedule = [&](int columns) {
    return parts::with_config(type, along_k, columns, [&](auto tag) {
      return parts::schedule_of<typename decltype(tag)::Type>(m, n, k, triangle);
    });
  };
  if (column_tile != 0) {
    schedule_ = schedule(column_tile);
  } else {
    const PartsSchedule wide = schedule(256), narrow = schedule(128);
    schedule_ = wide.cost <= narrow.cost ? wide : narrow;
  }
}

int64_t PartsProduct::workspace() const {
  return schedule_.partial();
}

cudaError_t PartsProduct::run(const PartsMatrix& a, const PartsMatrix& b, const PartsTarget& target,
                              float* workspace, cudaStream_t stream) const {
  return parts::with_config(type_, along_k_, schedule_.column_tile, [&](auto tag) {
    using C = typename decltype(tag)::Type;
    parts::Products<1> products{};
    if (!parts::add_product<C>(products, schedule_, {a, b, target, {}})) {
      return cudaErrorInvalidValue;
    }
    return parts::run_products<C>(products, workspace, stream);
  });
}

namespace parts {

// A product's schedule and its place among those that were given.
struct Planned {
  PartsSchedule schedule;
  size_t index;
};

// How long the longest block works, where blocks take their items as Products::item says; longer
// items first. The items of a product are neighbours: what a round of theirs adds, begins at one
// block and ends at another.
template <class C>
double time_of(const std::vector<Planned>& products, int64_t slots) {
  std::vector<double> changes(static_cast<size_t>(slots + 1));
  double traffic = 0;
  int64_t place = 0;
  bool backwards = false;
  for (const Planned& one : products) {
    const PartsSchedule& schedule = one.schedule;
    const auto add = [&](int64_t count, int chunks) {
      const double time = chunks * Times<C>::kChunk + Times<C>::kWrite;
      while (count > 0) {
        const int64_t here = std::min(count, slots - place);
        const int64_t begin = backwards ? slots - place - here : place;
        changes[static_cast<size_t>(begin)] += time;
        changes[static_cast<size_t>(begin + here)] -= time;
        count -= here;
        place += here;
        if (place == slots) place = 0, backwards = !backwards;
      }
    };
    add(schedule.whole, schedule.chunks);
    add(schedule.items() - schedule.whole, schedule.split_chunks);
    traffic += static_cast<double>(schedule.split_tiles()) * schedule.splits * Times<C>::kTraffic;
  }
  double load = 0, longest = 0;
  for (const double change : changes) {
    load += change;
    longest = std::max(longest, load);
  }
  return traffic + longest;
}

// One product as if it were alone; several by tiles as a whole, or by splits of which none takes
// more than a share of what the device takes in all: what takes the least time. Where one round of
// long products' splits fills the device, short ones come on top, and are cut finer.
template <class C>
std::vector<Planned> plan(const std::vector<PartsSize>& sizes, double& cost) {
  const int64_t slots = slots_of<C, kMostProducts>();
  const auto longer = [](const Planned& one, const Planned& other) {
    return one.schedule.split_chunks > other.schedule.split_chunks;
  };
  std::vector<Planned> whole;
  double all = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const PartsSize& size = sizes[i];
    whole.push_back({sizes.size() == 1 ? schedule_of<C>(size.m, size.n, size.k, false)
                                       : whole_schedule<C>(size.m, size.n, size.k, false),
                     i});
    const PartsSchedule& one = whole.back().schedule;
    all += one.tiles * (one.chunks * Times<C>::kChunk + Times<C>::kWrite);
  }
  std::stable_sort(whole.begin(), whole.end(), longer);
  cost = time_of<C>(whole, slots);
  std::vector<Planned> best = whole;
  if (sizes.size() == 1) return best;
  const int longest = whole.front().schedule.chunks, is_short = longest / 4;
  const bool any_short = whole.back().schedule.chunks <= is_short;
  for (const double share : {1.2, 1.1, 1.05, 1.0, 0.9, 0.8, 0.67, 0.5, 0.33, 0.25}) {
    const double most = share * all / static_cast<double>(slots);
    const auto most_chunks = std::max(static_cast<int>(most / Times<C>::kChunk), 1);
    if (most_chunks >= longest) continue;
    for (const double finer : {1.0, 0.25, 0.12, 0.06}) {
      if (finer < 1.0 && !any_short) break;
      const int short_chunks = std::max(static_cast<int>(finer * most_chunks), 1);
      std::vector<Planned> products = whole;
      int64_t partial = 0;
      for (Planned& one : products) {
        PartsSchedule& schedule = one.schedule;
        const int here = schedule.chunks <= is_short ? short_chunks : most_chunks;
        if (schedule.chunks <= here) continue;
        const int count = (schedule.chunks - 1) / here + 1;
        schedule.split_chunks = (schedule.chunks - 1) / count + 1;
        schedule.splits = (schedule.chunks - 1) / schedule.split_chunks + 1;
        schedule.whole = 0;
        partial += schedule.partial();
      }
      // Partial sums of 256 MB at most.
      if (partial > int64_t{1} << 26) break;
      std::stable_sort(products.begin(), products.end(), longer);
      const double time = time_of<C>(products, slots);
      if (time < cost) best = std::move(products), cost = time;
    }
  }
  return best;
}

}  // namespace parts

GroupedPartsProduct::GroupedPartsProduct(PartsType type, bool along_k,
                                         const std::vector<PartsSize>& sizes, int column_tile)
    : type_(type), along_k_(along_k) {
  const auto planned = [&](int columns, double& cost) {
    return parts::with_config(type, along_k, columns, [&](auto tag) {
      return parts::plan<typename decltype(tag)::Type>(sizes, cost);
    });
  };
  std::vector<parts::Planned> best = planned(column_tile == 0 ? 256 : column_tile, cost_);
  if (column_tile == 0) {
    double cost = 0;
    std::vector<parts::Planned> narrow = planned(128, cost);
    if (cost < cost_) best = std::move(narrow), cost_ = cost;
  }
  for (const parts::Planned& one : best) {
    schedules_.push_back(one.schedule);
    order_.push_back(one.index);
    workspace_ += one.schedule.partial();
  }
}

cudaError_t GroupedPartsProduct::run(const std::vector<GroupedPart>& products, float* workspace,
                                     cudaStream_t stream) const {
  return parts::with_config(type_, along_k_, schedules_.front().column_tile, [&](auto tag) {
    using C = typename decltype(tag)::Type;
    parts::Products<kMostProducts> all{};
    for (size_t i = 0; i < order_.size(); ++i) {
      if (!parts::add_product<C>(all, schedules_[i], products[order_[i]])) {
        return cudaErrorInvalidValue;
      }
    }
    return parts::run_products<C>(all, workspace, stream);
  });
}

}  // namespace hesskern::cuda
