#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"

namespace hesskern::cpu {

namespace {

// Layers below this many multiply-adds run side by side, one per thread: a
// threaded GEMM of that size spends its time in synchronization.
constexpr int64_t kSmallWork = 1 << 22;

// A [m', m], B [d', d], X [m, d] or [k, m, d] -> A X B^T, in the cheaper order, in X's precision.
at::Tensor product(const at::Tensor& A, const at::Tensor& B, const at::Tensor& X) {
  const int64_t m = A.size(1), m_out = A.size(0), d = B.size(1), d_out = B.size(0);
  const int64_t right_first = m * d * d_out + m_out * m * d_out;
  const int64_t left_first = m_out * m * d + m_out * d * d_out;
  if (right_first <= left_first) return at::matmul(A, at::matmul(X, B.t()));
  return at::matmul(at::matmul(A, X), B.t());
}

int64_t work(const at::Tensor& left, const at::Tensor& right, const at::Tensor& X) {
  return X.numel() * (left.numel() / std::max<int64_t>(X.size(-2), 1) +
                      right.numel() / std::max<int64_t>(X.size(-1), 1));
}

// Runs task(i) for every layer: large ones in turn with a threaded GEMM each,
// small ones spread over the threads.
template <class Task>
void for_each_layer(const std::vector<int64_t>& works, const Task& task) {
  std::vector<int64_t> small;
  for (size_t i = 0; i < works.size(); ++i) {
    if (works[i] < kSmallWork) {
      small.push_back(static_cast<int64_t>(i));
    } else {
      task(static_cast<int64_t>(i));
    }
  }
  // Worker threads do not inherit the caller's dispatch state (inference mode among it).
  const at::ThreadLocalState caller;
  at::parallel_for(0, static_cast<int64_t>(small.size()), 1, [&](int64_t begin, int64_t end) {
    const at::ThreadLocalStateGuard state(caller);
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t i = begin; i < end; ++i) task(small[i]);
  });
}

// float32 for bfloat16 and float16: what stands between the two products would be rounded, and
// float16 could overflow, where the result does not.
at::ScalarType working_type(const at::Tensor& X) {
  return at::isReducedFloatingType(X.scalar_type()) ? at::kFloat : X.scalar_type();
}

// A [m', m], B [d', d], X [m, d] or [k, m, d]
at::Tensor plain_product(const at::Tensor& A, const at::Tensor& B, const at::Tensor& X) {
  const auto type = working_type(X);
  return product(A.to(type), B.to(type), X.to(type)).to(X.scalar_type());
}

at::Tensor kron_matmul(const at::Tensor& A, const at::Tensor& B, const at::Tensor& X) {
  check_kron_matmul(A, B, X);
  return plain_product(A, B, X);
}

std::vector<at::Tensor> grouped_kron_matmul(at::TensorList A, at::TensorList B, at::TensorList X) {
  check_same_length("grouped_kron_matmul", "A", A.size(), "X", X.size());
  check_same_length("grouped_kron_matmul", "B", B.size(), "X", X.size());
  std::vector<int64_t> works;
  for (size_t i = 0; i < X.size(); ++i) {
    check_kron_matmul(A[i], B[i], X[i], "grouped_kron_matmul[" + std::to_string(i) + "]");
    works.push_back(work(A[i], B[i], X[i]));
  }
  std::vector<at::Tensor> out(X.size());
  for_each_layer(works, [&](int64_t i) { out[i] = plain_product(A[i], B[i], X[i]); });
  return out;
}

// U [m, r], S [r, q], V [d, q], X [m, d] or [k, m, d]
at::Tensor eigen_product(const at::Tensor& U, const at::Tensor& S, const at::Tensor& V,
                         const at::Tensor& X) {
  const auto type = working_type(X);
  const at::Tensor left = U.to(type), right = V.to(type);
  at::Tensor rotated = product(left.t(), right.t(), X.to(type));
  rotated.mul_(S);
  return product(left, right, rotated).to(X.scalar_type());
}

at::Tensor kron_eigen_matmul(const at::Tensor& U, const at::Tensor& S, const at::Tensor& V,
                             const at::Tensor& X) {
  check_kron_eigen_matmul(U, S, V, X);
  return eigen_product(U, S, V, X);
}

std::vector<at::Tensor> grouped_kron_eigen_matmul(at::TensorList U, at::TensorList S,
                                                  at::TensorList V, at::TensorList X) {
  check_same_length("grouped_kron_eigen_matmul", "U", U.size(), "X", X.size());
  check_same_length("grouped_kron_eigen_matmul", "S", S.size(), "X", X.size());
  check_same_length("grouped_kron_eigen_matmul", "V", V.size(), "X", X.size());
  std::vector<int64_t> works;
  for (size_t i = 0; i < X.size(); ++i) {
    check_kron_eigen_matmul(U[i], S[i], V[i], X[i],
                            "grouped_kron_eigen_matmul[" + std::to_string(i) + "]");
    works.push_back(2 * work(U[i], V[i], X[i]));
  }
  std::vector<at::Tensor> out(X.size());
  for_each_layer(works, [&](int64_t i) { out[i] = eigen_product(U[i], S[i], V[i], X[i]); });
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
