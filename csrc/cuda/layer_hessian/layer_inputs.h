#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hesskern::cuda {

struct PackedRows;

// x [N, d, t] by element strides, as the layer Hessian's product by parts takes it: X [N t, d] as
// two scaled float16 (core/packed_rows.h), a chunk of samples at a time.
struct LayerInputs {
  const float* x;
  int64_t samples, inputs, positions;
  int64_t x_sample, x_input, x_position;
  // Rows of X, samples times positions, of a chunk at most; fewer, so many at least, where their
  // parts would take more bytes.
  int64_t most_rows = 1 << 17, least_rows = 1 << 14, bytes = int64_t{1} << 28;

  // Whether the device can multiply by parts, and it is faster; columns of Y = X V^T.
  bool pays(int64_t columns) const;

  int64_t chunk_samples() const;
  // Elements of float of a chunk of so many samples, a multiple of four.
  int64_t chunk_size(int64_t count) const;
  // The packed rows of such a chunk, which lie at memory.
  PackedRows chunk(float* memory, int64_t count) const;
  // Packs the chunk of samples first, ...
  cudaError_t pack_chunk(int64_t first, int64_t count, float* memory, cudaStream_t stream) const;

  // Elements of float of all chunks, one after another.
  int64_t size() const;
  // memory [size()], at a multiple of 16 bytes.
  cudaError_t pack(float* memory, cudaStream_t stream) const;
};

}  // namespace hesskern::cuda
