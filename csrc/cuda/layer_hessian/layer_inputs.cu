// X of the layer Hessian's product as two scaled float16: one read of X, one write of the parts.
#include <algorithm>

#include "cuda/core/elements.h"
#include "cuda/core/launch.h"
#include "cuda/core/packed_rows.h"
#include "cuda/core/parts_product.h"
#include "layer_inputs.h"

namespace hesskern::cuda {

bool LayerInputs::pays(int64_t columns) const {
  // Ten launches a chunk are 25 microseconds or so; with fewer columns of Y tiles are mostly empty.
  constexpr double kLeast = 1 << 30;
  constexpr int64_t kFewest = 32;
  // Of Y and its parts.
  constexpr double kMostBytes = 4.0 * (int64_t{1} << 30);
  const double rows = static_cast<double>(chunk_samples()) * static_cast<double>(positions);
  return columns >= kFewest && inputs >= kFewest && positions <= most_rows &&
         static_cast<double>(samples) * static_cast<double>(positions) *
                 static_cast<double>(columns) * static_cast<double>(inputs) >=
             kLeast &&
         8 * rows * static_cast<double>(columns) <= kMostBytes && inputs <= kLongestPartsSum &&
         parts_products_available();
}

int64_t LayerInputs::chunk_samples() const {
  const int64_t row_bytes = 4 * (ceil_div(inputs, 8) * 8);
  const int64_t rows = std::min(std::max(bytes / row_bytes, least_rows), most_rows);
  return std::clamp<int64_t>(rows / positions, 1, samples);
}

int64_t LayerInputs::chunk_size(int64_t count) const {
  return PackedPlace(0, 2, count * positions, inputs).end;
}

PackedRows LayerInputs::chunk(float* memory, int64_t count) const {
  return PackedPlace(0, 2, count * positions, inputs).in(memory, count * positions);
}

cudaError_t LayerInputs::pack_chunk(int64_t first, int64_t count, float* memory,
                                    cudaStream_t stream) const {
  const bool in_order = positions == 1 || x_sample == positions * x_position;
  const Axis row = !in_order        ? Axis{x_position, positions, x_sample}
                   : positions == 1 ? Axis{x_sample}
                                    : Axis{x_position};
  const PackedRows to = chunk(memory, count);
  const auto source = rows_by_axes(x + first * x_sample, row, {x_input}, to.rows, inputs);
  const bool along_rows = row.step == 1 && x_input != 1;
  return pack_rows<2>(source, 0, along_rows, to, stream);
}

int64_t LayerInputs::size() const {
  const int64_t step = chunk_samples(), left = samples % step;
  return samples / step * chunk_size(step) + (left > 0 ? chunk_size(left) : 0);
}

cudaError_t LayerInputs::pack(float* memory, cudaStream_t stream) const {
  const int64_t step = chunk_samples();
  for (int64_t first = 0; first < samples; first += step) {
    const int64_t count = std::min(step, samples - first);
    const cudaError_t error = pack_chunk(first, count, memory, stream);
    if (error != cudaSuccess) return error;
    memory += chunk_size(count);
  }
  return cudaSuccess;
}

}  // namespace hesskern::cuda
