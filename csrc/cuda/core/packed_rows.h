// Rows of any source to the 16-bit matrices that parts_product.h multiplies: bfloat16 and float16
// as they are, float32 as two float16 (hi/lo) or, with TF32 allowed, as one.
//
// With s = 2^e such that the largest |x s| of a column is in [2^14, 2^15), hi = float16(x s) and
// lo = float16(x s - hi): at the top of float16's range lo keeps its 11 bits down to values 2^-17
// of the column's largest, and below that what is lost is 2^-40 of the largest. To read the rows
// once, the largest is guessed from some of them: it comes to lie in [2^8, 2^9), so that 2^7 times
// the guess still fits. Where all of these are zero, the neighbouring columns' largest is taken,
// and no value may be much smaller. Columns with values that do not fit are packed once more, by a
// kernel that else does nothing. Bound by memory: one read of the rows, one write of the parts.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "elements.h"
#include "float16_parts.h"
#include "launch.h"
#include "parts_product.h"
#include "warp.h"

namespace hesskern::cuda {

// Columns that share a flag.
constexpr int kPackedBlock = 32;

// Where packed rows go: parts [parts, rows, padded] of 16-bit elements; of float32 also exponents
// [padded], and flags [4 padded], scratch: of pack_rows, for every kPackedBlock columns, two words:
// whether guessed exponents do not do for one of them, and which were guessed from others because
// nothing was known of them.
struct PackedRows {
  uint16_t* parts;
  int64_t rows, columns;
  int* exponents;
  int* flags;

  __host__ __device__ int64_t padded() const { return (columns + 7) / 8 * 8; }
  __host__ __device__ int64_t part_step() const { return rows * padded(); }
  __device__ int* flag(int64_t column) const { return flags + 2 * (column / kPackedBlock); }
};

inline PartsMatrix matrix_of(const PackedRows& packed, const int* exponents) {
  return {packed.parts,    packed.rows,        packed.columns,
          packed.padded(), packed.part_step(), exponents};
}

// Where packed rows of so many columns lie in a workspace, in elements of float from begin on, a
// multiple of four; along_k: exponents are of rows.
struct PackedPlace {
  int64_t columns, exponents, flags, parts, end;

  PackedPlace(int64_t begin, int64_t part_count, int64_t rows, int64_t column_count,
              bool along_k = false)
      : columns(column_count), exponents(begin) {
    const int64_t padded = ceil_div(columns, 8) * 8;
    flags = exponents + (along_k ? whole_pieces(rows) : padded);
    parts = flags + 4 * padded;
    end = parts + part_count * rows * padded / 2;
  }

  PackedRows in(float* workspace, int64_t rows) const {
    return {reinterpret_cast<uint16_t*>(workspace + parts), rows, columns,
            reinterpret_cast<int*>(workspace + exponents),
            reinterpret_cast<int*>(workspace + flags)};
  }
};

// Powers of two of Count columns; those beyond float's range come in two factors.
template <int Count>
struct ColumnScales {
  float first[Count], second[Count];
  // Bits of columns that were guessed from others.
  uint32_t unknown;

  // Null: all are one.
  __device__ ColumnScales(const int* exponents, uint32_t unknown_bits) : unknown(unknown_bits) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const int e = exponents == nullptr ? 0 : exponents[i];
      const int near = e < -126 ? -126 : e > 126 ? 126 : e;
      first[i] = float_of(static_cast<uint32_t>(near + 127) << 23);
      second[i] = float_of(static_cast<uint32_t>(e - near + 127) << 23);
    }
  }
  __device__ float scaled(int i, float value) const { return value * first[i] * second[i]; }
};

// Of columns column, ... of packed rows.
template <int Count>
__device__ inline ColumnScales<Count> scales_of(const PackedRows& rows, int64_t column) {
  const uint32_t unknown = static_cast<uint32_t>(rows.flag(column)[1]);
  return {rows.exponents + column, unknown >> column % kPackedBlock & ((1u << Count) - 1)};
}

// Eight columns of a source.
template <class Source>
struct EightColumns {
  using Value = typename Source::Value;
  struct alignas(16) Piece {
    Value values[16 / sizeof(Value)];
  };
  typename Source::Column columns[8];
  // Null: one by one.
  const Value* side_by_side;

  __device__ EightColumns(const Source& source, int64_t first) : side_by_side(source.eight(first)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) columns[i] = source.column(first + i);
  }

  template <bool SideBySide>
  __device__ void load(const Source& source, int64_t row, Value (&values)[8]) const {
    constexpr int kPiece = 16 / sizeof(Value);
    const typename Source::Row at = source.row(row);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (!SideBySide) {
        values[i] = source.load(at, columns[i]);
      } else if (i % kPiece == 0) {
        const Piece piece = *reinterpret_cast<const Piece*>(side_by_side + at.offset + i);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) values[i + j] = piece.values[j];
      }
    }
  }
};

template <int Count>
struct alignas(2 * Count) Halves {
  uint32_t words[Count / 2];
};

// Count columns of a row, four or eight, to their places; whether all of them fit float16.
template <int Parts, int Count>
__device__ inline bool put_columns(const float (&values)[Count], const ColumnScales<Count>& scales,
                                   uint16_t* to, int64_t part_step) {
  // From here on lo has all its bits.
  constexpr float kSmallest = 0.25f;
  Halves<Count> high, low;
  bool fits = true;
#pragma unroll
  for (int i = 0; i < Count; i += 2) {
    const float x = scales.scaled(i, values[i]), y = scales.scaled(i + 1, values[i + 1]);
    fits = fits && fabsf(x) < 65504.0f && fabsf(y) < 65504.0f;
    if (scales.unknown != 0) {
      const auto lost = [&](int j, float value) {
        return (scales.unknown >> j & 1) != 0 && value != 0.0f && fabsf(value) < kSmallest;
      };
      fits = fits && !lost(i, x) && !lost(i + 1, y);
    }
    if constexpr (Parts == 2) {
      split_pair(x, y, high.words[i / 2], low.words[i / 2]);
    } else {
      high.words[i / 2] = float16_pair(x, y);
    }
  }
  *reinterpret_cast<Halves<Count>*>(to) = high;
  if constexpr (Parts == 2) *reinterpret_cast<Halves<Count>*>(to + part_step) = low;
  return fits;
}
template <int Parts, typename T, int Count>
__device__ inline bool put_columns(const T (&values)[Count], const ColumnScales<Count>&,
                                   uint16_t* to, int64_t) {
  static_assert(Parts == 1 && sizeof(T) == 2);
  Halves<Count> words;
#pragma unroll
  for (int i = 0; i < Count / 2; ++i) {
    words.words[i] = values[2 * i].bits | static_cast<uint32_t>(values[2 * i + 1].bits) << 16;
  }
  *reinterpret_cast<Halves<Count>*>(to) = words;
  return true;
}

// Rows row, row + step, ... of eight columns, from a source's rows first_row on; row < end. Whether
// all values fit. Batch: rows that are read before any is written; the compiler must assume that
// writing changes them.
template <int Parts, int Batch, bool SideBySide, class Source>
__device__ inline bool pack_eight(const Source& source, int64_t first_row, int64_t column,
                                  const EightColumns<Source>& at, const ColumnScales<8>& scales,
                                  int64_t row, int64_t step, int64_t end, const PackedRows& to) {
  uint16_t* const out = to.parts + column;
  bool fits = true;
  typename Source::Value values[Batch][8];
  for (; row + (Batch - 1) * step < end; row += Batch * step) {
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      at.template load<SideBySide>(source, first_row + row + i * step, values[i]);
    }
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      fits &= put_columns<Parts>(values[i], scales, out + (row + i * step) * to.padded(),
                                 to.part_step());
    }
  }
  for (; row < end; row += step) {
    at.template load<SideBySide>(source, first_row + row, values[0]);
    fits &= put_columns<Parts>(values[0], scales, out + row * to.padded(), to.part_step());
  }
  return fits;
}

// The same from columns that may lie side by side.
template <int Parts, int Batch, class Source>
__device__ inline bool pack_eight(const Source& source, int64_t first_row, int64_t column,
                                  int64_t row, int64_t step, int64_t end, const PackedRows& to) {
  const EightColumns<Source> at(source, column);
  constexpr bool kScaled = sizeof(typename Source::Value) == 4;
  const ColumnScales<8> scales = kScaled ? scales_of<8>(to, column) : ColumnScales<8>(nullptr, 0);
  return at.side_by_side != nullptr ? pack_eight<Parts, Batch, true>(source, first_row, column, at,
                                                                     scales, row, step, end, to)
                                    : pack_eight<Parts, Batch, false>(source, first_row, column, at,
                                                                      scales, row, step, end, to);
}

constexpr int kGuessThreads = 1024, kFlaggedThreads = 512;

// The largest magnitude's bits of each of 32 columns, of every step'th row; thread t gets column
// t % 32's.
template <int Threads, class Source>
__device__ inline uint32_t largest_of_columns(const Source& source, int64_t first_row, int64_t rows,
                                              int64_t step, int64_t column) {
  constexpr int kDown = Threads / kPackedBlock;
  __shared__ uint32_t all[kDown][kPackedBlock];
  const int thread = static_cast<int>(threadIdx.x);
  const auto at = source.column(column);
  uint32_t largest = 0;
#pragma unroll 8
  for (int64_t row = thread / kPackedBlock * step; row < rows; row += kDown * step) {
    const uint32_t bits = bits_of(source.load(source.row(first_row + row), at)) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  all[thread / kPackedBlock][thread % kPackedBlock] = largest;
  __syncthreads();
  for (int i = 0; i < kDown; ++i) {
    const uint32_t bits = all[i][thread % kPackedBlock];
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Exponents from every step'th row. A block: 32 columns.
template <class Source>
__global__ void __launch_bounds__(kGuessThreads)
    guess_exponents_kernel(Source source, int64_t first_row, int64_t step, PackedRows to) {
  constexpr int kRoom = 6;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kPackedBlock + thread % kPackedBlock;
  const uint32_t largest =
      largest_of_columns<kGuessThreads>(source, first_row, to.rows, step, column);
  if (thread >= kPackedBlock) return;
  const uint32_t of_block = warp_max(largest);
  const bool unknown = largest == 0 && of_block < 0x7f800000u;
  if (column < to.padded()) {
    to.exponents[column] = packed_exponent(unknown ? of_block : largest, kRoom);
  }
  const uint32_t all = warp_or(unknown ? 1u << thread : 0u);
  if (thread == 0) {
    to.flag(column)[0] = 0;
    to.flag(column)[1] = static_cast<int>(all);
  }
}

// Packs all rows; flags what does not fit. A thread takes eight columns of many rows: neighbours
// take the next eight columns of the same row, across of them, or the next rows where these lie
// side by side in memory.
template <class Source, int Parts>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Source source, int64_t first_row, int across, bool along_rows, int64_t share,
                PackedRows to) {
  const int thread = static_cast<int>(threadIdx.x), down = kThreads / across;
  const int group = along_rows ? thread / down : thread % across;
  const int row0 = along_rows ? thread % down : thread / across;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * across + group) * 8;
  if (column >= to.padded()) return;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = begin + share < to.rows ? begin + share : to.rows;
  const bool fits = pack_eight<Parts, 4>(source, first_row, column, begin + row0, down, end, to);
  if (!fits) raise_flag(to.flag(column));
}

// Packs 32 columns once more, with exponents from all rows, where they are flagged.
template <class Source, int Parts>
__global__ void __launch_bounds__(kFlaggedThreads)
    pack_flagged_kernel(Source source, int64_t first_row, PackedRows to) {
  if (to.flags[2 * blockIdx.x] == 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackedBlock;
  const int64_t own = first + thread % kPackedBlock;
  const uint32_t largest = largest_of_columns<kFlaggedThreads>(source, first_row, to.rows, 1, own);
  if (thread < kPackedBlock && own < to.padded()) to.exponents[own] = packed_exponent(largest, 0);
  __syncthreads();
  constexpr int kAcross = kPackedBlock / 8;
  const int64_t column = first + thread % kAcross * 8;
  if (column >= to.padded()) return;
  pack_eight<Parts, 2>(source, first_row, column, thread / kAcross, kFlaggedThreads / kAcross,
                       to.rows, to);
}

// So many rows apart lie those that exponents of rows are guessed from: a thousand or so say enough
// of a column.
inline int64_t guess_step(int64_t rows) {
  constexpr int64_t kEvery = 32, kSampled = 1024;
  return std::max(kEvery, rows / kSampled);
}

inline dim3 packed_blocks(const PackedRows& rows) {
  return dim3(static_cast<unsigned>(ceil_div(rows.padded(), kPackedBlock)));
}

// Exponents from rows first_row, first_row + step, ... of to.rows rows of the source.
template <class Source>
cudaError_t guess_exponents(const Source& source, int64_t first_row, int64_t step,
                            const PackedRows& to, cudaStream_t stream) {
  return launch(guess_exponents_kernel<Source>, packed_blocks(to), dim3(kGuessThreads), 0, stream,
                source, first_row, step, to);
}

// Packs once more what is flagged.
template <int Parts, class Source>
cudaError_t pack_flagged(const Source& source, int64_t first_row, const PackedRows& to,
                         cudaStream_t stream) {
  return launch(pack_flagged_kernel<Source, Parts>, packed_blocks(to), dim3(kFlaggedThreads), 0,
                stream, source, first_row, to);
}

// Rows first_row, ... of the source, to.rows of them. along_rows: rows lie side by side in memory.
template <int Parts, class Source>
cudaError_t pack_rows(const Source& source, int64_t first_row, bool along_rows,
                      const PackedRows& to, cudaStream_t stream) {
  constexpr bool kFloat = sizeof(typename Source::Value) == 4;
  static_assert(kFloat || Parts == 1);
  const int64_t groups = to.padded() / 8;
  int across = along_rows ? 8 : kThreads;
  while (across > 1 && across / 2 >= groups) across /= 2;
  // Threads that would stay idle take other rows instead.
  while (across > 8 && groups % across != 0 && groups % across <= across / 2) across /= 2;
  const int64_t wide = ceil_div(groups, across), down = kThreads / across;
  const int64_t blocks = std::max<int64_t>(16 * current_device().processors / wide, 1);
  const int64_t share = std::max(ceil_div(to.rows, blocks), 4 * down);
  const dim3 grid(static_cast<unsigned>(wide), static_cast<unsigned>(ceil_div(to.rows, share)));
  if constexpr (!kFloat) {
    return launch(pack_kernel<Source, 1>, grid, dim3(kThreads), 0, stream, source, first_row,
                  across, along_rows, share, to);
  } else {
    cudaError_t error = guess_exponents(source, first_row, guess_step(to.rows), to, stream);
    if (error == cudaSuccess) {
      error = launch(pack_kernel<Source, Parts>, grid, dim3(kThreads), 0, stream, source, first_row,
                     across, along_rows, share, to);
    }
    if (error != cudaSuccess) return error;
    return pack_flagged<Parts>(source, first_row, to, stream);
  }
}

}  // namespace hesskern::cuda
