// The contract: the schema of every operator in one list, and the Python module
// that reports how this library was built. Implementations register themselves
// in csrc/cpu and csrc/cuda, one file per operator.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "build_config.h"
#include "cpu/simd.h"

TORCH_LIBRARY(hesskern, m) {
  // acc [d, d] (or [d + 1, d + 1] with ones) += alpha x^T x, upper triangle; x [N, d]
  m.def("input_covariance_(Tensor(a!) acc, Tensor x, float alpha=1.0, bool ones=False) -> ()");
  // acc [C k k, C k k] or [g, C k k / g, C k k / g] += alpha sum_n X_n X_n^T; x [N, C, H, W], [N, C, L]
  m.def(
      "conv_input_covariance_(Tensor(a!) acc, Tensor x, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups=1, float alpha=1.0) -> ()");
  // acc [m, m] += alpha sum of root rows, upper triangle; jacobian [N, c, m(, t)], probabilities [N, c]
  m.def(
      "output_hessian_(Tensor(a!) acc, Tensor jacobian, Tensor? probabilities=None, "
      "float alpha=1.0) -> ()");
  // lower triangle of acc [d, d] or [g, d, d] := upper triangle
  m.def("mirror_(Tensor(a!) acc) -> ()");
  // A [m', m] X [(k,) m, d] B^T [d, d']
  m.def("kron_matmul(Tensor A, Tensor B, Tensor X) -> Tensor");
  m.def("grouped_kron_matmul(Tensor[] A, Tensor[] B, Tensor[] X) -> Tensor[]");
  // U [m, r] (S [r, q] . (U^T X [(k,) m, d] V [d, q])) V^T
  m.def("kron_eigen_matmul(Tensor U, Tensor S, Tensor V, Tensor X) -> Tensor");
  m.def(
      "grouped_kron_eigen_matmul(Tensor[] U, Tensor[] S, Tensor[] V, Tensor[] X) -> Tensor[]");
  // alpha sum_n sum_c <V, R_nc> R_nc with R_nc = sum_t s_nct x_nt^T; V [(k,) m, d]
  m.def("layer_hessian_matmul(Tensor x, Tensor s, Tensor V, float alpha=1.0) -> Tensor");
}

// What tests and benchmarks need beside the contract.
TORCH_LIBRARY(hesskern_internal, m) {
  // hesskern::conv_input_covariance_ by one named way, "patches", "lags" or "spectral", instead of
  // the one the cost model picks
  m.def(
      "conv_input_covariance_by_(Tensor(a!) acc, Tensor x, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, float alpha, str path) -> ()");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["sources"] = HESSKERN_SOURCES;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = HESSKERN_CUDA_VERSION;
  info["cuda_architectures"] = HESSKERN_CUDA_ARCHITECTURES;
  info["compiler"] = __VERSION__;
  info["simd"] = hesskern::simd_name();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
  info["sanitized"] = true;
#else
  info["sanitized"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "hesskern's compiled operators; importing it registers torch.ops.hesskern";
  m.def("build_info", &build_info,
        "How this library was built: torch and CUDA versions, CUDA architectures, compiler, and "
        "the SIMD level its loops run at on this machine.");
  m.def("num_threads", [] { return at::get_num_threads(); },
        "Threads the operators use: torch.get_num_threads() as seen by this library.");
}
