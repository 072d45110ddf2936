// Y = X V^T along k, every sample's coefficients and row in the place of y, then out += Y^T X: with
// X as two scaled float16, packed once a chunk. Its columns carry exponents, which are k of the
// first product: V is divided by them before it is packed, every row scaled as a whole.
#include <algorithm>

#include "core/device.h"
#include "core/elements.h"
#include "core/launch.h"
#include "core/pack_along_k.h"
#include "core/packed_rows.h"
#include "core/parts_product.h"
#include "layer_hessian_parts.h"

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

int64_t chunk_samples(const LayerHessianParts& parts) {
  const int64_t row_bytes = 4 * (ceil_div(parts.call.inputs, 8) * 8);
  const int64_t rows =
      std::min(std::max(parts.bytes / row_bytes, parts.least_rows), parts.most_rows);
  return std::clamp<int64_t>(rows / parts.call.positions, 1, parts.call.samples);
}

}  // namespace

bool LayerHessianParts::pays() const {
  // Ten launches a chunk are 25 microseconds or so; with fewer columns of Y tiles are mostly empty.
  constexpr double kLeast = 1 << 30;
  constexpr int64_t kFewest = 32;
  const int64_t columns = call.vector_count * call.outputs;
  return columns >= kFewest && call.inputs >= kFewest && call.positions <= most_rows &&
         static_cast<double>(call.samples) * static_cast<double>(call.positions) *
                 static_cast<double>(columns) * static_cast<double>(call.inputs) >=
             kLeast &&
         parts_products_available();
}

Work<float> LayerHessianParts::plan() const {
  const int64_t step = chunk_samples(*this), columns = call.vector_count * call.outputs;
  const int64_t rows = step * call.positions, left = call.samples % step;
  const Chunk whole(call, step), last = left == 0 ? whole : Chunk(call, left);
  const int64_t sums = std::max({whole.forward.workspace(), whole.backward.workspace(),
                                 last.forward.workspace(), last.backward.workspace()});
  const PackedPlace x(whole_pieces(sums), 2, rows, call.inputs);
  const PackedPlace v(x.end, 2, columns, call.inputs, true);
  const PackedPlace y_parts(v.end, 2, rows, columns);
  const int64_t y = y_parts.end, coefficients = y + whole_pieces(rows * columns);
  const bool in_order = call.positions == 1 || call.x_sample == call.positions * call.x_position;
  const Axis row = !in_order             ? Axis{call.x_position, call.positions, call.x_sample}
                   : call.positions == 1 ? Axis{call.x_sample}
                                         : Axis{call.x_position};
  const auto run = [=, *this](float* memory, cudaStream_t stream) {
    for (int64_t first = 0; first < call.samples; first += step) {
      const Chunk& chunk = call.samples - first >= step ? whole : last;
      const int64_t count = chunk.samples * call.positions;
      const auto source =
          rows_by_axes(call.x + first * call.x_sample, row, {call.x_input}, count, call.inputs);
      const PackedRows packed_x = x.in(memory, count);
      const bool along_rows = row.step == 1 && call.x_input != 1;
      cudaError_t error = pack_rows<2>(source, 0, along_rows, packed_x, stream);
      if (error != cudaSuccess) return error;

      // Anew for every chunk, whose columns have their own exponents.
      const PackedRows packed_v = v.in(memory, columns);
      error = pack_along_k({{call.vectors, call.inputs, 1, packed_x.exponents, packed_v}}, stream);
      if (error != cudaSuccess) return error;
      error =
          chunk.forward.run(matrix_of(packed_x, nullptr), matrix_of(packed_v, packed_v.exponents),
                            {memory + y, columns, 1, 1.0f, false}, memory, stream);
      if (error != cudaSuccess) return error;

      error = replace(first, chunk.samples, memory + y, memory + coefficients, stream);
      if (error != cudaSuccess) return error;

      const PackedRows packed_y = y_parts.in(memory, count);
      error = pack_rows<2>(rows_by_axes(memory + y, {columns}, {1}, count, columns), 0, false,
                           packed_y, stream);
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
