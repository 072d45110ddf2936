// kron_matmul.cu and layer_hessian_matmul.cu (and products.cu with them) on the CPU.
#include <algorithm>
#include <limits>

#include "check.h"
#include "checks.h"
#include "core/large_products.h"
#include "core/products.h"
#include "kron_matmul.h"
#include "layer_hessian/layer_hessian_matmul.h"
#include "layer_hessian/parts.h"

namespace hesskern::cuda::check {

namespace {

// [rows, columns], in columns where transposed
template <typename T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, bool transposed)
      : rows_(rows), columns_(columns), transposed_(transposed), memory_(rows * columns) {
    for (int64_t i = 0; i < rows * columns; ++i) memory_[i] = static_cast<T>(normal());
  }
  double operator()(int64_t i, int64_t j) const {
    return memory_[transposed_ ? j * rows_ + i : i * columns_ + j];
  }
  typename KronLayer<T>::Matrix view() const {
    return {memory_.data(), rows_, columns_, transposed_ ? 1 : columns_, transposed_ ? rows_ : 1};
  }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  T* data() const { return memory_.data(); }

 private:
  int64_t rows_, columns_;
  bool transposed_;
  Memory<T> memory_;
};

using Values = std::vector<double>;

// left x right, x [m, d]
template <typename T>
Values sandwich(const Matrix<T>& left, const Values& x, const Matrix<T>& right) {
  const int64_t m = left.columns(), d = right.rows(), r = left.rows(), q = right.columns();
  Values half(static_cast<size_t>(m * q)), out(static_cast<size_t>(r * q));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t e = 0; e < d; ++e) {
      for (int64_t j = 0; j < q; ++j) {
        half[static_cast<size_t>(i * q + j)] += x[static_cast<size_t>(i * d + e)] * right(e, j);
      }
    }
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t e = 0; e < m; ++e) {
      for (int64_t j = 0; j < q; ++j) {
        out[static_cast<size_t>(i * q + j)] += left(i, e) * half[static_cast<size_t>(e * q + j)];
      }
    }
  }
  return out;
}

struct Sizes {
  int64_t vectors, m, d, r, q;
};

// Layers of these sizes in one call; eigen: with scaling and the way back.
template <typename T>
void kron(const char* type, const std::vector<Sizes>& sizes, bool eigen, bool tf32, int processors,
          const LargeFrom& from = {}) {
  multiprocessor_count_is(processors);
  std::vector<std::unique_ptr<Matrix<T>>> matrices;
  std::vector<std::unique_ptr<Memory<T>>> outs;
  std::vector<KronLayer<T>> layers;
  std::vector<Values> expected;
  const auto matrix = [&](int64_t rows, int64_t columns) -> const Matrix<T>& {
    matrices.push_back(std::make_unique<Matrix<T>>(rows, columns, matrices.size() % 2 == 1));
    return *matrices.back();
  };
  for (const Sizes& s : sizes) {
    KronLayer<T> layer{};
    const Matrix<T>&left = matrix(s.r, s.m), &right = matrix(s.d, s.q);
    const Matrix<T>&up = matrix(s.m, s.r), &down = matrix(s.q, s.d), &scale = matrix(s.r, s.q);
    matrices.push_back(std::make_unique<Matrix<T>>(s.vectors * s.m, s.d, false));
    const Matrix<T>& x = *matrices.back();
    const int64_t size = eigen ? s.m * s.d : s.r * s.q;
    outs.push_back(std::make_unique<Memory<T>>(s.vectors * size));
    layer.left = left.view();
    layer.right = right.view();
    if (eigen) {
      layer.scale = scale.view();
      layer.back_left = up.view();
      layer.back_right = down.view();
    }
    layer.x = x.data();
    layer.out = outs.back()->data();
    layer.vectors = s.vectors;
    layers.push_back(layer);
    Values all;
    for (int64_t vector = 0; vector < s.vectors; ++vector) {
      Values one;
      for (int64_t i = 0; i < s.m; ++i) {
        for (int64_t j = 0; j < s.d; ++j) one.push_back(x(vector * s.m + i, j));
      }
      one = sandwich(left, one, right);
      if (eigen) {
        for (int64_t i = 0; i < s.r; ++i) {
          for (int64_t j = 0; j < s.q; ++j) one[static_cast<size_t>(i * s.q + j)] *= scale(i, j);
        }
        one = sandwich(up, one, down);
      }
      all.insert(all.end(), one.begin(), one.end());
    }
    expected.push_back(all);
  }
  const Work<T> work = plan_kron_matmul(layers, tf32, from);
  const Memory<T> memory(work.workspace);
  const std::string name = std::string(eigen ? "kron_eigen_matmul " : "kron_matmul ") + type +
                           " of " + std::to_string(layers.size()) + " layers, first " +
                           std::to_string(sizes[0].vectors) + " x [" + std::to_string(sizes[0].m) +
                           ", " + std::to_string(sizes[0].d) + "]" + (tf32 ? " tf32" : "");
  if (work.run(memory.data(), nullptr) != cudaSuccess) {
    return report(name + ": not launched", 1, 0);
  }
  double worst = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    worst = std::max(worst, relative_error(
                                outs[i]->size(), [&](int64_t e) { return (*outs[i])[e]; },
                                [&](int64_t e) { return expected[i][static_cast<size_t>(e)]; }));
  }
  report(name, worst, tf32 ? 3 * limit_of<T>(true) : 2 * limit_of<T>());
}

struct HessianSizes {
  int64_t n, c, m, d, t, vectors;
};

// positions_last: x [n, d, t], s [n, c, m, t] contiguous; else x [n, t, d], s [n, c, t, m].
// part_rows: by parts, so many rows a chunk, with inputs of several decades.
template <typename T>
void hessian(const char* type, const HessianSizes& z, bool positions_last, bool tf32,
             int processors, int64_t chunk_elements = 1 << 22, int64_t part_rows = 0) {
  multiprocessor_count_is(processors);
  const Memory<T> x(z.n * z.d * z.t), s(z.n * z.c * z.m * z.t), v(z.vectors * z.m * z.d);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(normal());
  for (int64_t i = 0; i < s.size(); ++i) s[i] = static_cast<T>(normal());
  for (int64_t i = 0; i < v.size(); ++i) v[i] = static_cast<T>(normal());
  const auto input_of_x = [&](int64_t i) { return positions_last ? i / z.t % z.d : i % z.d; };
  const auto decades = [](int64_t input) { return std::pow(10.0, 4.0 * (input % 5 - 2)); };
  if (part_rows > 0) {
    for (int64_t i = 0; i < x.size(); ++i) x[i] *= static_cast<T>(decades(input_of_x(i)));
    for (int64_t i = 0; i < v.size(); ++i) v[i] /= static_cast<T>(decades(i % z.d));
  }
  const Memory<T> out(v.size());
  LayerHessianProduct<T> call{};
  call.x = x.data();
  call.s = s.data();
  call.vectors = v.data();
  call.out = out.data();
  call.samples = z.n;
  call.classes = z.c;
  call.outputs = z.m;
  call.inputs = z.d;
  call.positions = z.t;
  call.vector_count = z.vectors;
  call.x_sample = z.d * z.t;
  call.x_input = positions_last ? z.t : 1;
  call.x_position = positions_last ? 1 : z.d;
  call.s_sample = z.c * z.m * z.t;
  call.s_class = z.m * z.t;
  call.s_output = positions_last ? z.t : 1;
  call.s_position = positions_last ? 1 : z.m;
  call.alpha = T(0.3);
  call.tf32 = tf32;
  call.chunk_elements = chunk_elements;
  Values expected(static_cast<size_t>(v.size())), row(static_cast<size_t>(z.m * z.d));
  for (int64_t n = 0; n < z.n; ++n) {
    for (int64_t c = 0; c < z.c; ++c) {
      for (int64_t i = 0; i < z.m; ++i) {
        for (int64_t j = 0; j < z.d; ++j) {
          double total = 0;
          for (int64_t t = 0; t < z.t; ++t) {
            total += static_cast<double>(s[n * call.s_sample + c * call.s_class +
                                           i * call.s_output + t * call.s_position]) *
                     x[n * call.x_sample + j * call.x_input + t * call.x_position];
          }
          row[static_cast<size_t>(i * z.d + j)] = total;
        }
      }
      for (int64_t vector = 0; vector < z.vectors; ++vector) {
        const int64_t first = vector * z.m * z.d;
        double a = 0;
        for (int64_t e = 0; e < z.m * z.d; ++e) a += v[first + e] * row[static_cast<size_t>(e)];
        for (int64_t e = 0; e < z.m * z.d; ++e) {
          expected[static_cast<size_t>(first + e)] +=
              static_cast<double>(call.alpha) * a * row[static_cast<size_t>(e)];
        }
      }
    }
  }
  const auto plan = [&]() {
    if constexpr (sizeof(T) == 4) {
      if (part_rows > 0) {
        LayerHessianParts parts = layer_hessian_parts(call);
        parts.inputs.most_rows = part_rows;
        if (call.packed_inputs != nullptr) parts.replace_packed = nullptr;
        return parts.plan();
      }
    }
    return call.plan();
  };
  const Work<T> work = plan();
  const Memory<T> workspace(work.workspace);
  const std::string name = std::string("layer_hessian_matmul ") + type + " n " +
                           std::to_string(z.n) + " c " + std::to_string(z.c) + " m " +
                           std::to_string(z.m) + " d " + std::to_string(z.d) + " t " +
                           std::to_string(z.t) + " k " + std::to_string(z.vectors) +
                           (positions_last ? " positions last" : "") + (tf32 ? " tf32" : "") +
                           (part_rows > 0 ? " parts" : "");
  if (work.run(workspace.data(), nullptr) != cudaSuccess) {
    return report(name + ": not launched", 1, 0);
  }
  // By parts of every input's column, which may be much larger than others.
  const int64_t columns = part_rows > 0 ? z.d : 1;
  double worst = 0;
  for (int64_t j = 0; j < columns; ++j) {
    worst = std::max(
        worst, relative_error(
                   out.size() / columns, [&](int64_t e) { return out[e * columns + j]; },
                   [&](int64_t e) { return expected[static_cast<size_t>(e * columns + j)]; }));
  }
  report(name, worst, tf32 ? 3 * limit_of<T>(true) : 2 * limit_of<T>());
  if constexpr (sizeof(T) == 4) {
    if (part_rows == 0) return;
    // The same to the last bit from inputs packed before, of which no more is read than the parts,
    // x itself is spoilt, and with Y packed by itself.
    LayerInputs inputs = layer_hessian_parts(call).inputs;
    inputs.most_rows = part_rows;
    const int64_t step = inputs.chunk_samples();
    const bool pieces = inputs.chunk_size(step) % 4 == 0 && inputs.chunk_size(z.n % step) % 4 == 0;
    const Memory<T> packed(inputs.size());
    if (inputs.pack(packed.data(), nullptr) != cudaSuccess) {
      return report(name + " packed: not launched", 1, 0);
    }
    std::fill(x.data(), x.data() + x.size(), std::numeric_limits<T>::quiet_NaN());
    call.packed_inputs = packed.data();
    const Work<T> later = plan();
    const Memory<T> room(later.workspace), before(out.size());
    std::copy(out.data(), out.data() + out.size(), before.data());
    std::fill(out.data(), out.data() + out.size(), std::numeric_limits<T>::quiet_NaN());
    if (later.run(room.data(), nullptr) != cudaSuccess) {
      return report(name + " packed: not launched", 1, 0);
    }
    int64_t different = 0;
    for (int64_t e = 0; e < out.size(); ++e) different += !(out[e] == before[e]);
    report(name + " packed", static_cast<double>(different), 0);
    report(name + " packed: in whole pieces, in less room",
           pieces && later.workspace + inputs.chunk_size(step) == work.workspace ? 0 : 1, 0);
  }
}

// c [m, n] := a b with a [m, k] and b [k, n] along k or along their other axis.
void product(int64_t m, int64_t n, int64_t k, bool a_along_k, bool b_along_k, bool tf32,
             int processors) {
  multiprocessor_count_is(processors);
  const Matrix<float> a(m, k, !a_along_k), b(k, n, b_along_k);
  const Memory<float> c(m * n);
  Product<float> one{};
  one.a = a.data();
  one.a_row = {a.view().row_stride};
  one.a_k = {a.view().column_stride};
  one.b = b.data();
  one.b_k = {b.view().row_stride};
  one.b_column = {b.view().column_stride};
  one.c = c.data();
  one.c_row = {n};
  one.c_column = {1};
  one.m = m;
  one.n = n;
  one.k_end = k;
  const std::string name = "multiply_all [" + std::to_string(m) + ", " + std::to_string(k) + "] " +
                           (a_along_k ? "along" : "across") + " [" + std::to_string(k) + ", " +
                           std::to_string(n) + "] " + (b_along_k ? "along" : "across") +
                           (tf32 ? " tf32" : "");
  const auto compare = [&](const std::string& way, cudaError_t error) {
    if (error != cudaSuccess) return report(name + way + ": not launched", 1, 0);
    report(name + way,
           relative_error(
               m * n, [&](int64_t e) { return c[e]; },
               [&](int64_t e) {
                 double total = 0;
                 for (int64_t j = 0; j < k; ++j) total += a(e / n, j) * b(j, e % n);
                 return total;
               }),
           limit_of<float>(tf32));
  };
  compare("", multiply_all<float>({one}, tf32, nullptr));
  if (tf32) return;
  std::fill(c.data(), c.data() + c.size(), 0.0f);
  const PlannedProducts large({one}, false, {1, 1e-6});
  const Memory<float> workspace(large.workspace());
  compare(" by parts", large.run({one}, workspace.data(), nullptr));
}

}  // namespace

void check_products(bool few) {
  for (int64_t order = 0; order < 4; ++order) {
    const bool a = order / 2 == 1, b = order % 2 == 1;
    product(20, 36, 44, a, b, false, 2);
    if (few) continue;
    product(20, 36, 44, a, b, true, 2);
    product(128, 124, 20, a, b, false, 1);
    product(120, 128, 36, a, b, true, 1);
  }
}

void check_kron_matmul(bool few) {
  kron<float>("float", {{2, 5, 7, 4, 6}}, true, false, 2);
  if (few) return;
  kron<float>("float", {{1, 1, 1, 1, 1}}, false, false, 2);
  kron<float>("float", {{1, 20, 70, 33, 5}, {3, 4, 9, 8, 2}, {1, 65, 3, 2, 66}}, false, false, 2);
  kron<float>("float", {{1, 20, 70, 20, 70}, {3, 4, 9, 4, 9}}, true, false, 2);
  kron<float>("float", {{2, 3, 40, 60, 4}, {2, 60, 4, 3, 40}}, true, false, 2);
  // More layers than one launch takes, and large tiles.
  kron<float>("float", std::vector<Sizes>(70, {1, 2, 3, 4, 5}), false, false, 2);
  kron<float>("float", {{1, 20, 30, 250, 250}}, false, false, 1);
  kron<float>("float", {{1, 130, 70, 129, 128}}, true, true, 1);
  kron<float>("float", {{2, 9, 20, 9, 20}}, true, true, 2);
  // Sizes that are multiples of 16 bytes, among others: one call, two kernels.
  kron<float>("float", {{1, 36, 72, 68, 40}, {3, 4, 9, 8, 2}, {2, 12, 16, 8, 20}}, true, false, 2);
  kron<float>("float", {{1, 36, 72, 68, 40}, {1, 5, 7, 6, 3}}, false, true, 2);
  kron<float>("float", {{1, 16, 16, 128, 128}}, false, false, 1);
  kron<float>("float", {{1, 16, 16, 128, 128}}, false, true, 1);
  // Some of the products are large, of one layer none.
  kron<float>("float", {{1, 36, 70, 40, 33}, {2, 5, 7, 4, 6}, {3, 9, 20, 10, 12}}, false, false, 2,
              {8, 1e-6});
  kron<float>("float", {{1, 20, 24, 20, 24}, {2, 9, 30, 9, 30}}, true, false, 2, {8, 1e-6});
  kron<double>("double", {{2, 9, 70, 66, 20}, {1, 5, 6, 7, 8}}, true, false, 2);
}

void check_layer_hessian_matmul(bool few) {
  hessian<float>("float", {9, 3, 5, 7, 1, 2}, false, false, 2);
  if (few) return;
  hessian<float>("float", {1, 1, 1, 1, 1, 1}, false, false, 2);
  hessian<float>("float", {70, 9, 20, 66, 1, 1}, false, false, 2);
  hessian<float>("float", {600, 2, 3, 4, 1, 1}, false, false, 40);
  hessian<float>("float", {6, 3, 4, 5, 9, 2}, true, false, 2);
  hessian<float>("float", {6, 3, 4, 5, 9, 2}, false, false, 2);
  hessian<float>("float", {5, 11, 3, 70, 4, 1}, true, true, 2);
  hessian<float>("float", {3, 2, 130, 140, 1, 1}, false, false, 1);
  hessian<float>("float", {30, 9, 20, 68, 1, 1}, false, false, 2);
  hessian<float>("float", {9, 3, 8, 12, 4, 2}, true, false, 2);
  // By parts; several chunks, the last one smaller; wide blocks of vectors.
  hessian<float>("float", {70, 3, 20, 44, 1, 1}, false, false, 2, 0, 1000);
  hessian<float>("float", {60, 3, 5, 41, 3, 2}, true, false, 2, 0, 90);
  hessian<float>("float", {70, 2, 90, 130, 1, 3}, false, false, 1, 0, 64);
  // Several chunks, the last one smaller.
  hessian<float>("float", {7, 3, 4, 5, 2, 2}, true, false, 2, 50);
  hessian<float>("float", {5, 2, 6, 3, 1, 1}, false, false, 2, 1);
  hessian<double>("double", {20, 4, 9, 33, 3, 2}, true, false, 2);
}

}  // namespace hesskern::cuda::check
