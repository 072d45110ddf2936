// The contract: the schema of every operator in one list, and the Python module
// that reports how this library was built. Implementations register themselves
// in csrc/cpu and csrc/cuda, one file per operator.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "build_config.h"
#include "cpu/amx/amx.h"
#include "cpu/simd.h"

TORCH_LIBRARY(hesskern, m) {
  // acc [d, d] (or [d + 1, d + 1] with ones) += alpha x^T x, upper triangle; x [N, d]; with base,
  // of acc's shape, and beta, acc := beta base + the same
  m.def(
      "input_covariance_(Tensor(a!) acc, Tensor x, float alpha=1.0, bool ones=False, "
      "Tensor? base=None, float beta=1.0) -> ()");
  // acc [C k k, C k k] or [g, C k k / g, C k k / g] += alpha sum_n X_n X_n^T; x [N, C, H, W], [N,
  // C, L]
  m.def(
      "conv_input_covariance_(Tensor(a!) acc, Tensor x, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups=1, float alpha=1.0) -> ()");
  // acc [m, m] += alpha sum of root rows, upper triangle; jacobian [N, c, m(, t)], probabilities
  // [N, c]; base and beta as above
  m.def(
      "output_hessian_(Tensor(a!) acc, Tensor jacobian, Tensor? probabilities=None, "
      "float alpha=1.0, Tensor? base=None, float beta=1.0) -> ()");
  // acc [m, d] += alpha sum_n sum_r (U^T (sum_t g_nrt x_nt^T) V)^2 by element; g [N, r, m(, t)],
  // x [N, d(, t)]; ones: x with one more column, of ones
  m.def(
      "eigen_correction_(Tensor(a!) acc, Tensor g, Tensor x, Tensor U, Tensor V, float alpha=1.0, "
      "bool ones=False) -> ()");
  // the same with the patches of x [N, C, H, W] or [N, C, L] and g [N, r, m, Ho, Wo] or [N, r, m,
  // Lo]
  m.def(
      "conv_eigen_correction_(Tensor(a!) acc, Tensor g, Tensor x, Tensor U, Tensor V, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups=1, "
      "float alpha=1.0, bool ones=False) -> ()");
  // lower triangle of acc [d, d] or [g, d, d] := upper triangle
  m.def("mirror_(Tensor(a!) acc) -> ()");
  // A [m', m] X [(k,) m, d] B^T [d, d']
  m.def("kron_matmul(Tensor A, Tensor B, Tensor X) -> Tensor");
  m.def("grouped_kron_matmul(Tensor[] A, Tensor[] B, Tensor[] X) -> Tensor[]");
  // U [m, r] (S [r, q] . (U^T X [(k,) m, d] V [d, q])) V^T
  m.def("kron_eigen_matmul(Tensor U, Tensor S, Tensor V, Tensor X) -> Tensor");
  m.def("grouped_kron_eigen_matmul(Tensor[] U, Tensor[] S, Tensor[] V, Tensor[] X) -> Tensor[]");
  // alpha sum_n sum_c <V, R_nc> R_nc with R_nc = sum_t s_nct x_nt^T; V [(k,) m, d]; packed: of x
  m.def(
      "layer_hessian_matmul(Tensor x, Tensor s, Tensor V, float alpha=1.0, Tensor? packed=None) "
      "-> Tensor");
  // x as the product above multiplies it on some GPUs, for V with k m = columns; elsewhere [0]
  m.def("pack_layer_inputs(Tensor x, int columns) -> Tensor");
  // alpha / sqrt(terms [N]) (softmax(logits) - e_k), k drawn with uniform [N t]; zero where targets
  // [N(, t)] are ignore_index; logits [N, c(, t)]
  m.def(
      "sampled_cross_entropy_gradient(Tensor logits, Tensor uniform, Tensor? targets=None, "
      "int ignore_index=-100, Tensor? terms=None, float alpha=1.0) -> Tensor");
}

// What the package itself, tests and benchmarks need beside the contract.
TORCH_LIBRARY(hesskern_internal, m) {
  // hesskern::conv_input_covariance_ by one named way, "patches", "bands", "lags", "spectral"
  // or, for 1 x 1 kernels and few channels, "pointwise", instead of the one the cost model picks
  m.def(
      "conv_input_covariance_by_(Tensor(a!) acc, Tensor x, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, float alpha, str path) -> ()");
  // hesskern::layer_hessian_matmul by one named way, "panels", "outer", or "rows" and "frequent"
  // where x is [N, d] with rows whole in memory
  m.def("layer_hessian_matmul_by(Tensor x, Tensor s, Tensor V, float alpha, str path) -> Tensor");
  // out [N, H, W, r, C] := gradient rows grad [N, Ho, Wo, r, m] of a convolution with weight
  // [m, C / g, kh, kw], with respect to its input and times factor [N, H, W, C]
  m.def(
      "conv_input_gradient_(Tensor(a!) out, Tensor grad, Tensor weight, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, Tensor? factor=None) -> ()");
  // the same of max pooling: grad [N, Ho, Wo, r, C], indices [N, Ho, Wo, C] into [H, W]; only where
  // relu [N, H, W, C], the result of a ReLU before it, is positive; out of any strides
  m.def(
      "max_pool_input_gradient_(Tensor(a!) out, Tensor grad, Tensor indices, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, Tensor? factor=None, Tensor? relu=None) "
      "-> ()");
  // a [rows, inner] b [inner, columns] on a processor's tile unit where that pays, else torch's mm
  m.def("matmul(Tensor a, Tensor b) -> Tensor");
  // each acc [d, d] or [g, d, d] += other, of its shape, on the upper triangle; all contiguous
  m.def("add_triangles_(Tensor(a!)[] acc, Tensor[] other) -> ()");
}

namespace {

constexpr const char* kAccumulating[] = {"input_covariance_",      "conv_input_covariance_",
                                         "output_hessian_",        "eigen_correction_",
                                         "conv_eigen_correction_", "mirror_"};
constexpr const char* kProducing[] = {"kron_matmul",
                                      "grouped_kron_matmul",
                                      "kron_eigen_matmul",
                                      "grouped_kron_eigen_matmul",
                                      "layer_hessian_matmul",
                                      "pack_layer_inputs",
                                      "sampled_cross_entropy_gradient"};

// Autocast of every operator: dtypes stay the caller's. Inside a model that runs under autocast,
// the GEMMs of a float32 operator would otherwise be rounded to bfloat16.
void without_autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  op.callBoxed(stack);
}

void register_without_autocast(torch::Library& library) {
  for (const char* name : kAccumulating) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&without_autocast>());
  }
  for (const char* name : kProducing) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&without_autocast>());
  }
}

// Autograd of the operators that change acc, their first argument. Accumulators are statistics:
// inputs enter as data whether or not they require grad, and an acc that requires grad is refused.
// Left to autograd, acc would join the inputs' graph and keep every batch alive.
void accumulate_without_grad(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                             torch::jit::Stack* stack) {
  const at::Tensor acc = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  TORCH_CHECK_VALUE(
      !acc.requires_grad() || !at::GradMode::is_enabled(),
      op.operator_name().name.substr(sizeof("hesskern::") - 1),
      ": acc must not require grad, got requires_grad=True; pass acc.detach() or call "
      "it under torch.no_grad()");
  acc.unsafeGetTensorImpl()->bump_version();
  at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["sources"] = HESSKERN_SOURCES;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = HESSKERN_CUDA_VERSION;
  info["cuda_architectures"] = HESSKERN_CUDA_ARCHITECTURES;
  info["compiler"] = __VERSION__;
  info["simd"] = hesskern::cpu::amx::available() ? "AMX" : hesskern::simd_name();
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

TORCH_LIBRARY_IMPL(hesskern, Autograd, m) {
  for (const char* name : kAccumulating) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&accumulate_without_grad>());
  }
}

TORCH_LIBRARY_IMPL(hesskern, AutocastCPU, m) {
  register_without_autocast(m);
}
TORCH_LIBRARY_IMPL(hesskern, AutocastCUDA, m) {
  register_without_autocast(m);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "hesskern's compiled operators; importing it registers torch.ops.hesskern";
  m.def("build_info", &build_info,
        "How this library was built: torch and CUDA versions, CUDA architectures, compiler, and "
        "the SIMD level its loops run at on this machine.");
  m.def(
      "num_threads", [] { return at::get_num_threads(); },
      "Threads the operators use: torch.get_num_threads() as seen by this library.");
}
