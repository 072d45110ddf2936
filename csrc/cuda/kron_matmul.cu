// Kronecker products of many layers: A X B^T, and U (S . (U^T X V)) V^T.
//
// Two products a layer, or four with the scaling in the second one's write; the same step of all
// layers is one launch (products.cu). The vectors of a block are rows of one matrix when multiplied
// from the right, columns when multiplied from the left.
#include <utility>

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

int64_t whole_pieces(int64_t elements) {
  return ceil_div(elements, 4) * 4;
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

template <typename T>
cudaError_t run(const std::vector<KronLayer<T>>& layers, bool tf32, T* workspace,
                cudaStream_t stream) {
  std::vector<Product<T>> first, second, third, fourth;
  for (const KronLayer<T>& layer : layers) {
    const Pass<T> forward = into(layer);
    T *rotated = workspace, *scaled = rotated + forward.between_size();
    first.push_back(forward.first(layer.x, rotated));
    if (layer.scale.data == nullptr) {
      second.push_back(forward.second(rotated, layer.out));
    } else {
      const Pass<T> backward = back(layer);
      T* unscaled = scaled + forward.out_size();
      second.push_back(forward.second(rotated, scaled));
      forward.scale(second.back(), layer.scale);
      third.push_back(backward.first(scaled, unscaled));
      fourth.push_back(backward.second(unscaled, layer.out));
    }
    workspace += layer_size(layer);
  }
  for (const auto* products : {&first, &second, &third, &fourth}) {
    if (products->empty()) continue;
    const cudaError_t error = multiply_all(*products, tf32, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <typename T>
Work<T> plan_kron_matmul(std::vector<KronLayer<T>> layers, bool tf32) {
  int64_t size = 0;
  for (const KronLayer<T>& layer : layers) size += layer_size(layer);
  return {size, [layers = std::move(layers), tf32](T* memory, cudaStream_t stream) {
            return run(layers, tf32, memory, stream);
          }};
}

template Work<float> plan_kron_matmul(std::vector<KronLayer<float>>, bool);
template Work<double> plan_kron_matmul(std::vector<KronLayer<double>>, bool);

}  // namespace hesskern::cuda
