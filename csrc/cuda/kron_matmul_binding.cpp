#include <torch/library.h>

#include <deque>
#include <utility>
#include <vector>

#include "checks.h"
#include "core/binding.h"
#include "kron_matmul.h"

namespace hesskern::cuda {

namespace {

// A matrix or its transpose. Of many small layers the host sets the pace: no view is made of it,
// and no copy where it has the dtype already.
struct Factor {
  const at::Tensor* tensor = nullptr;
  bool transposed = false;
};

// Layers of one call, by the dtype in which they are multiplied: bfloat16 and float16 in float32,
// since what stands between the products would be rounded, and float16 could overflow.
class LayerGroup {
 public:
  explicit LayerGroup(size_t count) : out_(count), dtypes_(count) {}

  // Layer i: left [r, m], right [d, q], X [m, d] or [k, m, d]; out [(k,) rows, columns].
  // scale [r, q], back_left [m', r] and back_right [q, d'] null: A X B^T alone.
  void add(size_t i, const at::Tensor& X, Factor left, Factor right, Factor scale, Factor back_left,
           Factor back_right, int64_t rows, int64_t columns) {
    const auto dtype = X.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    dtypes_[i] = X.scalar_type();
    std::vector<int64_t> shape = X.sizes().vec();
    shape[shape.size() - 2] = rows;
    shape[shape.size() - 1] = columns;
    const bool empty = X.numel() == 0 || left.tensor->numel() == 0 || right.tensor->numel() == 0 ||
                       rows * columns == 0;
    out_[i] = empty ? at::zeros(shape, X.options()) : at::empty(shape, X.options().dtype(dtype));
    if (empty) return;
    const bool direct = X.scalar_type() == dtype && X.is_contiguous();
    const at::Tensor& x = direct ? X : kept(X.to(dtype).contiguous());
    like_ = X.options();
    AT_DISPATCH_FLOATING_TYPES(dtype, "kron_matmul", [&] {
      KronLayer<scalar_t> layer{};
      layer.left = matrix<scalar_t>(left, dtype);
      layer.right = matrix<scalar_t>(right, dtype);
      if (scale.tensor != nullptr) {
        layer.scale = matrix<scalar_t>(scale, dtype);
        layer.back_left = matrix<scalar_t>(back_left, dtype);
        layer.back_right = matrix<scalar_t>(back_right, dtype);
      }
      layer.x = x.const_data_ptr<scalar_t>();
      layer.out = out_[i].mutable_data_ptr<scalar_t>();
      layer.vectors = X.dim() == 3 ? X.size(0) : 1;
      layers<scalar_t>().push_back(layer);
    });
  }

  std::vector<at::Tensor> run() {
    run_layers<float>(at::kFloat);
    run_layers<double>(at::kDouble);
    for (size_t i = 0; i < out_.size(); ++i) {
      if (out_[i].scalar_type() != dtypes_[i]) out_[i] = out_[i].to(dtypes_[i]);
    }
    return std::move(out_);
  }

 private:
  template <typename T>
  typename KronLayer<T>::Matrix matrix(const Factor& factor, at::ScalarType dtype) {
    const at::Tensor& given = *factor.tensor;
    const at::Tensor& t = given.scalar_type() == dtype ? given : kept(given.to(dtype));
    const int64_t row = factor.transposed ? 1 : 0, column = 1 - row;
    return {t.const_data_ptr<T>(), t.size(row), t.size(column), t.stride(row), t.stride(column)};
  }

  // Copies live until the launch is queued; the allocator orders their memory by the stream.
  const at::Tensor& kept(at::Tensor t) {
    operands_.push_back(std::move(t));
    return operands_.back();
  }

  template <typename T>
  std::vector<KronLayer<T>>& layers() {
    if constexpr (std::is_same_v<T, double>) {
      return doubles_;
    } else {
      return floats_;
    }
  }

  template <typename T>
  void run_layers(at::ScalarType dtype) {
    if (layers<T>().empty()) return;
    run_work(plan_kron_matmul(layers<T>(), tf32_allowed()), like_.dtype(dtype));
  }

  std::vector<at::Tensor> out_;
  std::vector<at::ScalarType> dtypes_;
  at::TensorOptions like_;
  // References into it stay valid as it grows.
  std::deque<at::Tensor> operands_;
  std::vector<KronLayer<float>> floats_;
  std::vector<KronLayer<double>> doubles_;
};

// Layers of one call share its launches, so they lie on one device.
void check_one_device(const OpName& op, const at::Tensor& X, const at::Tensor& first) {
  TORCH_CHECK_VALUE(X.device() == first.device(), op, ": X is on ", X.device(),
                    " but the first layer's is on ", first.device());
}

std::vector<at::Tensor> kron(at::TensorList A, at::TensorList B, at::TensorList X, const char* op,
                             bool indexed) {
  if (X.empty()) return {};
  const c10::cuda::CUDAGuard guard(X[0].device());
  LayerGroup group(X.size());
  for (size_t i = 0; i < X.size(); ++i) {
    const OpName name = indexed ? OpName{op, static_cast<int64_t>(i)} : OpName{op};
    check_kron_matmul(A[i], B[i], X[i], name);
    check_one_device(name, X[i], X[0]);
    group.add(i, X[i], {&A[i]}, {&B[i], true}, {}, {}, {}, A[i].size(0), B[i].size(0));
  }
  return group.run();
}

std::vector<at::Tensor> kron_eigen(at::TensorList U, at::TensorList S, at::TensorList V,
                                   at::TensorList X, const char* op, bool indexed) {
  if (X.empty()) return {};
  const c10::cuda::CUDAGuard guard(X[0].device());
  LayerGroup group(X.size());
  for (size_t i = 0; i < X.size(); ++i) {
    const OpName name = indexed ? OpName{op, static_cast<int64_t>(i)} : OpName{op};
    check_kron_eigen_matmul(U[i], S[i], V[i], X[i], name);
    check_one_device(name, X[i], X[0]);
    group.add(i, X[i], {&U[i], true}, {&V[i]}, {&S[i]}, {&U[i]}, {&V[i], true}, X[i].size(-2),
              X[i].size(-1));
  }
  return group.run();
}

// A [m', m], B [d', d], X [m, d] or [k, m, d]
at::Tensor kron_matmul_one(const at::Tensor& A, const at::Tensor& B, const at::Tensor& X) {
  return kron(A, B, X, "kron_matmul", false)[0];
}

// U [m, r], S [r, q], V [d, q], X [m, d] or [k, m, d]
at::Tensor kron_eigen_matmul_one(const at::Tensor& U, const at::Tensor& S, const at::Tensor& V,
                                 const at::Tensor& X) {
  return kron_eigen(U, S, V, X, "kron_eigen_matmul", false)[0];
}

std::vector<at::Tensor> grouped_kron_matmul(at::TensorList A, at::TensorList B, at::TensorList X) {
  check_same_length("grouped_kron_matmul", "A", A.size(), "X", X.size());
  check_same_length("grouped_kron_matmul", "B", B.size(), "X", X.size());
  return kron(A, B, X, "grouped_kron_matmul", true);
}

std::vector<at::Tensor> grouped_kron_eigen_matmul(at::TensorList U, at::TensorList S,
                                                  at::TensorList V, at::TensorList X) {
  check_same_length("grouped_kron_eigen_matmul", "U", U.size(), "X", X.size());
  check_same_length("grouped_kron_eigen_matmul", "S", S.size(), "X", X.size());
  check_same_length("grouped_kron_eigen_matmul", "V", V.size(), "X", X.size());
  return kron_eigen(U, S, V, X, "grouped_kron_eigen_matmul", true);
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("kron_matmul", &kron_matmul_one);
  m.impl("grouped_kron_matmul", &grouped_kron_matmul);
  m.impl("kron_eigen_matmul", &kron_eigen_matmul_one);
  m.impl("grouped_kron_eigen_matmul", &grouped_kron_eigen_matmul);
}

}  // namespace hesskern::cuda
