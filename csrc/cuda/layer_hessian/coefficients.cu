// The middle of the layer Hessian's product: of every sample y := S^T S y.
//
// A warp takes a sample and keeps rows of S in registers, so that the products with y and the
// combination of the rows read S once; a lane has four neighbours of every 128 columns. No shared
// memory, no barrier. Bound by memory: one read of S, y read, and written as it is or as two scaled
// float16. A vector's work of c m
// numbers of S is 2 c m / 32 FMA and 10 c shuffles and additions of a warp.
#include "coefficients.h"
#include "cuda/core/elements.h"
#include "cuda/core/launch.h"
#include "cuda/core/packed_rows.h"
#include "cuda/core/warp.h"

namespace hesskern::cuda {

namespace {

constexpr int kBlock = 128, kWarps = kBlock / 32;

// Where a lane's numbers of a row of up to 128 Wide lie. Aligned: rows begin and end at multiples
// of 16 bytes.
template <int Wide, bool Aligned>
struct LaneColumns {
  static constexpr int kEach = Aligned ? 1 : 4;
  int column[Wide][kEach];
  bool inside[Wide][kEach];

  // Past the end a lane reads the row's first numbers: no load waits for a condition.
  __device__ explicit LaneColumns(int end) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < Wide; ++j) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int at = j * 128 + (Aligned ? lane * 4 : e * 32 + lane);
        inside[j][e] = at < end;
        column[j][e] = at < end ? at : 0;
      }
    }
  }
};

// A lane's part of a row.
template <int Wide, bool Aligned>
struct LaneRow {
  using Columns = LaneColumns<Wide, Aligned>;
  Four<float> part[Wide];

  template <bool Once>
  __device__ void load(const float* from, const Columns& columns) {
#pragma unroll
    for (int j = 0; j < Wide; ++j) {
      if constexpr (Aligned) {
        const float* const place = from + columns.column[j][0];
        if constexpr (Once) {
          read_once(part[j].value, place);
        } else {
          part[j] = *reinterpret_cast<const Four<float>*>(place);
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) part[j].value[e] = from[columns.column[j][e]];
      }
    }
  }

  // Zeros past the end: what stands in another row there does not count in products.
  __device__ void end(const Columns& columns) {
#pragma unroll
    for (int j = 0; j < Wide; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!columns.inside[j][e % Columns::kEach]) part[j].value[e] = 0.0f;
      }
    }
  }

  __device__ void store(float* to, const Columns& columns) const {
#pragma unroll
    for (int j = 0; j < Wide; ++j) {
      if constexpr (Aligned) {
        if (columns.inside[j][0]) {
          *reinterpret_cast<Four<float>*>(to + columns.column[j][0]) = part[j];
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (columns.inside[j][e]) to[columns.column[j][e]] = part[j].value[e];
        }
      }
    }
  }

  // To columns first, first + 1, ... of a packed row; what does not fit raises its flag.
  __device__ void pack(const PackedRows& to, int64_t row, int64_t first,
                       const Columns& columns) const {
    static_assert(Aligned);
#pragma unroll
    for (int j = 0; j < Wide; ++j) {
      if (!columns.inside[j][0]) continue;
      const int64_t column = first + columns.column[j][0];
      if (!put_columns<2>(part[j].value, scales_of<4>(to, column),
                          to.parts + row * to.padded() + column, to.part_step())) {
        raise_flag(to.flag(column));
      }
    }
  }

  // The lane's share of the scalar product.
  __device__ float product(const LaneRow& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < Wide; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += part[j].value[e] * other.part[j].value[e];
    }
    return sum;
  }

  __device__ void add(float factor, const LaneRow& other) {
#pragma unroll
    for (int j = 0; j < Wide; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) part[j].value[e] += factor * other.part[j].value[e];
    }
  }
};

// Whether one of the packed rows' flags is raised, for all lanes of a warp.
__device__ inline bool any_flag(const PackedRows& rows) {
  uint32_t raised = 0;
  for (int64_t column = threadIdx.x % 32 * kPackedBlock; column < rows.columns;
       column += 32 * kPackedBlock) {
    raised |= static_cast<uint32_t>(rows.flag(column)[0]);
  }
  return warp_or(raised) != 0;
}

// Classes rows of S and Vectors rows of y are in registers at a time. S is read once where Classes
// is all of them, else once per Vectors. Packed: to these rows; else to out, with flags only if one
// of them is raised.
template <int Wide, int Classes, int Vectors, bool Aligned, bool Packed>
__global__ void __launch_bounds__(kBlock)
    row_coefficient_kernel(LayerHessianCoefficients call, PackedRows packed) {
  using Row = LaneRow<Wide, Aligned>;
  constexpr bool kOnce = Vectors == 1;
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (sample >= call.samples) return;
  if constexpr (!Packed) {
    if (packed.flags != nullptr && !any_flag(packed)) return;
  }
  const int outputs = static_cast<int>(call.outputs), classes = static_cast<int>(call.classes);
  const int vectors = static_cast<int>(call.vector_count);
  const float* const s = call.s + sample * call.s_sample;
  const LaneColumns<Wide, Aligned> columns(outputs);
  Row rows[Classes];
  // Past the last class the last one again, whose coefficient becomes zero there.
  const auto load = [&](int first) {
#pragma unroll
    for (int c = 0; c < Classes; ++c) {
      const int row = first + c < classes ? first + c : classes - 1;
      rows[c].template load<kOnce>(s + row * call.s_class, columns);
    }
  };
  const bool all = classes <= Classes;
  if (all) load(0);
  for (int vector = 0; vector < vectors; vector += Vectors) {
    const int64_t column = static_cast<int64_t>(vector) * outputs;
    const float* const y = call.y + sample * call.y_sample + column;
    const int last = vectors - 1 - vector;
    Row values[Vectors], sums[Vectors];
#pragma unroll
    for (int k = 0; k < Vectors; ++k) {
      sums[k] = Row{};
      values[k].template load<false>(y + static_cast<int64_t>(k < last ? k : last) * outputs,
                                     columns);
      values[k].end(columns);
    }
    for (int first = 0; first < classes; first += Classes) {
      if (!all) load(first);
      float a[Classes][Vectors];
#pragma unroll
      for (int c = 0; c < Classes; ++c) {
#pragma unroll
        for (int k = 0; k < Vectors; ++k) a[c][k] = rows[c].product(values[k]);
      }
      // Sums over the warp, side by side: one alone would wait for every exchange.
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
        for (int c = 0; c < Classes; ++c) {
#pragma unroll
          for (int k = 0; k < Vectors; ++k) a[c][k] += from_lane_xor(a[c][k], mask);
        }
      }
#pragma unroll
      for (int c = 0; c < Classes; ++c) {
#pragma unroll
        for (int k = 0; k < Vectors; ++k) {
          sums[k].add(first + c < classes ? a[c][k] : 0.0f, rows[c]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < Vectors; ++k) {
      if (k > last) continue;
      const int64_t at = column + static_cast<int64_t>(k) * outputs;
      if constexpr (Packed) {
        sums[k].pack(packed, sample, at, columns);
      } else {
        sums[k].store(call.out + sample * vectors * outputs + at, columns);
      }
    }
  }
  if constexpr (Packed) {
    // Columns that fill the row up.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < packed.padded() - packed.columns) {
      uint16_t* const end = packed.parts + sample * packed.padded() + packed.columns + lane;
      end[0] = 0;
      end[packed.part_step()] = 0;
    }
  }
}

bool whole_pieces(const float* data, int64_t steps) {
  return is_aligned(data, 16) && steps % 4 == 0;
}

template <int Wide, int Classes, int Vectors, bool Aligned, bool Packed>
cudaError_t start(const LayerHessianCoefficients& call, const PackedRows& packed,
                  cudaStream_t stream) {
  return launch(row_coefficient_kernel<Wide, Classes, Vectors, Aligned, Packed>,
                dim3(static_cast<unsigned>(ceil_div(call.samples, kWarps))), dim3(kBlock), 0,
                stream, call, packed);
}

template <bool Aligned, bool Packed>
cudaError_t run_rows(const LayerHessianCoefficients& call, const PackedRows& packed,
                     cudaStream_t stream) {
  const int64_t outputs = call.outputs, classes = call.classes;
  const bool one = call.vector_count == 1;
  if (outputs <= 128) {
    if (classes <= 4) return start<1, 4, 1, Aligned, Packed>(call, packed, stream);
    if (classes <= 10 || one) return start<1, 10, 1, Aligned, Packed>(call, packed, stream);
    return start<1, 4, 4, Aligned, Packed>(call, packed, stream);
  }
  if (outputs <= 256) {
    if (classes <= 5 || one) return start<2, 5, 1, Aligned, Packed>(call, packed, stream);
    if (classes <= 10) return start<2, 10, 1, Aligned, Packed>(call, packed, stream);
    return start<2, 4, 4, Aligned, Packed>(call, packed, stream);
  }
  if (outputs <= 512) {
    if (classes <= 5 || one) return start<4, 5, 1, Aligned, Packed>(call, packed, stream);
    return start<4, 2, 2, Aligned, Packed>(call, packed, stream);
  }
  if constexpr (Aligned) {
    if (classes <= 2 || one) return start<8, 2, 1, true, Packed>(call, packed, stream);
    return start<8, 1, 2, true, Packed>(call, packed, stream);
  } else {
    // More would not fit beside the places of its numbers.
    return start<8, 1, 1, false, Packed>(call, packed, stream);
  }
}

}  // namespace

bool LayerHessianCoefficients::aligned() const {
  return whole_pieces(y, outputs) && whole_pieces(y, samples > 1 ? y_sample : 0) &&
         whole_pieces(out, outputs) && whole_pieces(s, samples > 1 ? s_sample : 0) &&
         whole_pieces(s, classes > 1 ? s_class : 0);
}

cudaError_t LayerHessianCoefficients::run(cudaStream_t stream) const {
  return aligned() ? run_rows<true, false>(*this, {}, stream)
                   : run_rows<false, false>(*this, {}, stream);
}

cudaError_t LayerHessianCoefficients::run_packed(const PackedRows& to, cudaStream_t stream) const {
  // The samples that exponents are guessed from, in the place of the parts.
  LayerHessianCoefficients some = *this;
  const int64_t step = guess_step(samples);
  some.samples = ceil_div(samples, step);
  some.s_sample *= step;
  some.y_sample *= step;
  some.out = reinterpret_cast<float*>(to.parts);
  PackedRows guessed = to;
  guessed.rows = some.samples;
  const auto rows_of = [&](const float* rows, int64_t count) {
    return rows_by_axes(rows, {to.columns}, {1}, count, to.columns);
  };
  cudaError_t error = some.run(stream);
  if (error != cudaSuccess) return error;
  error = guess_exponents(rows_of(some.out, some.samples), 0, 1, guessed, stream);
  if (error != cudaSuccess) return error;
  error = run_rows<true, true>(*this, to, stream);
  if (error != cudaSuccess) return error;
  error = run_rows<true, false>(*this, to, stream);
  if (error != cudaSuccess) return error;
  return pack_flagged<2>(rows_of(out, samples), 0, to, stream);
}

}  // namespace hesskern::cuda
