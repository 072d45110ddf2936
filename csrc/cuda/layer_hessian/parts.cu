// Y = X V^T along k, every sample's coefficients and row in the place of y, then out += Y^T X: with
// X as two scaled float16, packed once a chunk (layer_inputs.cu). Its columns carry exponents,
// which are k of the first product: V is divided by them before it is packed, every row scaled as a
// whole.
#include <algorithm>

#include "cuda/core/elements.h"
#include "cuda/core/launch.h"
#include "cuda/core/pack_along_k.h"
#include "cuda/core/packed_rows.h"
#include "cuda/core/parts_product.h"
#include "parts.h"

namespace hesskern::cuda {

namespace {

struct Chunk {
  int64_t samples;
  PartsProduct forward, backward;

  Chunk(const LayerHessianProduct<float>& call, int64_t count)
      : samples(count),
        forward(PartsType::kTwoFloat16, true, count * call.positions,
                call.vector_count * call.outputs, call.inputs, false),
        backward(PartsType::kTwoFloat16, false, call.vector_count * call.outputs, call.inputs,
                 count * call.positions, false) {}
};

}  // namespace

bool LayerHessianParts::pays() const {
  return inputs.pays(call.vector_count * call.outputs);
}

Work<float> LayerHessianParts::plan() const {
  const int64_t step = inputs.chunk_samples(), columns = call.vector_count * call.outputs;
  const int64_t rows = step * call.positions, left = call.samples % step;
  const Chunk whole(call, step), last = left == 0 ? whole : Chunk(call, left);
  const int64_t sums = std::max({whole.forward.workspace(), whole.backward.workspace(),
                                 last.forward.workspace(), last.backward.workspace()});
  const bool kept = call.packed_inputs != nullptr;
  const int64_t x = whole_pieces(sums), x_size = inputs.chunk_size(step);
  const PackedPlace v(x + (kept ? 0 : x_size), 2, columns, call.inputs, true);
  const PackedPlace y_parts(v.end, 2, rows, columns);
  const int64_t y = y_parts.end, coefficients = y + whole_pieces(rows * columns);
  const auto run = [=, *this](float* memory, cudaStream_t stream) {
    for (int64_t first = 0; first < call.samples; first += step) {
      const Chunk& chunk = call.samples - first >= step ? whole : last;
      const int64_t count = chunk.samples * call.positions;
      float* const memory_of_x =
          kept ? const_cast<float*>(call.packed_inputs) + first / step * x_size : memory + x;
      if (!kept) {
        const cudaError_t error = inputs.pack_chunk(first, chunk.samples, memory_of_x, stream);
        if (error != cudaSuccess) return error;
      }
      const PackedRows packed_x = inputs.chunk(memory_of_x, chunk.samples);

      // Anew for every chunk, whose columns have their own exponents.
      const PackedRows packed_v = v.in(memory, columns);
      cudaError_t error =
          pack_along_k({{call.vectors, call.inputs, 1, packed_x.exponents, packed_v}}, stream);
      if (error != cudaSuccess) return error;
      error =
          chunk.forward.run(matrix_of(packed_x, nullptr), matrix_of(packed_v, packed_v.exponents),
                            {memory + y, columns, 1, 1.0f, false}, memory, stream);
      if (error != cudaSuccess) return error;

      const PackedRows packed_y = y_parts.in(memory, count);
      if (replace_packed) {
        error = replace_packed(first, chunk.samples, memory + y, packed_y, stream);
      } else {
        error = replace(first, chunk.samples, memory + y, memory + coefficients, stream);
        if (error != cudaSuccess) return error;
        error = pack_rows<2>(rows_by_axes(memory + y, {columns}, {1}, count, columns), 0, false,
                             packed_y, stream);
      }
      if (error != cudaSuccess) return error;
      error = chunk.backward.run(matrix_of(packed_y, packed_y.exponents),
                                 matrix_of(packed_x, packed_x.exponents),
                                 {call.out, call.inputs, 1, call.alpha, first > 0}, memory, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  };
  return {coefficients + step * call.classes, run};
}

}  // namespace hesskern::cuda
