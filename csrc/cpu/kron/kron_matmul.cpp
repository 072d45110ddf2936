// A X B^T and U (S . (U^T X V)) V^T, each product in the cheaper order, with
// transposes read in place, intermediate results written in the layout in which
// the next product reads them, and the scaling applied where its operand appears.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "checks.h"
#include "cpu/blas/gemm.h"
#include "cpu/blas/tile_matmul.h"
#include "cpu/scratch.h"

namespace hesskern::cpu {

namespace {

// Layers below this many multiply-adds run side by side, one per thread: a
// threaded product of that size spends its time in synchronization.
constexpr int64_t kSmallWork = 1 << 22;

// A left operand of at most this many rows stays in the cache while the panels of
// the right one are packed and used one after the other: no memory for all of them.
constexpr int64_t kThin = 64;

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
    if (right_first()) {
      return right_size(x.count * x.rows) + x.count * panels_size<T>(x.rows, columns);
    }
    return x.count * panels_size<T>(x.rows, x.columns) + right_size(x.count * rows) +
           x.count * rows * spread_stride<T>(x.columns);
  }

  // out [count, rows, columns], rows out_stride apart
  void run(T* out, int64_t out_stride, T* scratch) const {
    if (right_first()) {
      T* bt_panels = scratch;
      // The batch's rows, one below the other, in one product.
      const int64_t all = x.count * x.rows;
      T* products = scratch + right_size(all);
      const int64_t width = microkernels<T>().width;
      multiply_right(Target<T>::panels(products, all, 0), x.matrix, all, bt_panels, nullptr);
      const RightOperand<T> right{products, x.rows, columns, all * width, x.rows * width, x.count};
      product(Target<T>::rows(out, out_stride, rows * out_stride), a, right, rows, scale,
              [](int64_t, int64_t) {});
      return;
    }
    T* x_panels = scratch;
    T* bt_panels = x_panels + x.count * panels_size<T>(x.rows, x.columns);
    T* products = bt_panels + right_size(x.count * rows);
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
  // Elements of the panels of B^T for a left operand of so many rows.
  int64_t right_size(int64_t left_rows) const {
    return left_rows <= kThin ? 0 : panels_size<T>(x.columns, columns);
  }

  // c := left B^T, left [left_rows, X.columns]
  void multiply_right(const Target<T>& c, const Matrix<T>& left, int64_t left_rows, T* panels,
                      const Scale<T>* factors) const {
    if (left_rows <= kThin) return multiply_thin(c, left, left_rows, factors);
    const RightOperand<T> right{panels, x.columns, columns, x.columns * microkernels<T>().width,
                                0,      1};
    product(c, left, right, left_rows, factors, [&](int64_t first, int64_t last) {
      pack_right(panels, bt, x.columns, columns, first, last);
    });
  }

  // The same panel by panel, each packed where the last one was.
  void multiply_thin(const Target<T>& c, const Matrix<T>& left, int64_t left_rows,
                     const Scale<T>* factors) const {
    const int64_t size = x.columns * microkernels<T>().width;
    const int64_t count = panels_size<T>(x.columns, columns) / std::max<int64_t>(size, 1);
    const int64_t parts = std::min(product_threads(left_rows * x.columns * columns), count);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> buffer(size);
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t p = count * part / parts; p < count * (part + 1) / parts; ++p) {
          const int64_t column = p * microkernels<T>().width;
          const Matrix<T> rest{bt.at(0, column), bt.row, bt.column};
          pack_right(buffer.data(), rest, x.columns, columns - column, 0, 1);
          // All panels stand where this one does.
          const RightOperand<T> right{buffer.data(), x.columns, columns, 0, 0, 1};
          multiply(c, left, right, 0, left_rows, p, p + 1, factors);
        }
      }
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

// The distance between the rows of X [m, d] or [k, m, d]. Where each matrix has one
// row, its own stride says nothing: contiguous() keeps any.
int64_t row_stride(const at::Tensor& X) {
  return X.dim() == 3 && X.size(1) == 1 ? X.stride(0) : X.stride(-2);
}

// Rows of all matrices must be one below the other.
at::Tensor foldable(const at::Tensor& X) {
  const bool in_rows = X.dim() == 2 || X.size(0) == 1 || X.stride(0) == X.size(1) * row_stride(X);
  return in_rows ? X : X.contiguous();
}

template <typename T>
Batch<T> batch(const at::Tensor& X) {
  return {{X.const_data_ptr<T>(), row_stride(X), X.stride(-1)},
          X.dim() == 3 ? X.size(0) : 1,
          X.dim() == 3 ? X.stride(0) : 0,
          X.size(-2),
          X.size(-1)};
}

at::Tensor empty_for(const at::Tensor& X, int64_t rows, int64_t columns) {
  return X.dim() == 3 ? at::empty({X.size(0), rows, columns}, X.options())
                      : at::empty({rows, columns}, X.options());
}

// One layer's product, its operands resolved: how much scratch memory it takes,
// and the call that does it.
template <typename T>
struct KronLayer {
  Sandwich<T> sandwich;
  T* out;

  // out [(k,) m', d'] := A [m', m] X [(k,) m, d] B^T [d, d']
  KronLayer(const at::Tensor& result, const at::Tensor& A, const at::Tensor& B, const at::Tensor& X)
      : sandwich{matrix<T>(A), transposed<T>(B), batch<T>(X), A.size(0), B.size(0), nullptr},
        out(result.mutable_data_ptr<T>()) {}

  int64_t scratch_size() const { return sandwich.scratch_size(); }
  void run(T* scratch) const { sandwich.run(out, sandwich.columns, scratch); }
};

template <typename T>
struct EigenLayer {
  Scale<T> scale;
  Matrix<T> u, vt;
  Batch<T> x;
  int64_t r, q, stride;
  T* out;

  // out [(k,) m, d] := U [m, r] (S [r, q] . (U^T X [(k,) m, d] V [d, q])) V^T
  EigenLayer(const at::Tensor& result, const at::Tensor& U, const at::Tensor& S,
             const at::Tensor& V, const at::Tensor& X)
      : scale{matrix<T>(S), S.size(0)},
        u(matrix<T>(U)),
        vt(transposed<T>(V)),
        x(batch<T>(X)),
        r(S.size(0)),
        q(S.size(1)),
        stride(spread_stride<T>(q)),
        out(result.mutable_data_ptr<T>()) {}

  Sandwich<T> into() const {
    return {{u.data, u.column, u.row}, {vt.data, vt.column, vt.row}, x, r, q, &scale};
  }
  Sandwich<T> back(const T* coordinates) const {
    return {u,      vt,        {{coordinates, stride, 1}, x.count, r * stride, r, q},
            x.rows, x.columns, nullptr};
  }
  int64_t coordinates_size() const { return x.count * r * stride; }
  int64_t scratch_size() const {
    return coordinates_size() + std::max(into().scratch_size(), back(nullptr).scratch_size());
  }
  void run(T* scratch) const {
    T* rest = scratch + coordinates_size();
    into().run(scratch, stride, rest);
    back(scratch).run(out, x.columns, rest);
  }
};

// bfloat16 and float16 are multiplied in float32: what stands between the products
// would be rounded, and float16 could overflow, where the result does not.
bool has_kernel(const at::Tensor& X) {
  return X.scalar_type() == at::kFloat || X.scalar_type() == at::kDouble;
}
at::Tensor widened(const at::Tensor& t) {
  return t.to(at::kFloat);
}

// Whether all products of left [r, m] X [(k,) m, d] right [d, q] are for the tile unit.
bool on_tiles(const at::Tensor& left, const at::Tensor& X, const at::Tensor& right) {
  const int64_t m = X.size(-2), d = X.size(-1), r = left.size(0), q = right.size(1);
  return tiles_take(X.scalar_type(), r, m, std::min(d, q)) && tiles_take(X.scalar_type(), m, d, q);
}

// left X right, [(k,) r, q], by products of two matrices, in the cheaper order
at::Tensor product_of_three(const at::Tensor& left, const at::Tensor& X, const at::Tensor& right) {
  const int64_t m = X.size(-2), d = X.size(-1), r = left.size(0), q = right.size(1);
  const at::Tensor matrices = X.dim() == 3 ? X : X.unsqueeze(0);
  const auto times_right = [&](const at::Tensor& t) {
    return tile_matmul(t.reshape({-1, d}), right).view({t.size(0), t.size(1), q});
  };
  const auto left_times = [&](const at::Tensor& t) {
    if (t.size(0) == 1) return tile_matmul(left, t[0]).unsqueeze(0);
    const at::Tensor out = at::empty({t.size(0), r, t.size(2)}, t.options());
    for (int64_t k = 0; k < t.size(0); ++k) out[k].copy_(tile_matmul(left, t[k]));
    return out;
  };
  const at::Tensor out = m * d * q + r * m * q <= r * m * d + r * d * q
                             ? left_times(times_right(matrices))
                             : times_right(left_times(matrices));
  return X.dim() == 3 ? out : out.squeeze(0);
}

at::Tensor eigen_on_tiles(const at::Tensor& U, const at::Tensor& S, const at::Tensor& V,
                          const at::Tensor& X) {
  return product_of_three(U, product_of_three(U.t(), X, V).mul_(S), V.t());
}

int64_t work(const at::Tensor& left, const at::Tensor& right, const at::Tensor& X) {
  return X.numel() * (left.numel() / std::max<int64_t>(X.size(-2), 1) +
                      right.numel() / std::max<int64_t>(X.size(-1), 1));
}

template <template <class> class Layer, class... Operands>
void run_layer(const at::Tensor& out, const Operands&... operands) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "kron_matmul", [&] {
    const Layer<scalar_t> layer(out, operands...);
    const Scratch<scalar_t> scratch(layer.scratch_size());
    layer.run(scratch.data());
  });
}

// Layers in groups: large ones in turn with threads of their own; small ones side
// by side, the largest first, each thread with one scratch memory for all.
class LayerGroup {
 public:
  template <template <class> class Layer, class... Operands>
  void add(int64_t work, const at::Tensor& out, const Operands&... operands) {
    AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "kron_matmul", [&] {
      const Layer<scalar_t> layer(out, operands...);
      const int64_t bytes = layer.scratch_size() * static_cast<int64_t>(sizeof(scalar_t));
      items_.push_back({work, bytes, [layer](char* scratch) {
                          layer.run(reinterpret_cast<scalar_t*>(scratch));
                        }});
    });
  }

  void run() {
    std::sort(items_.begin(), items_.end(),
              [](const Item& a, const Item& b) { return a.work > b.work; });
    const auto small = std::find_if(items_.begin(), items_.end(),
                                    [](const Item& item) { return item.work < kSmallWork; });
    int64_t bytes = 0, work = 0;
    for (auto item = items_.begin(); item != small; ++item) {
      const Scratch<char> scratch(item->bytes);
      item->run(scratch.data());
    }
    for (auto item = small; item != items_.end(); ++item) {
      bytes = std::max(bytes, item->bytes);
      work += item->work;
    }
    const int64_t count = items_.end() - small;
    const int64_t threads = std::min(product_threads(work), count);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const Scratch<char> scratch(bytes);
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t i = next++; i < count; i = next++) small[i].run(scratch.data());
      }
    });
  }

 private:
  struct Item {
    int64_t work, bytes;
    std::function<void(char*)> run;
  };
  std::vector<Item> items_;
};

at::Tensor kron_matmul(const at::Tensor& A, const at::Tensor& B, const at::Tensor& X) {
  check_kron_matmul(A, B, X);
  if (!has_kernel(X)) {
    return kron_matmul(widened(A), widened(B), widened(X)).to(X.scalar_type());
  }
  if (on_tiles(A, X, B.t())) return product_of_three(A, X, B.t());
  const at::Tensor out = empty_for(X, A.size(0), B.size(0));
  if (X.numel() == 0) return out.zero_();
  if (out.numel() > 0) run_layer<KronLayer>(out, A, B, foldable(X));
  return out;
}

at::Tensor kron_eigen_matmul(const at::Tensor& U, const at::Tensor& S, const at::Tensor& V,
                             const at::Tensor& X) {
  check_kron_eigen_matmul(U, S, V, X);
  if (!has_kernel(X)) {
    return kron_eigen_matmul(widened(U), widened(S), widened(V), widened(X)).to(X.scalar_type());
  }
  if (X.numel() == 0 || S.numel() == 0) return at::zeros(X.sizes(), X.options());
  if (on_tiles(U.t(), X, V) && on_tiles(U, X, V.t())) return eigen_on_tiles(U, S, V, X);
  const at::Tensor out = empty_for(X, X.size(-2), X.size(-1));
  run_layer<EigenLayer>(out, U, S, V, foldable(X));
  return out;
}

std::vector<at::Tensor> grouped_kron_matmul(at::TensorList A, at::TensorList B, at::TensorList X) {
  check_same_length("grouped_kron_matmul", "A", A.size(), "X", X.size());
  check_same_length("grouped_kron_matmul", "B", B.size(), "X", X.size());
  std::vector<at::Tensor> out(X.size()), operands(X.size());
  LayerGroup group;
  for (size_t i = 0; i < X.size(); ++i) {
    check_kron_matmul(A[i], B[i], X[i], {"grouped_kron_matmul", static_cast<int64_t>(i)});
    if (!has_kernel(X[i]) || X[i].numel() == 0 || A[i].numel() == 0 || B[i].numel() == 0 ||
        on_tiles(A[i], X[i], B[i].t())) {
      out[i] = kron_matmul(A[i], B[i], X[i]);
      continue;
    }
    out[i] = empty_for(X[i], A[i].size(0), B[i].size(0));
    operands[i] = foldable(X[i]);
    group.add<KronLayer>(work(A[i], B[i], X[i]), out[i], A[i], B[i], operands[i]);
  }
  group.run();
  return out;
}

std::vector<at::Tensor> grouped_kron_eigen_matmul(at::TensorList U, at::TensorList S,
                                                  at::TensorList V, at::TensorList X) {
  check_same_length("grouped_kron_eigen_matmul", "U", U.size(), "X", X.size());
  check_same_length("grouped_kron_eigen_matmul", "S", S.size(), "X", X.size());
  check_same_length("grouped_kron_eigen_matmul", "V", V.size(), "X", X.size());
  std::vector<at::Tensor> out(X.size()), operands(X.size());
  LayerGroup group;
  for (size_t i = 0; i < X.size(); ++i) {
    check_kron_eigen_matmul(U[i], S[i], V[i], X[i],
                            {"grouped_kron_eigen_matmul", static_cast<int64_t>(i)});
    if (!has_kernel(X[i]) || X[i].numel() == 0 || S[i].numel() == 0 ||
        (on_tiles(U[i].t(), X[i], V[i]) && on_tiles(U[i], X[i], V[i].t()))) {
      out[i] = kron_eigen_matmul(U[i], S[i], V[i], X[i]);
      continue;
    }
    out[i] = empty_for(X[i], X[i].size(-2), X[i].size(-1));
    operands[i] = foldable(X[i]);
    group.add<EigenLayer>(2 * work(U[i], V[i], X[i]), out[i], U[i], S[i], V[i], operands[i]);
  }
  group.run();
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
