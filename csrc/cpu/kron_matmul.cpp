// A X B^T and U (S . (U^T X V)) V^T, each product in the cheaper order, with
// transposes read in place, intermediate results written in the layout in which
// the next product reads them, and the scaling applied where its operand appears.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "checks.h"
#include "gemm.h"
#include "scratch.h"

namespace hesskern::cpu {

namespace {

// Layers below this many multiply-adds run side by side, one per thread: a
// threaded product of that size spends its time in synchronization.
constexpr int64_t kSmallWork = 1 << 22;

// A batch of matrices [count, rows, columns].
template <typename T>
struct Batch {
  Matrix<T> matrix;
  int64_t count, stride, rows, columns;
};

// out := A X B^T for every X of the batch.
template <typename T>
struct Sandwich {
  Matrix<T> a;   // [rows, X.rows]
  Matrix<T> bt;  // [X.columns, columns]
  Batch<T> x;
  int64_t rows, columns;
  const Scale<T>* scale;

  // X B^T first, or A X.
  bool right_first() const {
    return x.rows * x.columns * columns + rows * x.rows * columns <=
           rows * x.rows * x.columns + rows * x.columns * columns;
  }
  int64_t scratch_size() const {
    const int64_t width = microkernels<T>().width;
    if (right_first()) {
      return panels_size<T>(x.columns, columns) + x.count * panels_size<T>(x.rows, columns);
    }
    return x.count * panels_size<T>(x.rows, x.columns) + panels_size<T>(x.columns, columns) +
           x.count * rows * spread_stride<T>(x.columns) + width;
  }

  // out [count, rows, columns], rows out_stride apart
  void run(T* out, int64_t out_stride, T* scratch) const {
    if (right_first()) {
      T* bt_panels = scratch;
      T* products = scratch + panels_size<T>(x.columns, columns);
      // The batch's rows, one below the other, in one product.
      const int64_t all = x.count * x.rows, width = microkernels<T>().width;
      multiply_right(Target<T>::panels(products, all, 0), x.matrix, all, bt_panels, nullptr);
      const RightOperand<T> right{products,    x.rows,         columns,
                                  all * width, x.rows * width, x.count};
      product(Target<T>::rows(out, out_stride, rows * out_stride), a, right, rows, scale,
              [](int64_t, int64_t) {});
      return;
    }
    T* x_panels = scratch;
    T* bt_panels = x_panels + x.count * panels_size<T>(x.rows, x.columns);
    T* products = bt_panels + panels_size<T>(x.columns, columns);
    const int64_t stride = spread_stride<T>(x.columns), size = panels_size<T>(x.rows, x.columns);
    const RightOperand<T> right{x_panels, x.rows, x.columns, x.rows * microkernels<T>().width,
                                size,     x.count};
    product(Target<T>::rows(products, stride, rows * stride), a, right, rows,
            static_cast<const Scale<T>*>(nullptr), [&](int64_t first, int64_t last) {
              const int64_t panels = right.panels();
              for (int64_t i = first; i < last; ++i) {
                const Matrix<T> xi{x.matrix.data + i / panels * x.stride, x.matrix.row,
                                   x.matrix.column};
                pack_right(x_panels + i / panels * size, xi, x.rows, x.columns, i % panels,
                           i % panels + 1);
              }
            });
    multiply_right(Target<T>::rows(out, out_stride, 0), Matrix<T>{products, stride, 1},
                   x.count * rows, bt_panels, scale);
  }

 private:
  // c := left B^T, left [left_rows, X.columns]
  void multiply_right(const Target<T>& c, const Matrix<T>& left, int64_t left_rows, T* panels,
                      const Scale<T>* factors) const {
    const RightOperand<T> right{
        panels, x.columns, columns, x.columns * microkernels<T>().width, 0, 1};
    product(c, left, right, left_rows, factors, [&](int64_t first, int64_t last) {
      pack_right(panels, bt, x.columns, columns, first, last);
    });
  }
};

template <typename T>
Matrix<T> matrix(const at::Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(-2), t.stride(-1)};
}
template <typename T>
Matrix<T> transposed(const at::Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(-1), t.stride(-2)};
}

// Rows of all matrices must be one below the other.
at::Tensor foldable(const at::Tensor& X) {
  return X.dim() == 2 || X.stride(0) == X.size(1) * X.stride(1) ? X : X.contiguous();
}

template <typename T>
Batch<T> batch(const at::Tensor& X) {
  return {matrix<T>(X), X.dim() == 3 ? X.size(0) : 1, X.dim() == 3 ? X.stride(0) : 0, X.size(-2),
          X.size(-1)};
}

at::Tensor empty_like(const at::Tensor& X, int64_t rows, int64_t columns) {
  return X.dim() == 3 ? at::empty({X.size(0), rows, columns}, X.options())
                      : at::empty({rows, columns}, X.options());
}

// out [(k,) m', d'] := A [m', m] X [(k,) m, d] B^T [d, d']
void kron_product(const at::Tensor& out, const at::Tensor& A, const at::Tensor& B,
                  const at::Tensor& X) {
  if (X.numel() == 0 || out.numel() == 0) {
    out.zero_();
    return;
  }
  const at::Tensor x = foldable(X);
  AT_DISPATCH_FLOATING_TYPES(X.scalar_type(), "kron_matmul", [&] {
    const Sandwich<scalar_t> sandwich{matrix<scalar_t>(A), transposed<scalar_t>(B),
                                      batch<scalar_t>(x),  A.size(0),
                                      B.size(0),           nullptr};
    const Scratch<scalar_t> scratch(sandwich.scratch_size());
    sandwich.run(out.mutable_data_ptr<scalar_t>(), B.size(0), scratch.data());
  });
}

// out [(k,) m, d] := U [m, r] (S [r, q] . (U^T X [(k,) m, d] V [d, q])) V^T
void eigen_product(const at::Tensor& out, const at::Tensor& U, const at::Tensor& S,
                   const at::Tensor& V, const at::Tensor& X) {
  if (X.numel() == 0 || S.numel() == 0) {
    out.zero_();
    return;
  }
  const at::Tensor x = foldable(X);
  AT_DISPATCH_FLOATING_TYPES(X.scalar_type(), "kron_eigen_matmul", [&] {
    const int64_t r = S.size(0), q = S.size(1), stride = spread_stride<scalar_t>(q);
    const Scale<scalar_t> scale{matrix<scalar_t>(S), r};
    const Batch<scalar_t> input = batch<scalar_t>(x);
    const Sandwich<scalar_t> into{transposed<scalar_t>(U), matrix<scalar_t>(V), input, r, q, &scale};
    const int64_t size = input.count * r * stride;
    const Scratch<scalar_t> coordinates(size);
    const Sandwich<scalar_t> back{
        matrix<scalar_t>(U),
        transposed<scalar_t>(V),
        {{coordinates.data(), stride, 1}, input.count, r * stride, r, q},
        U.size(0),
        V.size(0),
        nullptr};
    const Scratch<scalar_t> scratch(std::max(into.scratch_size(), back.scratch_size()));
    into.run(coordinates.data(), stride, scratch.data());
    back.run(out.mutable_data_ptr<scalar_t>(), V.size(0), scratch.data());
  });
}

// float16 and bfloat16 have no kernels of their own.
bool has_kernel(const at::Tensor& X) {
  return X.scalar_type() == at::kFloat || X.scalar_type() == at::kDouble;
}

int64_t work(const at::Tensor& left, const at::Tensor& right, const at::Tensor& X) {
  return X.numel() * (left.numel() / std::max<int64_t>(X.size(-2), 1) +
                      right.numel() / std::max<int64_t>(X.size(-1), 1));
}

// Runs task(i) for every layer: large ones in turn with threads of their own,
// small ones side by side, the largest first.
template <class Task>
void for_each_layer(const std::vector<int64_t>& works, const Task& task) {
  std::vector<int64_t> small;
  int64_t total = 0;
  for (size_t i = 0; i < works.size(); ++i) {
    if (works[i] < kSmallWork) {
      small.push_back(static_cast<int64_t>(i));
      total += works[i];
    } else {
      task(static_cast<int64_t>(i));
    }
  }
  const int64_t count = static_cast<int64_t>(small.size());
  const int64_t threads = std::min(product_threads(total), count);
  if (threads <= 1) {
    for (const int64_t i : small) task(i);
    return;
  }
  std::sort(small.begin(), small.end(), [&](int64_t a, int64_t b) { return works[a] > works[b]; });
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    // Worker threads do not inherit the caller's dispatch state.
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < count; i = next++) task(small[i]);
    }
  });
}

at::Tensor kron_matmul(const at::Tensor& A, const at::Tensor& B, const at::Tensor& X) {
  check_kron_matmul(A, B, X);
  if (!has_kernel(X)) return at::matmul(at::matmul(A, X), B.t());
  const at::Tensor out = empty_like(X, A.size(0), B.size(0));
  kron_product(out, A, B, X);
  return out;
}

std::vector<at::Tensor> grouped_kron_matmul(at::TensorList A, at::TensorList B, at::TensorList X) {
  check_same_length("grouped_kron_matmul", "A", A.size(), "X", X.size());
  check_same_length("grouped_kron_matmul", "B", B.size(), "X", X.size());
  std::vector<int64_t> works(X.size());
  std::vector<at::Tensor> out(X.size());
  for (size_t i = 0; i < X.size(); ++i) {
    check_kron_matmul(A[i], B[i], X[i]);
    works[i] = work(A[i], B[i], X[i]);
    if (has_kernel(X[i])) out[i] = empty_like(X[i], A[i].size(0), B[i].size(0));
  }
  for_each_layer(works, [&](int64_t i) {
    if (out[i].defined()) {
      kron_product(out[i], A[i], B[i], X[i]);
    } else {
      out[i] = kron_matmul(A[i], B[i], X[i]);
    }
  });
  return out;
}

at::Tensor kron_eigen_matmul(const at::Tensor& U, const at::Tensor& S, const at::Tensor& V,
                             const at::Tensor& X) {
  check_kron_eigen_matmul(U, S, V, X);
  if (!has_kernel(X)) {
    const at::Tensor coordinates = at::matmul(at::matmul(U.t(), X), V);
    return at::matmul(at::matmul(U, coordinates * S), V.t());
  }
  const at::Tensor out = empty_like(X, X.size(-2), X.size(-1));
  eigen_product(out, U, S, V, X);
  return out;
}

std::vector<at::Tensor> grouped_kron_eigen_matmul(at::TensorList U, at::TensorList S,
                                                  at::TensorList V, at::TensorList X) {
  check_same_length("grouped_kron_eigen_matmul", "U", U.size(), "X", X.size());
  check_same_length("grouped_kron_eigen_matmul", "S", S.size(), "X", X.size());
  check_same_length("grouped_kron_eigen_matmul", "V", V.size(), "X", X.size());
  std::vector<int64_t> works(X.size());
  std::vector<at::Tensor> out(X.size());
  for (size_t i = 0; i < X.size(); ++i) {
    check_kron_eigen_matmul(U[i], S[i], V[i], X[i]);
    works[i] = 2 * work(U[i], V[i], X[i]);
    if (has_kernel(X[i])) out[i] = empty_like(X[i], X[i].size(-2), X[i].size(-1));
  }
  for_each_layer(works, [&](int64_t i) {
    if (out[i].defined()) {
      eigen_product(out[i], U[i], S[i], V[i], X[i]);
    } else {
      out[i] = kron_eigen_matmul(U[i], S[i], V[i], X[i]);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CPU, m) {
  m.impl("kron_matmul", &kron_matmul);
  m.impl("grouped_kron_matmul", &grouped_kron_matmul);
  m.impl("kron_eigen_matmul", &kron_eigen_matmul);
  m.impl("grouped_kron_eigen_matmul", &grouped_kron_eigen_matmul);
}

}  // namespace hesskern::cpu
