// Kronecker products of many layers: A X B^T, and U (S . (U^T X V)) V^T.
//
// Two products a layer, or four with the scaling in the second one's write; the same step of all
// layers is one launch (products.cu). The vectors of a block are rows of one matrix when multiplied
// from the right, columns when multiplied from the left. On compute capability 9.0 large products
// go by parts (large_products.cu).
#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/large_products.h"
#include "core/launch.h"
#include "core/products.h"
#include "kron_matmul.h"

namespace hesskern::cuda {

namespace {

// x [k, m, d] contiguous times right [d, q]: out [k, m, q] contiguous
template <typename T>
Product<T> from_right(const T* x, int64_t rows, const typename KronLayer<T>::Matrix& right,
                      T* out) {
  Product<T> product{};
  product.a = x;
  product.a_row = {right.rows};
  product.a_k = {1};
  product.b = right.data;
  product.b_k = {right.row_stride};
  product.b_column = {right.column_stride};
  product.c = out;
  product.c_row = {right.columns};
  product.c_column = {1};
  product.m = rows;
  product.n = right.columns;
  product.k_end = right.rows;
  return product;
}

// left [r, m] times x [k, m, d] contiguous: out [k, r, d] contiguous
template <typename T>
Product<T> from_left(const typename KronLayer<T>::Matrix& left, const T* x, int64_t vectors,
                     int64_t d, T* out) {
  Product<T> product{};
  product.a = left.data;
  product.a_row = {left.row_stride};
  product.a_k = {left.column_stride};
  product.b = x;
  product.b_k = {d};
  product.c = out;
  product.c_row = {d};
  product.m = left.rows;
  product.n = vectors * d;
  product.k_end = left.columns;
  // Column (vector, j): one vector needs no division.
  product.b_column = vectors == 1 ? Axis{1} : Axis{1, d, left.columns * d};
  product.c_column = vectors == 1 ? Axis{1} : Axis{1, d, left.rows * d};
  return product;
}

// A layer's two products of one pass, the cheaper one first: left [r, m] X right [d, q] over
// x [k, m, d], by way of between.
template <typename T>
struct Pass {
  const typename KronLayer<T>::Matrix& left;
  const typename KronLayer<T>::Matrix& right;
  int64_t vectors;

  bool right_first() const {
    return left.columns * right.columns * (right.rows + left.rows) <=
           left.rows * right.rows * (left.columns + right.columns);
  }
  // Elements of the results, rounded up so that what follows in the workspace can be copied in
  // pieces.
  int64_t between_size() const {
    return whole_pieces(vectors *
                        (right_first() ? left.columns * right.columns : left.rows * right.rows));
  }
  int64_t out_size() const { return whole_pieces(vectors * left.rows * right.columns); }

  Product<T> first(const T* x, T* between) const {
    if (right_first()) return from_right(x, vectors * left.columns, right, between);
    return from_left(left, x, vectors, right.rows, between);
  }
  Product<T> second(const T* between, T* out) const {
    if (right_first()) return from_left(left, between, vectors, right.columns, out);
    return from_right(between, vectors * left.rows, right, out);
  }
  // The second product's result [k, r, q] times scale [r, q].
  void scale(Product<T>& product, const typename KronLayer<T>::Matrix& scale) const {
    product.scale = scale.data;
    product.scale_row = {scale.row_stride};
    product.scale_column = {scale.column_stride};
    if (vectors == 1) return;
    if (right_first()) {
      product.scale_column = {scale.column_stride, right.columns, 0};
    } else {
      product.scale_row = {scale.row_stride, left.rows, 0};
    }
  }
};

template <typename T>
Pass<T> into(const KronLayer<T>& layer) {
  return {layer.left, layer.right, layer.vectors};
}
template <typename T>
Pass<T> back(const KronLayer<T>& layer) {
  return {layer.back_left, layer.back_right, layer.vectors};
}

// Elements of the workspace that a layer needs.
template <typename T>
int64_t layer_size(const KronLayer<T>& layer) {
  const int64_t size = into(layer).between_size();
  if (layer.scale.data == nullptr) return size;
  return size + into(layer).out_size() + back(layer).between_size();
}

// The products of all layers, step by step: those of a step need only earlier ones' results.
template <typename T>
std::array<std::vector<Product<T>>, 4> steps_of(const std::vector<KronLayer<T>>& layers,
                                                T* workspace) {
  std::array<std::vector<Product<T>>, 4> steps;
  for (const KronLayer<T>& layer : layers) {
    const Pass<T> forward = into(layer);
    T *rotated = workspace, *scaled = rotated + forward.between_size();
    steps[0].push_back(forward.first(layer.x, rotated));
    if (layer.scale.data == nullptr) {
      steps[1].push_back(forward.second(rotated, layer.out));
    } else {
      const Pass<T> backward = back(layer);
      T* unscaled = scaled + forward.out_size();
      steps[1].push_back(forward.second(rotated, scaled));
      forward.scale(steps[1].back(), layer.scale);
      steps[2].push_back(backward.first(scaled, unscaled));
      steps[3].push_back(backward.second(unscaled, layer.out));
    }
    workspace += layer_size(layer);
  }
  return steps;
}

// The steps of float32 layers, large products by parts.
using PlannedSteps = std::vector<PlannedProducts>;

template <typename T>
PlannedSteps planned_steps(const std::vector<KronLayer<T>>& layers, bool tf32,
                           const LargeFrom& from) {
  PlannedSteps planned;
  if constexpr (std::is_same_v<T, float>) {
    // Any address does: sizes and strides are what counts.
    for (const auto& step : steps_of(layers, layers.front().out)) {
      planned.emplace_back(step, tf32, from);
    }
  }
  return planned;
}

// planned_memory: what the planned steps need, one after another.
template <typename T>
cudaError_t run(const std::vector<KronLayer<T>>& layers, const PlannedSteps& planned, bool tf32,
                T* workspace, T* planned_memory, cudaStream_t stream) {
  const auto steps = steps_of(layers, workspace);
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].empty()) continue;
    cudaError_t error;
    if constexpr (std::is_same_v<T, float>) {
      error = planned[i].run(steps[i], planned_memory, stream);
    } else {
      error = multiply_all(steps[i], tf32, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <typename T>
Work<T> plan_kron_matmul(std::vector<KronLayer<T>> layers, bool tf32, const LargeFrom& from) {
  int64_t size = 0, planned_size = 0;
  for (const KronLayer<T>& layer : layers) size += layer_size(layer);
  PlannedSteps planned = planned_steps(layers, tf32, from);
  for (const PlannedProducts& step : planned) {
    planned_size = std::max(planned_size, step.workspace());
  }
  return {size + planned_size, [layers = std::move(layers), planned = std::move(planned), size,
                                tf32](T* memory, cudaStream_t stream) {
            return run(layers, planned, tf32, memory, memory + size, stream);
          }};
}

template Work<float> plan_kron_matmul(std::vector<KronLayer<float>>, bool, const LargeFrom&);
template Work<double> plan_kron_matmul(std::vector<KronLayer<double>>, bool, const LargeFrom&);

}  // namespace hesskern::cuda
