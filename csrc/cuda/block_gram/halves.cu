// Gram matrices of 65 to 256 columns of 16-bit rows, the whole upper triangle in the registers of a
// block: one read of the rows bounds them.
//
// Products of 16-bit numbers are exact, so that these are operands as they are: eight neighbours in
// memory, 16 bytes, are one line of the matrices [8, 8] that ldmatrix reads, transposed where the
// neighbours are columns. The threads copy every line to its place (cp_async), two slabs of 64 rows
// ahead, and multiply (units.h); nothing lies between. Thirty-two rows are multiplied
// into fresh registers and added in float32, because tensor cores cut sums off.
//
// 200 columns, 64 rows (25.6 KB): 960 products, 1440 cycles of the tensor cores, 4600 instructions
// of the warps, 1150 cycles of each scheduler; at 4 TB/s the rows take 1500 cycles.
#include <algorithm>

#include "cuda/core/device.h"
#include "cuda/core/elements.h"
#include "cuda/core/launch.h"
#include "cuda/core/warp.h"
#include "cuda/core/warp_gram.h"
#include "halves.h"
#include "units.h"

namespace hesskern::cuda {

namespace {

constexpr int64_t kMostColumns = 256;
constexpr int kSlabRows = 64, kStages = 3;
// Elements of a line.
constexpr int kLine = 8;

// Starts to copy the first count elements of a line, zeros behind them, so many bytes at a time.
template <int Bytes, typename In>
__device__ inline void copy_line(unsigned char* shared, const In* global, int count) {
  if constexpr (Bytes == 16) {
    copy_piece(shared, global, 2 * count);
  } else if constexpr (Bytes == 8) {
    copy_two_words(shared, global, count > 0);
    copy_two_words(shared + 8, count > 4 ? global + 4 : global, count > 4);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_word(reinterpret_cast<float*>(shared + 4 * i),
                reinterpret_cast<const float*>(count > 2 * i ? global + 2 * i : global),
                count > 2 * i);
    }
  }
}

__device__ inline int within(int64_t value, int most) {
  return value < 0 ? 0 : value < most ? static_cast<int>(value) : most;
}

// x [rows, columns], 64 rows a slab.
template <typename In_>
struct RowLines {
  using In = In_;
  static constexpr bool kTransposed = true;

  const In* x;
  int64_t rows, row_stride;
  int columns, bytes;

  __host__ __device__ int64_t count() const { return ceil_div(rows, kSlabRows); }

  // A lane of the first warps has a line of every eight rows, its warp 32 columns.
  template <class S, int Bytes>
  __device__ void copy(int slab, unsigned char* stage) const {
    const int thread = anew(static_cast<int>(threadIdx.x)), r = thread % 8, block = thread / 8;
    if (block >= S::kEights) return;
    const int64_t row = int64_t{slab} * kSlabRows + r;
    const int left = within(rows - row, kSlabRows), count = within(columns - kLine * block, kLine);
    const In* from = x + (count > 0 ? row * row_stride + kLine * block : 0);
    unsigned char* to = stage + block * 128 + r * 16;
#pragma unroll(Bytes == 16 ? 2 : 1)
    for (int first = 0; first < kSlabRows; first += 8, to += S::kHalfBytes) {
      const bool inside = first < left && count > 0;
      copy_line<Bytes>(to, inside ? from : x, inside ? count : 0);
      from += 8 * row_stride;
    }
  }
};

// x [samples, columns, positions], 64 positions a slab: eight lines one after another, of which a
// sample has so many.
template <typename In_>
struct PositionLines {
  using In = In_;
  static constexpr bool kTransposed = false;

  const In* x;
  int64_t sample_stride, column_stride;
  int samples, lines, positions, columns, bytes;

  __host__ __device__ int64_t count() const {
    return ceil_div(int64_t{samples} * lines, kSlabRows / kLine);
  }

  // A lane of the first warps has two eights of positions of every eighth of its warp's 32 columns.
  template <class S, int Bytes>
  __device__ void copy(int slab, unsigned char* stage) const {
    const int thread = anew(static_cast<int>(threadIdx.x)), warp = thread / 32, r = thread % 8;
    if (warp >= S::kGroups) return;
#pragma unroll 1
    for (int eight = thread / 8 % 4; eight < kSlabRows / kLine; eight += 4) {
      const int line = slab * (kSlabRows / kLine) + eight, sample = line / lines;
      const int first = (line - sample * lines) * kLine;
      const int count = sample < samples ? within(positions - first, kLine) : 0;
      int column = 32 * warp + r;
      const In* from = x + sample * sample_stride + column * column_stride + first;
      unsigned char* to = stage + eight * S::kHalfBytes + warp * 512 + r * 16;
#pragma unroll(Bytes == 16 ? 4 : 1)
      for (int block = 0; block < 4; ++block, to += 128, column += 8) {
        const bool inside = count > 0 && column < columns;
        copy_line<Bytes>(to, inside ? from : x, inside ? count : 0);
        from += 8 * column_stride;
      }
    }
  }
};

template <class S, class Lines>
__device__ void copy_lines(const Lines& lines, int slab, unsigned char* stage) {
  if (lines.bytes == 16) {
    lines.template copy<S, 16>(slab, stage);
  } else if (lines.bytes == 8) {
    lines.template copy<S, 8>(slab, stage);
  } else {
    lines.template copy<S, 4>(slab, stage);
  }
}

// partial [blocks, S::kSize]
template <class S, class Lines, int Resident>
__global__ void __launch_bounds__(S::kBlockThreads, Resident)
    block_halves_kernel(Lines lines, float* partial) {
  constexpr int kStage = kSlabRows / 8 * S::kHalfBytes;
  const int step = static_cast<int>(gridDim.x);
  const auto copy = [&](int slab, int stage) {
    if (slab < lines.count()) copy_lines<S>(lines, slab, dynamic_shared() + stage * kStage);
    close_copies();
  };
  int slab = static_cast<int>(blockIdx.x), stage = 0;
#pragma unroll
  for (int s = 0; s + 1 < kStages; ++s) copy(slab + s * step, s);
  WarpUnits<S> units;
  for (; slab < lines.count(); slab += step) {
    wait_for_copies<kStages - 2>();
    // All copies of this slab are there, and nobody multiplies the one before any more.
    __syncthreads();
    copy(slab + (kStages - 1) * step, stage == 0 ? kStages - 1 : stage - 1);
    units.template add_exact<typename Lines::In, Lines::kTransposed>(
        dynamic_shared() + stage * kStage, kSlabRows / 32);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  units.finish(partial);
}

template <class S>
constexpr size_t shared_bytes() {
  return size_t{kStages} * (kSlabRows / 8) * S::kHalfBytes;
}

template <class Lines>
Work<float> plan_lines(const Lines& lines, const SymmetricSum<float>& sum) {
  return with_block_shape(lines.columns, [&](auto shape, auto resident) -> Work<float> {
    using S = decltype(shape);
    const auto kernel = block_halves_kernel<S, Lines, decltype(resident)::value>;
    const int64_t blocks = std::min<int64_t>(
        resident_blocks(reinterpret_cast<const void*>(kernel), S::kBlockThreads, shared_bytes<S>()),
        lines.count());
    return {blocks * S::kSize, [=](float* partial, cudaStream_t stream) {
              const cudaError_t error =
                  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::kBlockThreads),
                         shared_bytes<S>(), stream, lines, partial);
              if (error != cudaSuccess) return error;
              return add_blocks(partial, blocks, int64_t{S::kSize},
                                BlockPlace<S, ColumnOrder::kInTurn>{}, sum, stream);
            }};
  });
}

// Bytes that a line's elements can be copied at a time; 0 if not even 4. The last piece of a line
// of `length` elements may be half full only if 16 bytes are copied.
template <typename In>
int bytes_at_once(const In* x, int64_t stride, int64_t other_stride, int64_t length) {
  const auto steps = [&](int64_t elements) {
    return is_aligned(x, static_cast<size_t>(2 * elements)) && stride % elements == 0 &&
           other_stride % elements == 0;
  };
  if (steps(8)) return 16;
  if (steps(4) && length % 4 == 0) return 8;
  return steps(2) && length % 2 == 0 ? 4 : 0;
}

template <typename In>
int bytes_at_once(const BlockHalves<In>& call) {
  const int64_t row = call.rows > 1 ? call.row_stride : 0;
  if (!call.along_positions) return bytes_at_once(call.x, row, 0, call.columns);
  return bytes_at_once(call.x, row, call.columns > 1 ? call.column_stride : 0, call.positions);
}

}  // namespace

template <typename In>
bool BlockHalves<In>::fits() const {
  // Positions of a sample are counted in 32 bits, and slabs, past the last by three for every
  // block.
  constexpr int64_t kMost = int64_t{1} << 30;
  if (sum.groups != 1 || sum.order != columns || columns < 1 || columns > kMostColumns ||
      rows < 1) {
    return false;
  }
  if (along_positions && (positions < 1 || positions > kMost)) return false;
  const int64_t lines = along_positions ? ceil_div(positions, kLine) : 1;
  if (rows > kMost / lines) return false;
  const size_t shared = with_block_shape(
      static_cast<int>(columns), [](auto shape, auto) { return shared_bytes<decltype(shape)>(); });
  return bytes_at_once(*this) > 0 && shared <= current_device().shared;
}

template <typename In>
Work<float> BlockHalves<In>::plan() const {
  if (!along_positions) {
    return plan_lines(
        RowLines<In>{x, rows, row_stride, static_cast<int>(columns), bytes_at_once(*this)}, sum);
  }
  return plan_lines(
      PositionLines<In>{x, row_stride, column_stride, static_cast<int>(rows),
                        static_cast<int>(ceil_div(positions, kLine)), static_cast<int>(positions),
                        static_cast<int>(columns), bytes_at_once(*this)},
      sum);
}

template struct BlockHalves<BFloat16>;
template struct BlockHalves<Float16>;

}  // namespace hesskern::cuda
