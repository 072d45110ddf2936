// Product with the exact layer-wise Hessian: alpha sum_n S_n^T S_n (V x_n) x_n^T.
//
// Samples in chunks whose products V x_n stay in the L2 cache: Y = X V^T, then every sample's
// coefficients a = S_n y_n and its row S_n^T a in the place of y_n, then out += Y^T X. 4 N t d m
// operations a vector in the two products (three times on tensor cores), which bound it; one read
// of S (of short rows; else one or two a vector), and two of X. On compute capability 9.0 larger
// products are parts.cu's.
#include <algorithm>
#include <type_traits>

#include "coefficients.h"
#include "cuda/core/launch.h"
#include "cuda/core/products.h"
#include "cuda/core/splits.h"
#include "cuda/core/warp.h"
#include "layer_hessian_matmul.h"
#include "parts.h"

namespace hesskern::cuda {

namespace {

constexpr int kWarps = kThreads / 32;
// Parts of a chunk's samples whose sums are added in fixed order, and their elements in all.
constexpr int64_t kMostSplits = 32, kSplitElements = 1 << 24;

template <typename T>
int64_t chunk_samples(const LayerHessianProduct<T>& call) {
  const int64_t row = call.positions * call.vector_count * call.outputs;
  return std::clamp<int64_t>(call.chunk_elements / row, 1, call.samples);
}

// Splits of a chunk's rows, so that the tiles of the second product fill the device.
template <typename T>
Splits plan_chunk(const LayerHessianProduct<T>& call) {
  const int64_t rows = chunk_samples(call) * call.positions;
  const int64_t columns = call.vector_count * call.outputs;
  const int64_t tiles = ceil_div(columns, 128) * ceil_div(call.inputs, 128);
  // In rows.
  constexpr int64_t kWrite = 128, kFewest = 256;
  const int64_t most =
      std::min({kMostSplits, rows / kFewest, kSplitElements / (columns * call.inputs)});
  return plan_splits(tiles, rows, current_device().processors, kWrite, 1, most);
}

// visit(output, position) of a sample's elements: neighbouring threads take neighbours in s, from
// fast on every fast_step-th, and along the other axis from slow on every slow_step-th.
template <typename T, class Visit>
__device__ void walk(const LayerHessianProduct<T>& call, int slow, int slow_step, int fast,
                     int fast_step, Visit visit) {
  const bool outputs_first = call.s_output == 1 || call.positions == 1;
  const int64_t fast_end = outputs_first ? call.outputs : call.positions;
  const int64_t slow_end = outputs_first ? call.positions : call.outputs;
  for (int64_t i = slow; i < slow_end; i += slow_step) {
    // Unrolled, the kernel spills registers.
#pragma unroll 1
    for (int64_t j = fast; j < fast_end; j += fast_step) {
      visit(outputs_first ? j : i, outputs_first ? i : j);
    }
  }
}

// Whether a warp can keep rows of S in registers (coefficients.cu).
template <typename T>
bool has_short_rows(const LayerHessianProduct<T>& call) {
  return std::is_same_v<T, float> && call.positions == 1 &&
         (call.s_output == 1 || call.outputs == 1) &&
         call.outputs <= LayerHessianCoefficients::kMostOutputs;
}

// y [samples, t, k m] in place: of every sample and vector, y := sum_c <s_c, y> s_c with
// s_c [m, t], of any layout. One block a sample; first: the chunk's first sample; coefficients
// [samples, c].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    coefficient_kernel(LayerHessianProduct<T> call, int64_t first, T* y, T* coefficients) {
  coefficients += blockIdx.x * call.classes;
  const int64_t row = call.vector_count * call.outputs;
  const T* s = call.s + (first + blockIdx.x) * call.s_sample;
  T* sample = y + blockIdx.x * call.positions * row;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int64_t vector = 0; vector < call.vector_count; ++vector) {
    T* values = sample + vector * call.outputs;
    for (int64_t c = warp; c < call.classes; c += kWarps) {
      T total = T(0);
      walk(call, 0, 1, lane, 32, [&](int64_t output, int64_t position) {
        total += s[c * call.s_class + output * call.s_output + position * call.s_position] *
                 values[position * row + output];
      });
      total = warp_sum(total);
      if (lane == 0) coefficients[c] = total;
    }
    __syncthreads();
    const auto combine = [&](int64_t output, int64_t position) {
      const T* place = s + output * call.s_output + position * call.s_position;
      T total = T(0);
#pragma unroll 4
      for (int64_t c = 0; c < call.classes; ++c) total += coefficients[c] * place[c * call.s_class];
      values[position * row + output] = total;
    };
    if (call.positions == 1) {
      walk(call, 0, 1, thread, kThreads, combine);
    } else {
      walk(call, warp, kWarps, lane, 32, combine);
    }
    __syncthreads();
  }
}

// The middle of the product for count samples from start on, of short rows; in place.
LayerHessianCoefficients of_short_rows(const LayerHessianProduct<float>& call, int64_t start,
                                       int64_t count, float* y) {
  return {call.s + start * call.s_sample,
          call.s_sample,
          call.s_class,
          y,
          call.vector_count * call.outputs,
          y,
          count,
          call.classes,
          call.outputs,
          call.vector_count};
}

// The same of a chunk of count samples from start on.
template <typename T>
cudaError_t replace_by_rows(const LayerHessianProduct<T>& call, int64_t start, int64_t count, T* y,
                            T* coefficients, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (has_short_rows(call)) {
      return of_short_rows(call, start, count, y).run(stream);
    }
  }
  return launch(coefficient_kernel<T>, dim3(static_cast<unsigned>(count)), dim3(kThreads), 0,
                stream, call, start, y, coefficients);
}

// out [size] (+)= alpha sum over splits of partial [splits, size], in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(T* out, const T* partial, int64_t splits, int64_t size, T alpha, bool first) {
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < size;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    T total = partial[index];
    for (int64_t split = 1; split < splits; ++split) total += partial[split * size + index];
    out[index] = first ? alpha * total : out[index] + alpha * total;
  }
}

// memory: what plan() asks for.
template <typename T>
cudaError_t run(const LayerHessianProduct<T>& call, const Splits& splits, T* memory,
                cudaStream_t stream) {
  const int64_t step = chunk_samples(call), columns = call.vector_count * call.outputs;
  const int64_t size = columns * call.inputs;
  T *partial = memory, *y = partial + splits.count * size;
  T* coefficients = y + step * call.positions * columns;
  const auto rows_of = [&](int64_t sample_stride, int64_t position_stride) {
    if (call.positions == 1 || sample_stride == call.positions * position_stride) {
      return Axis{call.positions == 1 ? sample_stride : position_stride};
    }
    return Axis{position_stride, call.positions, sample_stride};
  };
  for (int64_t start = 0; start < call.samples; start += step) {
    const int64_t count = std::min(step, call.samples - start), rows = count * call.positions;
    const T* inputs_of_chunk = call.x + start * call.x_sample;

    Product<T> forward{};
    forward.a = inputs_of_chunk;
    forward.a_row = rows_of(call.x_sample, call.x_position);
    forward.a_k = {call.x_input};
    forward.b = call.vectors;
    forward.b_k = {1};
    forward.b_column = {call.inputs};
    forward.c = y;
    forward.c_row = {columns};
    forward.c_column = {1};
    forward.m = rows;
    forward.n = columns;
    forward.k_end = call.inputs;
    cudaError_t error = multiply_all<T>({forward}, call.tf32, stream);
    if (error != cudaSuccess) return error;

    error = replace_by_rows(call, start, count, y, coefficients, stream);
    if (error != cudaSuccess) return error;

    std::vector<Product<T>> backward;
    const int64_t share = ceil_div(rows, splits.count);
    for (int64_t begin = 0; begin < rows; begin += share) {
      Product<T> part{};
      part.a = y;
      part.a_row = {1};
      part.a_k = {columns};
      part.b = inputs_of_chunk;
      part.b_k = rows_of(call.x_sample, call.x_position);
      part.b_column = {call.x_input};
      part.c = partial + static_cast<int64_t>(backward.size()) * size;
      part.c_row = {call.inputs};
      part.c_column = {1};
      part.m = columns;
      part.n = call.inputs;
      part.k_begin = begin;
      part.k_end = std::min(begin + share, rows);
      backward.push_back(part);
    }
    error = multiply_all(backward, call.tf32, stream);
    if (error != cudaSuccess) return error;

    error = launch(add_splits_kernel<T>, grid_for(size), dim3(kThreads), 0, stream, call.out,
                   static_cast<const T*>(partial), static_cast<int64_t>(backward.size()), size,
                   call.alpha, start == 0);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <typename T>
Work<T> LayerHessianProduct<T>::plan() const {
  if constexpr (sizeof(T) == 4) {
    const LayerHessianParts parts = layer_hessian_parts(*this);
    if (parts.pays()) return parts.plan();
  }
  const Splits splits = plan_chunk(*this);
  const int64_t coefficients = has_short_rows(*this) ? 0 : classes;
  const int64_t workspace =
      chunk_samples(*this) * (positions * vector_count * outputs + coefficients) +
      splits.count * vector_count * outputs * inputs;
  return {workspace, [call = *this, splits](T* memory, cudaStream_t stream) {
            return run(call, splits, memory, stream);
          }};
}

LayerHessianParts layer_hessian_parts(const LayerHessianProduct<float>& call) {
  const LayerInputs inputs{call.x,        call.samples, call.inputs,    call.positions,
                           call.x_sample, call.x_input, call.x_position};
  LayerHessianParts parts{call, inputs, {}, {}};
  parts.replace = [call](int64_t first, int64_t count, float* y, float* coefficients,
                         cudaStream_t stream) {
    return replace_by_rows(call, first, count, y, coefficients, stream);
  };
  if (has_short_rows(call) && of_short_rows(call, 0, call.samples, nullptr).aligned()) {
    parts.replace_packed = [call](int64_t first, int64_t count, float* y, const PackedRows& to,
                                  cudaStream_t stream) {
      return of_short_rows(call, first, count, y).run_packed(to, stream);
    };
  }
  return parts;
}

template struct LayerHessianProduct<float>;
template struct LayerHessianProduct<double>;

}  // namespace hesskern::cuda
