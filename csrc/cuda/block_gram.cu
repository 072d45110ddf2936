// Gram matrices of 65 to 256 columns, the whole upper triangle in the registers of a block: one
// read of the rows.
//
// The rows go through a block in slabs. The copy engine brings whole samples to shared memory, or
// lanes copy the values that they will need (cp_async), while the slab before is multiplied. Then a
// warp per 32 columns makes operands of them: centred, scaled, split into two float16 (hi/lo), and
// stored as matrices [8, 8] of 128 contiguous bytes, which ldmatrix reads as left operands and as
// right ones without a bank conflict or a move. Then all warps multiply their shares of the
// triangle: units of two blocks [16, 16] above one another, whose left operands serve a row of
// units. Every sixteen rows are multiplied into fresh registers and added in float32, because
// tensor cores cut sums off; blocks are added by a second kernel. All sums have a fixed order.
//
// 200 columns, 10 classes: per 80 rows (64 KB) 60 units (49 needed) make 3600 products of the
// tensor cores, 5400 cycles; multiplying takes 14700 instructions and making operands 8700, which
// take turns: 13500 cycles measured on an H200, 1.04 to 1.1 TB/s. 64 to 128 columns: 1.6 to 3.7.
#include <algorithm>
#include <cmath>

#include "block_gram.h"
#include "core/barrier.h"
#include "core/device.h"
#include "core/elements.h"
#include "core/float16_parts.h"
#include "core/launch.h"
#include "core/warp.h"
#include "core/warp_gram.h"

namespace hesskern::cuda {

namespace {

constexpr int64_t kMostColumns = 256;
// Samples go by fours, one for every t = lane % 4; so many fours may make a slab.
constexpr int kMostSets = 2;
// Plain rows that stand for a sample.
constexpr int kPlainRows = 8;
// Sixteens of positions in a slab.
constexpr int kMostSteps = 4;

// 32 Groups columns, Warps warps of Units units each.
template <int Groups, int Warps, int Units>
struct Shape {
  static constexpr int kGroups = Groups, kUnits = Units;
  // Blocks of 16 and of 8 columns.
  static constexpr int kBlocks = 2 * Groups, kEights = 4 * Groups;
  static constexpr int kBlockThreads = 32 * Warps;
  // The triangle as it lies in registers: [unit, tile, element, lane].
  static constexpr int kSize = Warps * Units * 16 * 32;
  // Operands of eight rows in words and bytes, of one part.
  static constexpr int kHalf = kEights * 32, kHalfBytes = kHalf * 4;
  // Units beyond the triangle compute something that nobody looks at.
  static constexpr bool kExact = Groups * (Groups + 1) == Warps * Units;
  static_assert(Groups * (Groups + 1) <= Warps * Units && Groups <= Warps);
};

// A unit: blocks 2 row and 2 row + 1 of the left columns with block `column` of the right ones.
struct Unit {
  int row, column;
};

// The unit of an index; its row is past the last one where there is none.
__device__ inline Unit unit_of(int index, int blocks) {
  Unit unit{0, 0};
  while (2 * unit.row < blocks && index >= blocks - 2 * unit.row) {
    index -= blocks - 2 * unit.row;
    ++unit.row;
  }
  unit.column = 2 * unit.row + index;
  return unit;
}

// Where an element of a block's triangle belongs; (0, -1) for one that belongs nowhere.
template <class S, ColumnOrder kOrder>
struct BlockPlace {
  __device__ void operator()(int f, int& row, int& column) const {
    const int lane = f % 32, element = f / 32 % 4, tile = f / 128 % 4;
    const Unit unit = unit_of(f / 512, S::kBlocks);
    const int i = 2 * unit.row + tile / 2, j = unit.column;
    const int a = gram_column<kOrder>(2 * i + element / 2, lane / 4);
    const int b = gram_column<kOrder>(2 * j + tile % 2, 2 * (lane % 4) + element % 2);
    row = a, column = b;
    if (unit.row >= S::kGroups || i > j) {
      row = 0, column = -1;
    } else if (a > b) {
      // A block on the diagonal holds both of an element and its mirror image.
      row = i == j ? 0 : b, column = i == j ? -1 : a;
    }
  }
};

// How a block's shared memory is cut, in words: operands of so many sixteens of rows [buffers,
// eights of rows, part, blocks of eight columns] of matrices [8, 8] of float16; the slab as it was
// copied; what every group of columns has of weights and their roots; a barrier; the
// factors that undo the scales [buffers, groups].
struct BlockCut {
  int steps, operand, slab, weights, barrier, backs, total;

  BlockCut(int groups, int buffers, int sixteens, int slab_size, int weight_size)
      : steps(sixteens), operand(2 * 2 * sixteens * groups * 4 * 32) {
    slab = buffers * operand;
    weights = slab + slab_size;
    barrier = weights + groups * 2 * weight_size;
    backs = barrier + 4;
    total = backs + (buffers * groups + 3) / 4 * 4;
  }

  size_t bytes() const { return sizeof(float) * static_cast<size_t>(total); }
};

__device__ inline float largest(float so_far, const Four<float>& four) {
#pragma unroll
  for (int q = 0; q < 4; ++q) so_far = fmaxf(so_far, fabsf(four.value[q]));
  return so_far;
}

// Samples of rows, each to be centred under its weights, or (without weights) rows as they are, of
// which eight stand for a sample. A slab is sets times four samples.
struct SampleSlabs {
  static constexpr ColumnOrder kOrder = ColumnOrder::kByFours;

  const float *x, *weights;
  int64_t samples, rows, sample_stride, row_stride;
  int classes, columns;
  // Whole samples by the copy engine; by lanes, 16 bytes at a time.
  bool bulk, pieces;
  // Between rows in shared memory.
  int stride;
  int sets;

  __host__ __device__ int pairs() const { return (classes + 1) / 2; }
  __host__ __device__ int steps() const { return (sets * pairs() + 1) / 2; }
  __host__ __device__ int64_t count() const { return ceil_div(samples, 4 * sets); }
  // Samples begin eight banks apart.
  __host__ __device__ int slot() const { return (classes * columns + 23) / 32 * 32 + 8; }
  __host__ __device__ int slab_size(int groups) const {
    return bulk ? 4 * sets * slot() : groups * sets * classes * 128;
  }
  __host__ __device__ int weight_size() const { return 4 * sets * classes; }

  // A thread's part in bringing a slab and turning it into operands; of the first warps each has 32
  // columns. A lane (g, t) = (lane / 4, lane % 4) makes four columns of sample t of every set.
  template <class S>
  class Maker {
   public:
    __device__ Maker(const SampleSlabs& in, float* memory, const BlockCut& cut)
        : in_(in),
          slab_(memory + cut.slab),
          barrier_(reinterpret_cast<uint64_t*>(memory + cut.barrier)),
          thread_(anew(static_cast<int>(threadIdx.x))),
          lane_(thread_ % 32),
          warp_(thread_ / 32),
          g_(lane_ / 4),
          t_(lane_ % 4),
          column_(32 * warp_ + 4 * g_) {
      own_ = slab_ + warp_ * in.sets * in.classes * 128 + lane_ * 4;
      weights_ = memory + cut.weights + warp_ * 2 * in.weight_size();
      roots_ = weights_ + in.weight_size();
    }

    // Before a block barrier: what stays as it is.
    __device__ void prepare(float* memory, const BlockCut& cut, int buffers) {
      const int thread = static_cast<int>(threadIdx.x);
      if (thread == 0) {
        barrier_init(barrier_, 1);
        barriers_are_ready();
      }
      if (in_.sets * in_.pairs() % 2 == 0) return;
      // The last half of sixteen rows, which no pair of rows fills.
      for (int i = thread; i < 2 * S::kHalf; i += S::kBlockThreads) {
        for (int buffer = 1; buffer <= buffers; ++buffer)
          memory[buffer * cut.operand - 1 - i] = 0.0f;
      }
    }

    __device__ void copy(int slab) {
      if (in_.bulk && warp_ == 0) copy_samples(slab);
      if (warp_ >= S::kGroups) return;
      for (int set = 0; set < in_.sets; ++set) {
        const int64_t sample = sample_of(slab, set);
        const bool inside = sample < in_.samples;
        if (!in_.bulk) {
          const int count = inside ? in_.columns - column_ : 0;
          const float* from = in_.x + (count > 0 ? sample * in_.sample_stride + column_ : 0);
          int64_t left = in_.rows - sample * in_.classes;
          for (int c = 0; c < in_.classes; ++c, --left) {
            copy_four(own_ + (set * in_.classes + c) * 128, from, left > 0 ? count : 0, in_.pieces);
            if (count > 0 && left > 1) from += in_.row_stride;
          }
        }
        for (int c = g_; c < in_.classes; c += 8) {
          float* const weight = weights_ + (set * in_.classes + c) * 4 + t_;
          if (in_.weights != nullptr) {
            copy_word(weight, in_.weights + (inside ? sample * in_.classes + c : 0), inside);
          } else {
            *weight = inside ? 1.0f : 0.0f;
          }
        }
      }
    }

    // To operands, and the factor that undoes the scale; the lane's own copies have ended.
    __device__ void make(int slab, int phase, uint32_t* operands, float* backs) {
      if (warp_ >= S::kGroups) return;
      if (in_.bulk) barrier_wait(barrier_, static_cast<uint32_t>(phase));
      const float* from[kMostSets];
      float mean[kMostSets][4], most = 0.0f;
#pragma unroll
      for (int set = 0; set < kMostSets; ++set) {
        if (set >= in_.sets) continue;
        from[set] = find(slab, set);
#pragma unroll
        for (int q = 0; q < 4; ++q) mean[set][q] = 0.0f;
        if (in_.weights != nullptr) {
          const float* weight = weights_ + set * in_.classes * 4 + t_;
#pragma unroll(kAhead)
          for (int c = 0; c < in_.classes; ++c) {
            const Four<float> v = load_four(from[set] + c * in_.stride);
            most = largest(most, v);
#pragma unroll
            for (int q = 0; q < 4; ++q) mean[set][q] += weight[c * 4] * v.value[q];
          }
        } else {
#pragma unroll(kAhead)
          for (int c = 0; c < in_.classes; ++c) {
            most = largest(most, load_four(from[set] + c * in_.stride));
          }
        }
      }
      const Scale scale = scale_for(most);
      if (lane_ == 0) backs[warp_] = scale.back;
      for (int i = lane_; i < in_.weight_size(); i += 32) {
        roots_[i] = square_root(weights_[i]) * scale.to_half;
      }
      warp_barrier();
      uint32_t* to = operands + 4 * warp_ * 32 + lane_;
#pragma unroll
      for (int set = 0; set < kMostSets; ++set) {
        if (set >= in_.sets) continue;
        const float* root = roots_ + set * in_.classes * 4 + t_;
#pragma unroll(kAhead / 2)
        for (int c = 0; c < in_.classes; c += 2, to += 2 * S::kHalf) {
          const int second = c + 1 < in_.classes ? c + 1 : c;
          const Four<float> v = load_four(from[set] + c * in_.stride);
          const Four<float> w = load_four(from[set] + second * in_.stride);
          const float root_v = root[c * 4], root_w = second > c ? root[second * 4] : 0.0f;
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            uint32_t high, low;
            split_pair(root_v * (v.value[q] - mean[set][q]), root_w * (w.value[q] - mean[set][q]),
                       high, low);
            to[q * 32] = high;
            to[q * 32 + S::kHalf] = low;
          }
        }
      }
    }

   private:
    // Rows that are read at once, as registers allow.
    static constexpr int kAhead = S::kUnits > 5 ? 2 : 5;

    // By the copy engine, and zeros for rows that the last of plain samples lacks.
    __device__ void copy_samples(int slab) {
      const int64_t first = int64_t{slab} * 4 * in_.sets, left = in_.samples - first;
      const int samples = left < 4 * in_.sets ? static_cast<int>(left) : 4 * in_.sets;
      const int size = in_.classes * in_.columns;
      int64_t last = (in_.rows - (first + samples - 1) * in_.classes) * in_.columns;
      if (last >= size) {
        last = size;
      } else {
        float* const sample = slab_ + (samples - 1) * in_.slot();
        for (int i = static_cast<int>(last) + lane_; i < size; i += 32) sample[i] = 0.0f;
        warp_barrier();
      }
      if (lane_ != 0) return;
      barrier_expect(barrier_, ((samples - 1) * size + static_cast<int>(last)) * 4);
      for (int i = 0; i < samples; ++i) {
        copy_row(slab_ + i * in_.slot(), in_.x + (first + i) * in_.sample_stride,
                 (i + 1 < samples ? size : static_cast<int>(last)) * 4, barrier_);
      }
    }

    __device__ int64_t sample_of(int slab, int set) const {
      return (int64_t{slab} * in_.sets + set) * 4 + t_;
    }

    // The lane's columns of the set's sample. Where there are none it reads others: its weights are
    // zeros, or nobody looks at its sums.
    __device__ const float* find(int slab, int set) const {
      if (!in_.bulk) return own_ + set * in_.classes * 128;
      const bool inside = sample_of(slab, set) < in_.samples;
      return slab_ + (inside ? (set * 4 + t_) * in_.slot() : 0) +
             (column_ < in_.columns ? column_ : 0);
    }

    const SampleSlabs& in_;
    float* slab_;
    uint64_t* barrier_;
    int thread_, lane_, warp_, g_, t_, column_;
    float *own_, *weights_, *roots_;
  };
};

// Rows of positions, x [samples, columns, positions], in sixteens of a sample's positions. A slab
// is some sixteens, one after another.
struct PositionSlabs {
  static constexpr ColumnOrder kOrder = ColumnOrder::kInTurn;

  const float* x;
  int64_t sample_stride, column_stride;
  // Sixteens of a sample; all of them are less than 2^31.
  int samples, sixteens;
  int positions, columns;
  bool pieces;
  int length;

  __host__ __device__ int steps() const { return length; }
  __host__ __device__ int64_t count() const {
    return ceil_div(int64_t{samples} * sixteens, length);
  }
  __host__ __device__ int slab_size(int groups) const { return groups * length * 4 * 128; }
  __host__ __device__ int weight_size() const { return 0; }

  // A lane (g, t) makes four positions from 4 t on of the columns g, 8 + g, 16 + g and 24 + g of
  // its warp.
  template <class S>
  class Maker {
   public:
    __device__ Maker(const PositionSlabs& in, float* memory, const BlockCut& cut)
        : in_(in),
          thread_(anew(static_cast<int>(threadIdx.x))),
          lane_(thread_ % 32),
          warp_(thread_ / 32),
          own_(memory + cut.slab + warp_ * in.length * 4 * 128 + lane_ * 4) {}

    __device__ void prepare(float*, const BlockCut&, int) {}

    __device__ void copy(int slab) {
      if (warp_ >= S::kGroups) return;
      const int column = 32 * warp_ + lane_ / 4;
      const int index = slab * in_.length;
      int sample = index / in_.sixteens;
      int first = (index - sample * in_.sixteens) * 16 + 4 * (lane_ % 4);
      for (int s = 0; s < in_.length; ++s) {
        const int left = sample < in_.samples ? in_.positions - first : 0;
        const float* const from = in_.x + sample * in_.sample_stride + first;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const bool inside = left > 0 && column + 8 * b < in_.columns;
          copy_four(own_ + (s * 4 + b) * 128,
                    inside ? from + (column + 8 * b) * in_.column_stride : in_.x,
                    !inside    ? 0
                    : left < 4 ? static_cast<int>(left)
                               : 4,
                    in_.pieces);
        }
        first += 16;
        if (first >= in_.sixteens * 16) first -= in_.sixteens * 16, ++sample;
      }
    }

    __device__ void make(int, int, uint32_t* operands, float* backs) {
      if (warp_ >= S::kGroups) return;
      float most = 0.0f;
#pragma unroll 4
      for (int i = 0; i < 4 * in_.length; ++i) most = largest(most, load_four(own_ + i * 128));
      const Scale scale = scale_for(most);
      if (lane_ == 0) backs[warp_] = scale.back;
      uint32_t* to = operands + 4 * warp_ * 32 + lane_;
#pragma unroll 2
      for (int s = 0; s < in_.length; ++s, to += 4 * S::kHalf) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const Four<float> v = load_four(own_ + (s * 4 + b) * 128);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t high, low;
            split_pair(v.value[2 * half] * scale.to_half, v.value[2 * half + 1] * scale.to_half,
                       high, low);
            to[2 * half * S::kHalf + b * 32] = high;
            to[(2 * half + 1) * S::kHalf + b * 32] = low;
          }
        }
      }
    }

   private:
    const PositionSlabs& in_;
    int thread_, lane_, warp_;
    float* own_;
  };
};

// The warp's share of the triangle.
template <class S>
class WarpUnits {
 public:
  __device__ WarpUnits() {
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u) {
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[u][tile][e] = 0.0f;
      }
    }
  }

  // Adds sixteens of rows; backs [groups].
  __device__ void add(const uint32_t* operands, int steps, const float* backs) {
    const int thread = anew(static_cast<int>(threadIdx.x)), lane = thread % 32;
    const Unit first = unit_of(thread / 32 * S::kUnits, S::kBlocks);
    // Which matrix's row a lane names: of a left operand the blocks of 8 columns come first, of a
    // right one the halves of sixteen rows.
    const int left_lane = lane / 16 * 2 * S::kHalfBytes + lane / 8 % 2 * 128 + lane % 8 * 16;
    const int right_lane = lane / 8 % 2 * 2 * S::kHalfBytes + lane / 16 * 128 + lane % 8 * 16;
    const auto factor_of = [&](const Places& place) {
      return backs[place.row() / kRowBytes] * backs[place.column() / kRowBytes];
    };
    // Of many units registers have room neither for the factors nor for the places.
    constexpr bool kKept = S::kUnits < 6;
    float factor[S::kUnits];
    Places at(first);
#pragma unroll
    for (int u = 0; kKept && u < S::kUnits; ++u, at.next()) factor[u] = factor_of(at);
    const auto* from = reinterpret_cast<const unsigned char*>(operands);
#pragma unroll 1
    for (int s = 0; s < steps; ++s, from += 4 * S::kHalfBytes) {
      at = Places(kKept ? first : Unit{anew(first.row), anew(first.column)});
      uint32_t large[2][4], small[2][4];
#pragma unroll
      for (int u = 0; u < S::kUnits; ++u, at.next()) {
        if (u == 0 || at.begins()) {
          const unsigned char* a = from + left_lane + at.row();
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            load_matrices(large[half], a + half * kColumnBytes, false);
            load_matrices(small[half], a + half * kColumnBytes + S::kHalfBytes, false);
          }
        }
        const unsigned char* b = from + right_lane + at.column();
        uint32_t words[4], high[2][2], low[2][2];
        load_matrices(words, b, false);
        pair(words, high);
        load_matrices(words, b + S::kHalfBytes, false);
        pair(words, low);
        add(large, small, high, low, kKept ? factor[u] : factor_of(at), sum_[u]);
      }
    }
  }

  // To the block's place in partial [blocks, kSize].
  __device__ void finish(float* partial) const {
    const int thread = static_cast<int>(threadIdx.x);
    float* const out = partial + static_cast<int64_t>(blockIdx.x) * S::kSize +
                       thread / 32 * S::kUnits * 16 * 32 + thread % 32;
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u) {
#pragma unroll
      for (int e = 0; e < 16; ++e) out[(u * 16 + e) * 32] = sum_[u][e / 4][e % 4];
    }
  }

 private:
  // Operands of a block and of a row of units lie so many bytes apart.
  static constexpr int kColumnBytes = 256, kRowBytes = 2 * kColumnBytes;

  // Where the operands of a unit lie, and of those after it. A row begins at its own diagonal.
  class Places {
   public:
    __device__ explicit Places(const Unit& unit)
        : row_(unit.row * kRowBytes), column_(unit.column * kColumnBytes) {}

    __device__ int row() const { return existing(row_, S::kGroups * kRowBytes - kRowBytes); }
    __device__ int column() const {
      return existing(column_, S::kBlocks * kColumnBytes - kColumnBytes);
    }
    __device__ bool begins() const { return row_ == column_; }
    __device__ void next() {
      column_ += kColumnBytes;
      if (column_ == S::kBlocks * kColumnBytes) row_ += kRowBytes, column_ = row_;
    }

   private:
    // Units that do not exist read what others do.
    __device__ static int existing(int place, int last) {
      return S::kExact || place < last ? place : last;
    }

    int row_, column_;
  };

  __device__ static void pair(const uint32_t (&words)[4], uint32_t (&pairs)[2][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i / 2][i % 2] = words[i];
  }

  // Sixteen rows of a unit: small products first, which fresh sums keep whole.
  __device__ static void add(const uint32_t (&large)[2][4], const uint32_t (&small)[2][4],
                             const uint32_t (&high)[2][2], const uint32_t (&low)[2][2],
                             float factor, float (&sum)[4][4]) {
    // Of many units registers have no room for all four sums at once.
    constexpr int kChains = 4;
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int first = 0; first < 4; first += kChains) {
      float recent[kChains][4];
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        multiply_half(recent[i], small[(first + i) / 2], high[i % 2], zero, Float16{});
      }
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        multiply_half(recent[i], large[(first + i) / 2], low[i % 2], recent[i], Float16{});
      }
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        multiply_half(recent[i], large[(first + i) / 2], high[i % 2], recent[i], Float16{});
      }
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[first + i][e] += recent[i][e] * factor;
      }
    }
  }

  float sum_[S::kUnits][4][4];
};

// buffers: of operands; with two, warps that are through with one slab make the next one's.
template <class S, class Slabs, int Resident>
__global__ void __launch_bounds__(S::kBlockThreads, Resident)
    block_gram_kernel(Slabs slabs, int count, BlockCut cut, int buffers, float* partial) {
  float* const memory = reinterpret_cast<float*>(dynamic_shared());
  using Maker = typename Slabs::template Maker<S>;
  Maker(slabs, memory, cut).prepare(memory, cut, buffers);
  __syncthreads();
  WarpUnits<S> units;
  const auto copy = [&](int slab) {
    if (slab < count) Maker(slabs, memory, cut).copy(slab);
    close_copies();
  };
  const auto slab_of = [&](int turn) {
    return static_cast<int>(blockIdx.x) + turn * static_cast<int>(gridDim.x);
  };
  // With one buffer the barrier at the turn's end guards it.
  const auto buffer_of = [&](int turn) { return buffers == 1 ? 0 : turn % 2; };
  const auto operands_of = [&](int buffer) {
    return reinterpret_cast<uint32_t*>(memory + buffer * cut.operand);
  };
  const auto backs_of = [&](int buffer) { return memory + cut.backs + buffer * S::kGroups; };
  copy(slab_of(0));
  for (int turn = 0; slab_of(turn) < count; ++turn) {
    wait_for_copies<0>();
    warp_barrier();
    Maker(slabs, memory, cut)
        .make(slab_of(turn), turn % 2, operands_of(buffer_of(turn)), backs_of(buffer_of(turn)));
    __syncthreads();
    copy(slab_of(turn + 1));
    units.add(operands_of(buffer_of(turn)), cut.steps, backs_of(buffer_of(turn)));
    if (buffers == 1) __syncthreads();
  }
  units.finish(partial);
}

// visit(kernel, Shape) of the kernel for so many columns.
template <class Slabs, class Visit>
auto with_kernel(int columns, Visit visit) {
  const auto with = [&](auto shape, auto kernel) { return visit(shape, kernel); };
  switch ((columns + 31) / 32) {
    case 4: {
      using S = Shape<4, 4, 5>;
      return with(S{}, block_gram_kernel<S, Slabs, 3>);
    }
    case 5: {
      using S = Shape<5, 8, 4>;
      return with(S{}, block_gram_kernel<S, Slabs, 1>);
    }
    case 6: {
      using S = Shape<6, 8, 6>;
      return with(S{}, block_gram_kernel<S, Slabs, 1>);
    }
    case 7: {
      using S = Shape<7, 12, 5>;
      return with(S{}, block_gram_kernel<S, Slabs, 1>);
    }
    case 8: {
      using S = Shape<8, 12, 6>;
      return with(S{}, block_gram_kernel<S, Slabs, 1>);
    }
    default: {
      using S = Shape<3, 4, 3>;
      return with(S{}, block_gram_kernel<S, Slabs, 3>);
    }
  }
}

template <class Slabs>
BlockCut cut_of(const Slabs& slabs, int buffers) {
  const int groups = std::max((slabs.columns + 31) / 32, 3);
  return BlockCut(groups, buffers, slabs.steps(), slabs.slab_size(groups), slabs.weight_size());
}

// As many operand buffers as pay and there is room for; 0 where not even one fits.
template <class Slabs>
int operand_buffers(const Slabs& slabs) {
  constexpr int kAlone = 128;
  int buffers = slabs.columns > kAlone ? 2 : 1;
  while (buffers > 0 && cut_of(slabs, buffers).bytes() > current_device().shared) --buffers;
  return buffers;
}

template <class Slabs>
Work<float> plan_slabs(const Slabs& slabs, int buffers, const SymmetricSum<float>& sum) {
  return with_kernel<Slabs>(slabs.columns, [&](auto shape, auto kernel) -> Work<float> {
    using S = decltype(shape);
    const BlockCut cut = cut_of(slabs, buffers);
    const int count = static_cast<int>(slabs.count());
    const int64_t blocks = std::min<int64_t>(
        resident_blocks(reinterpret_cast<const void*>(kernel), S::kBlockThreads, cut.bytes()),
        count);
    return {blocks * S::kSize, [=](float* partial, cudaStream_t stream) {
              const cudaError_t error =
                  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::kBlockThreads),
                         cut.bytes(), stream, slabs, count, cut, buffers, partial);
              if (error != cudaSuccess) return error;
              return add_blocks(partial, blocks, int64_t{S::kSize}, BlockPlace<S, Slabs::kOrder>{},
                                sum, stream);
            }};
  });
}

bool takes(const SymmetricSum<float>& sum, int64_t columns) {
  return sum.groups == 1 && sum.order == columns && columns >= 1 && columns <= kMostColumns;
}

// The samples in slabs that fit, and their buffers; none where nothing fits.
struct SamplePlan {
  SampleSlabs slabs;
  int buffers;
};

SamplePlan plan_samples(const float* x, const float* weights, int64_t samples, int64_t rows,
                        int64_t classes, int64_t columns, int64_t sample_stride,
                        int64_t row_stride) {
  // More would not fit anyway.
  constexpr int64_t kMostClasses = 64;
  SamplePlan plan{};
  if (rows < 1 || classes < 1 || classes > kMostClasses) return plan;
  const bool steps_of_pieces = sample_stride % 4 == 0 && (classes == 1 || row_stride % 4 == 0);
  plan.slabs = {x,
                weights,
                samples,
                rows,
                sample_stride,
                row_stride,
                static_cast<int>(classes),
                static_cast<int>(columns),
                false,
                is_aligned(x, 16) && steps_of_pieces,
                128,
                1};
  // Samples in one piece, in whole pieces of 16 bytes.
  plan.slabs.bulk = current_device().hopper() && plan.slabs.pieces && columns % 4 == 0 &&
                    (classes == 1 || row_stride == columns);
  if (plan.slabs.bulk) plan.slabs.stride = plan.slabs.columns;
  // One set of more classes than these makes a slab long enough.
  constexpr int kFewClasses = 12;
  for (plan.slabs.sets = classes > kFewClasses ? 1 : kMostSets; plan.slabs.sets >= 1;
       --plan.slabs.sets) {
    plan.buffers = operand_buffers(plan.slabs);
    if (plan.buffers > 0) break;
  }
  return plan;
}

SamplePlan plan_samples(const BlockSamples& call) {
  return plan_samples(call.jacobian, call.probabilities, call.samples, call.samples * call.classes,
                      call.classes, call.columns, call.sample_stride, call.class_stride);
}

SamplePlan plan_samples(const BlockRows& call) {
  return plan_samples(call.x, nullptr, ceil_div(call.rows, kPlainRows), call.rows, kPlainRows,
                      call.columns, kPlainRows * call.row_stride, call.row_stride);
}

PositionSlabs slabs_of(const BlockPositions& call) {
  const int64_t sixteens = ceil_div(call.positions, 16);
  return {call.x,
          call.sample_stride,
          call.column_stride,
          static_cast<int>(call.samples),
          static_cast<int>(sixteens),
          static_cast<int>(call.positions),
          static_cast<int>(call.columns),
          is_aligned(call.x, 16) && (call.samples == 1 || call.sample_stride % 4 == 0) &&
              (call.columns == 1 || call.column_stride % 4 == 0),
          static_cast<int>(std::min<int64_t>(kMostSteps, call.samples * sixteens))};
}

}  // namespace

bool BlockSamples::fits() const {
  return takes(sum, columns) && samples > 0 && plan_samples(*this).buffers > 0;
}

Work<float> BlockSamples::plan() const {
  const SamplePlan plan = plan_samples(*this);
  return plan_slabs(plan.slabs, plan.buffers, sum);
}

bool BlockRows::fits() const {
  return takes(sum, columns) && rows > 0 && plan_samples(*this).buffers > 0;
}

Work<float> BlockRows::plan() const {
  const SamplePlan plan = plan_samples(*this);
  return plan_slabs(plan.slabs, plan.buffers, sum);
}

bool BlockPositions::fits() const {
  // Sixteens are counted in 32 bits, past the last by less than a slab for every block.
  constexpr int64_t kMost = int64_t{1} << 30;
  return takes(sum, columns) && samples > 0 && positions > 0 && positions <= kMost &&
         samples <= kMost / ceil_div(positions, 16) && operand_buffers(slabs_of(*this)) > 0;
}

Work<float> BlockPositions::plan() const {
  // The lanes' copies go on while the block multiplies, and one buffer leaves room for more blocks.
  return plan_slabs(slabs_of(*this), 1, sum);
}

}  // namespace hesskern::cuda
