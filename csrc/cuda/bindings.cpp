// The CUDA side of the operators: tensors, device and stream on the way into the
// launchers of the .cu files, which know no torch.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <vector>

#include "checks.h"
#include "conv_input_covariance.h"
#include "input_covariance.h"
#include "kron_matmul.h"
#include "layer_hessian_matmul.h"
#include "mirror.h"
#include "output_hessian.h"

namespace hesskern::cuda {

namespace {

// Elements converted to another dtype at a time.
constexpr int64_t kConvert = 1 << 26;

// Whether torch.set_float32_matmul_precision allows less than float32.
bool tf32_allowed() {
  return at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
}

// Runs a launcher with a workspace of its own on the current stream.
template <typename T, class Call>
void launch_with_workspace(const Call& call, const at::Tensor& like) {
  const at::Tensor workspace = at::empty({call.workspace()}, like.options());
  C10_CUDA_CHECK(call.run(workspace.mutable_data_ptr<T>(), c10::cuda::getCurrentCUDAStream()));
}

// visit(pointer of the kernels' own type to t's data); t is T, bfloat16 or float16.
template <typename T, class Visit>
void with_input(const at::Tensor& t, Visit visit) {
  if constexpr (std::is_same_v<T, float>) {
    if (t.scalar_type() == at::kBFloat16) {
      return visit(static_cast<const BFloat16*>(t.const_data_ptr()));
    }
    if (t.scalar_type() == at::kHalf) return visit(static_cast<const Float16*>(t.const_data_ptr()));
  }
  visit(t.const_data_ptr<T>());
}

// Whether the kernels read t as it is: acc's dtype, or a narrower one into float32.
bool read_directly(const at::Tensor& acc, const at::Tensor& t) {
  return acc.scalar_type() == t.scalar_type() || acc.scalar_type() == at::kFloat;
}

// run(part) for parts of t [N, ...] along its first axis that the kernels can read.
template <class Run>
void in_parts(const at::Tensor& acc, const at::Tensor& t, Run run) {
  if (read_directly(acc, t)) return run(t, 0);
  const int64_t n = t.size(0);
  const int64_t step = std::clamp<int64_t>(kConvert / std::max<int64_t>(t.numel() / n, 1), 1, n);
  for (int64_t first = 0; first < n; first += step) {
    run(t.narrow(0, first, std::min(step, n - first)).to(acc.scalar_type()), first);
  }
}

// acc [d, d] or [g, d, d]
template <typename T>
SymmetricSum<T> sum_into(const at::Tensor& acc, double alpha) {
  const bool grouped = acc.dim() == 3;
  return {acc.mutable_data_ptr<T>(),
          grouped ? acc.size(0) : 1,
          acc.size(-1),
          grouped ? acc.stride(0) : 0,
          acc.stride(-2),
          acc.stride(-1),
          static_cast<T>(alpha)};
}

// acc [d, d] or [d + 1, d + 1] += alpha rows^T rows, rows [count, d] by axes into x
void add_rows(const at::Tensor& acc, const at::Tensor& x, Axis rows, Axis columns, int64_t count,
              int64_t d, double alpha, bool ones) {
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "input_covariance_", [&] {
    with_input<scalar_t>(x, [&](auto* data) {
      using In = std::decay_t<decltype(*data)>;
      const InputCovariance<In, scalar_t> call{
          data, rows, columns, count, d, ones, tf32_allowed(), sum_into<scalar_t>(acc, alpha)};
      launch_with_workspace<scalar_t>(call, acc);
    });
  });
}

// acc [d, d] or [d + 1, d + 1], x [N, d]
void input_covariance_(at::Tensor& acc, const at::Tensor& x, double alpha, bool ones) {
  check_input_covariance(acc, x, ones);
  if (x.size(0) == 0 || acc.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  in_parts(acc, x, [&](const at::Tensor& part, int64_t) {
    add_rows(acc, part, {part.stride(0)}, {part.stride(1)}, part.size(0), part.size(1), alpha,
             ones);
  });
}

// acc [C k k, C k k] or [g, C k k / g, C k k / g], x [N, C, H, W] or [N, C, L]
void conv_input_covariance_(at::Tensor& acc, const at::Tensor& x, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double alpha) {
  const ConvGeometry g =
      check_conv_input_covariance(acc, x, kernel_size, stride, padding, dilation, groups);
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  in_parts(acc, x.dim() == 3 ? x.unsqueeze(2) : x, [&](const at::Tensor& part, int64_t) {
    AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "conv_input_covariance_", [&] {
      with_input<scalar_t>(part, [&](auto* data) {
        using In = std::decay_t<decltype(*data)>;
        ConvInputCovariance<In, scalar_t> call{};
        call.x = data;
        call.samples = part.size(0);
        call.group_channels = part.size(1) / groups;
        call.height = part.size(2);
        call.width = part.size(3);
        call.sample_stride = part.stride(0);
        call.channel_stride = part.stride(1);
        call.row_stride = part.stride(2);
        call.column_stride = part.stride(3);
        call.kernel_h = g.kernel_h;
        call.kernel_w = g.kernel_w;
        call.stride_h = g.stride_h;
        call.stride_w = g.stride_w;
        call.padding_h = g.padding_h;
        call.padding_w = g.padding_w;
        call.dilation_h = g.dilation_h;
        call.dilation_w = g.dilation_w;
        call.out_h = g.out_h;
        call.out_w = g.out_w;
        call.tf32 = tf32_allowed();
        call.sum = sum_into<scalar_t>(acc, alpha);
        launch_with_workspace<scalar_t>(call, acc);
      });
    });
  });
}

// acc [m, m] += alpha sum of the rows of jacobian [N, c, m] or [N, c, m, t]
void add_root_rows(const at::Tensor& acc, const at::Tensor& jacobian, double alpha) {
  const int64_t n = jacobian.size(0), c = jacobian.size(1), m = jacobian.size(2);
  const int64_t t = jacobian.dim() == 4 ? jacobian.size(3) : 1;
  const bool joins = n == 1 || c == 1 || jacobian.stride(0) == c * jacobian.stride(1);
  const int64_t joined = c == 1 ? jacobian.stride(0) : jacobian.stride(1);
  Axis rows{joined};
  if (t > 1) {
    if (!joins) return add_root_rows(acc, jacobian.contiguous(), alpha);
    rows = {jacobian.stride(3), t, joined};
  } else if (!joins) {
    rows = {jacobian.stride(1), c, jacobian.stride(0)};
  }
  add_rows(acc, jacobian, rows, {jacobian.stride(2)}, n * c * t, m, alpha, false);
}

// acc [m, m], jacobian [N, c, m] or [N, c, m, t] of its dtype, p [N, c] contiguous of its dtype
void add_softmax_rows(const at::Tensor& acc, const at::Tensor& jacobian, const at::Tensor& p,
                      double alpha) {
  const bool positions = jacobian.dim() == 4;
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "output_hessian_", [&] {
    OutputHessian<scalar_t> call{};
    call.classes = jacobian.size(1);
    call.outputs = jacobian.size(2);
    call.positions = positions ? jacobian.size(3) : 1;
    call.sample_stride = jacobian.stride(0);
    call.class_stride = jacobian.stride(1);
    call.output_stride = jacobian.stride(2);
    call.position_stride = positions ? jacobian.stride(3) : 0;
    call.tf32 = tf32_allowed();
    call.sum = sum_into<scalar_t>(acc, alpha);
    call.samples = jacobian.size(0);
    call.jacobian = jacobian.const_data_ptr<scalar_t>();
    call.probabilities = p.const_data_ptr<scalar_t>();
    launch_with_workspace<scalar_t>(call, acc);
  });
}

// acc [m, m], jacobian [N, c, m] or [N, c, m, t], probabilities [N, c]
void output_hessian_(at::Tensor& acc, const at::Tensor& jacobian,
                     const std::optional<at::Tensor>& probabilities, double alpha) {
  check_output_hessian(acc, jacobian, probabilities);
  // The weights of a single class are zero.
  if (jacobian.numel() == 0 || (probabilities.has_value() && jacobian.size(1) == 1)) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  if (!probabilities.has_value()) {
    in_parts(acc, jacobian,
             [&](const at::Tensor& part, int64_t) { add_root_rows(acc, part, alpha); });
    return;
  }
  const auto dtype = acc.scalar_type();
  const at::Tensor p = probabilities->to(dtype).contiguous();
  const int64_t n = jacobian.size(0);
  const bool direct = jacobian.scalar_type() == dtype;
  const int64_t step = direct ? n : std::clamp<int64_t>(kConvert / (jacobian.numel() / n), 1, n);
  for (int64_t first = 0; first < n; first += step) {
    const int64_t count = std::min(step, n - first);
    add_softmax_rows(acc, jacobian.narrow(0, first, count).to(dtype), p.narrow(0, first, count),
                     alpha);
  }
}

// acc [d, d] or [g, d, d]
void mirror_(at::Tensor& acc) {
  check_mirror(acc);
  if (acc.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(acc.device());
  AT_DISPATCH_FLOATING_TYPES(acc.scalar_type(), "mirror_", [&] {
    const auto sum = sum_into<scalar_t>(acc, 1.0);
    C10_CUDA_CHECK(mirror(sum.acc, sum.groups, sum.order, sum.group_stride, sum.row_stride,
                          sum.column_stride, c10::cuda::getCurrentCUDAStream()));
  });
}

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
    int64_t size = 0;
    for (const KronLayer<T>& layer : layers<T>()) size += layer.workspace();
    const at::Tensor workspace = at::empty({size}, like_.dtype(dtype));
    C10_CUDA_CHECK(kron_matmul(layers<T>(), tf32_allowed(), workspace.mutable_data_ptr<T>(),
                               c10::cuda::getCurrentCUDAStream()));
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

// x [N, d] or [N, d, t], s [N, c, m] or [N, c, m, t], V [m, d] or [k, m, d]
at::Tensor layer_hessian_matmul(const at::Tensor& x, const at::Tensor& s, const at::Tensor& V,
                                double alpha) {
  check_layer_hessian_matmul(x, s, V);
  if (s.numel() == 0 || x.numel() == 0 || V.numel() == 0) return at::zeros(V.sizes(), V.options());
  const c10::cuda::CUDAGuard guard(V.device());
  const bool positions = x.dim() == 3;
  const at::Tensor vectors = V.contiguous();
  const at::Tensor out = at::empty(V.sizes(), V.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "layer_hessian_matmul", [&] {
    LayerHessianProduct<scalar_t> call{};
    call.x = x.const_data_ptr<scalar_t>();
    call.s = s.const_data_ptr<scalar_t>();
    call.vectors = vectors.const_data_ptr<scalar_t>();
    call.out = out.mutable_data_ptr<scalar_t>();
    call.samples = x.size(0);
    call.classes = s.size(1);
    call.outputs = s.size(2);
    call.inputs = x.size(1);
    call.positions = positions ? x.size(2) : 1;
    call.vector_count = V.dim() == 3 ? V.size(0) : 1;
    call.x_sample = x.stride(0);
    call.x_input = x.stride(1);
    call.x_position = positions ? x.stride(2) : 0;
    call.s_sample = s.stride(0);
    call.s_class = s.stride(1);
    call.s_output = s.stride(2);
    call.s_position = positions ? s.stride(3) : 0;
    call.alpha = static_cast<scalar_t>(alpha);
    call.tf32 = tf32_allowed();
    launch_with_workspace<scalar_t>(call, vectors);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hesskern, CUDA, m) {
  m.impl("input_covariance_", &input_covariance_);
  m.impl("conv_input_covariance_", &conv_input_covariance_);
  m.impl("output_hessian_", &output_hessian_);
  m.impl("mirror_", &mirror_);
  m.impl("kron_matmul", &kron_matmul_one);
  m.impl("grouped_kron_matmul", &grouped_kron_matmul);
  m.impl("kron_eigen_matmul", &kron_eigen_matmul_one);
  m.impl("grouped_kron_eigen_matmul", &grouped_kron_eigen_matmul);
  m.impl("layer_hessian_matmul", &layer_hessian_matmul);
}

}  // namespace hesskern::cuda
