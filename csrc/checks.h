// One named check per operator. Both backends call it first, so that a bad call
// gets the same message on CPU and CUDA: argument, what was expected, what came.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace hesskern {

// Spatial geometry of a convolution; one-dimensional layers use height 1.
struct ConvGeometry {
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  int64_t out_h, out_w;

  int64_t positions() const { return out_h * out_w; }
  int64_t taps() const { return kernel_h * kernel_w; }
};

inline void check_distinct_elements(const char* op, const at::Tensor& acc) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(acc) != at::MemOverlap::Yes, op,
                    ": acc must have its own memory for every element, got an expanded tensor ",
                    acc.sizes(), " with strides ", acc.strides());
}

inline void check_separate(const char* op, const at::Tensor& acc, const at::Tensor& input,
                           const char* input_name) {
  const auto overlap = at::get_overlap_status(acc, input);
  TORCH_CHECK_VALUE(
      overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial, op,
      ": acc must not share memory with ", input_name, ", got two views of one storage");
}

inline void check_accumulator(const char* op, const at::Tensor& acc, const at::Tensor& input,
                              const char* input_name) {
  TORCH_CHECK_VALUE(acc.scalar_type() == at::kFloat || acc.scalar_type() == at::kDouble, op,
                    ": acc must be float32 or float64, got ", acc.scalar_type());
  const auto t = input.scalar_type();
  TORCH_CHECK_VALUE(at::isFloatingType(t), op, ": ", input_name,
                    " must be a floating-point tensor, got ", t);
  TORCH_CHECK_VALUE(acc.scalar_type() == at::kDouble || t != at::kDouble, op, ": ", input_name,
                    " is float64, so acc must be float64, got ", acc.scalar_type());
  TORCH_CHECK_VALUE(acc.device() == input.device(), op, ": acc is on ", acc.device(), " but ",
                    input_name, " is on ", input.device());
  check_distinct_elements(op, acc);
  check_separate(op, acc, input, input_name);
}

// base as what is added to: acc's shape, in memory of its own
inline void check_base(const char* op, const at::Tensor& acc,
                       const std::optional<at::Tensor>& base) {
  if (!base.has_value()) return;
  TORCH_CHECK_VALUE(base->sizes() == acc.sizes() && base->scalar_type() == acc.scalar_type() &&
                        base->device() == acc.device(),
                    op, ": base must be as acc, ", acc.sizes(), " ", acc.scalar_type(), " on ",
                    acc.device(), ", got ", base->sizes(), " ", base->scalar_type(), " on ",
                    base->device());
  check_separate(op, acc, *base, "base");
  // Of views with gaps it is too hard to tell; they are taken for what lies between their ends.
  const auto end = [](const at::Tensor& t) {
    int64_t last = 0;
    for (int64_t axis = 0; axis < t.dim(); ++axis) last += (t.size(axis) - 1) * t.stride(axis);
    return static_cast<const char*>(t.const_data_ptr()) + (last + 1) * t.element_size();
  };
  if (acc.numel() == 0 || !acc.has_storage() || !base->has_storage()) return;
  const bool apart = !acc.storage().is_alias_of(base->storage()) ||
                     end(acc) <= static_cast<const char*>(base->const_data_ptr()) ||
                     end(*base) <= static_cast<const char*>(acc.const_data_ptr());
  TORCH_CHECK_VALUE(apart, op,
                    ": acc must not share memory with base, got two views of one storage");
}

// acc and base [d, d] (d + 1 with ones), x [N, d]
inline void check_input_covariance(const at::Tensor& acc, const at::Tensor& x, bool ones,
                                   const std::optional<at::Tensor>& base) {
  const char* op = "input_covariance_";
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must be [N, d], got ", x.sizes());
  const int64_t d = x.size(1) + (ones ? 1 : 0);
  TORCH_CHECK_VALUE(acc.dim() == 2 && acc.size(0) == d && acc.size(1) == d, op, ": acc must be [",
                    d, ", ", d, "] for x ", x.sizes(), ones ? " with ones" : "", ", got ",
                    acc.sizes());
  check_accumulator(op, acc, x, "x");
  check_base(op, acc, base);
}

// Value pair of a per-axis convolution argument for x with one or two spatial axes.
inline void read_pair(const char* op, const char* name, at::IntArrayRef values, int64_t axes,
                      int64_t neutral, int64_t minimum, int64_t* h, int64_t* w) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(values.size()) == axes, op, ": ", name, " must have ",
                    axes, " entries for x with ", axes, " spatial axes, got ", values);
  // The upper limit keeps the geometry's products within int64_t.
  constexpr int64_t maximum = std::numeric_limits<int32_t>::max();
  for (const int64_t v : values) {
    TORCH_CHECK_VALUE(v >= minimum && v <= maximum, op, ": ", name, " must be between ", minimum,
                      " and ", maximum, ", got ", values);
  }
  *h = axes == 2 ? values[0] : neutral;
  *w = values[axes - 1];
}

// x [N, C, H, W] or [N, C, L]
inline ConvGeometry read_conv_geometry(const char* op, const at::Tensor& x,
                                       at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                       at::IntArrayRef padding, at::IntArrayRef dilation,
                                       int64_t groups) {
  TORCH_CHECK_VALUE(x.dim() == 3 || x.dim() == 4, op, ": x must be [N, C, L] or [N, C, H, W], got ",
                    x.sizes());
  const int64_t axes = x.dim() - 2;
  ConvGeometry g{};
  read_pair(op, "kernel_size", kernel_size, axes, 1, 1, &g.kernel_h, &g.kernel_w);
  read_pair(op, "stride", stride, axes, 1, 1, &g.stride_h, &g.stride_w);
  read_pair(op, "padding", padding, axes, 0, 0, &g.padding_h, &g.padding_w);
  read_pair(op, "dilation", dilation, axes, 1, 1, &g.dilation_h, &g.dilation_w);
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(groups >= 1 && channels % groups == 0, op,
                    ": groups must divide the number of channels ", channels, ", got ", groups);
  g.groups = groups;
  const int64_t height = axes == 2 ? x.size(2) : 1;
  const int64_t width = x.size(x.dim() - 1);
  const int64_t room_h = height + 2 * g.padding_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t room_w = width + 2 * g.padding_w - g.dilation_w * (g.kernel_w - 1) - 1;
  TORCH_CHECK_VALUE(room_h >= 0 && room_w >= 0, op,
                    ": the kernel does not fit into the padded input; x ", x.sizes(),
                    ", kernel_size ", kernel_size, ", padding ", padding, ", dilation ", dilation);
  g.out_h = room_h / g.stride_h + 1;
  g.out_w = room_w / g.stride_w + 1;
  return g;
}

// acc [C k k, C k k] or [g, C k k / g, C k k / g], x [N, C, H, W] or [N, C, L]
inline ConvGeometry check_conv_input_covariance(const at::Tensor& acc, const at::Tensor& x,
                                                at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                                at::IntArrayRef padding, at::IntArrayRef dilation,
                                                int64_t groups) {
  const char* op = "conv_input_covariance_";
  const ConvGeometry g = read_conv_geometry(op, x, kernel_size, stride, padding, dilation, groups);
  const int64_t d = x.size(1) / groups * g.taps();
  const bool plain = acc.dim() == 2 && groups == 1 && acc.size(0) == d && acc.size(1) == d;
  const bool grouped =
      acc.dim() == 3 && acc.size(0) == groups && acc.size(1) == d && acc.size(2) == d;
  TORCH_CHECK_VALUE(plain || grouped, op, ": acc must be ",
                    groups == 1 ? "[d, d] or [1, d, d]" : "[groups, d, d]", " with d = ", d,
                    " and groups = ", groups, ", got ", acc.sizes());
  check_accumulator(op, acc, x, "x");
  return g;
}

// acc and base [m, m], jacobian [N, c, m] or [N, c, m, t], probabilities [N, c]
inline void check_output_hessian(const at::Tensor& acc, const at::Tensor& jacobian,
                                 const std::optional<at::Tensor>& probabilities,
                                 const std::optional<at::Tensor>& base) {
  const char* op = "output_hessian_";
  TORCH_CHECK_VALUE(jacobian.dim() == 3 || jacobian.dim() == 4, op,
                    ": jacobian must be [N, c, m] or [N, c, m, t], got ", jacobian.sizes());
  const int64_t m = jacobian.size(2);
  TORCH_CHECK_VALUE(acc.dim() == 2 && acc.size(0) == m && acc.size(1) == m, op, ": acc must be [",
                    m, ", ", m, "] for jacobian ", jacobian.sizes(), ", got ", acc.sizes());
  check_accumulator(op, acc, jacobian, "jacobian");
  check_base(op, acc, base);
  if (probabilities.has_value()) {
    const at::Tensor& p = *probabilities;
    TORCH_CHECK_VALUE(
        p.dim() == 2 && p.size(0) == jacobian.size(0) && p.size(1) == jacobian.size(1), op,
        ": probabilities must be [N, c] = [", jacobian.size(0), ", ", jacobian.size(1), "], got ",
        p.sizes());
    TORCH_CHECK_VALUE(at::isFloatingType(p.scalar_type()), op,
                      ": probabilities must be a floating-point tensor, got ", p.scalar_type());
    TORCH_CHECK_VALUE(p.device() == acc.device(), op, ": acc is on ", acc.device(),
                      " but probabilities is on ", p.device());
    check_separate(op, acc, p, "probabilities");
  }
}

// acc [d, d] or [g, d, d]
inline void check_mirror(const at::Tensor& acc) {
  TORCH_CHECK_VALUE(
      (acc.dim() == 2 || acc.dim() == 3) && acc.size(acc.dim() - 1) == acc.size(acc.dim() - 2),
      "mirror_: acc must be [d, d] or [g, d, d], got ", acc.sizes());
  TORCH_CHECK_VALUE(acc.scalar_type() == at::kFloat || acc.scalar_type() == at::kDouble,
                    "mirror_: acc must be float32 or float64, got ", acc.scalar_type());
  check_distinct_elements("mirror_", acc);
}

// acc and other [d, d] or [g, d, d], both contiguous
inline void check_add_triangle(const at::Tensor& acc, const at::Tensor& other) {
  const char* op = "add_triangles_";
  TORCH_CHECK_VALUE(
      (acc.dim() == 2 || acc.dim() == 3) && acc.size(acc.dim() - 1) == acc.size(acc.dim() - 2), op,
      ": acc must be [d, d] or [g, d, d], got ", acc.sizes());
  TORCH_CHECK_VALUE(other.sizes() == acc.sizes() && other.scalar_type() == acc.scalar_type() &&
                        acc.is_contiguous() && other.is_contiguous(),
                    op, ": other must be as acc, both contiguous, got ", acc.sizes(), " ",
                    acc.scalar_type(), " and ", other.sizes(), " ", other.scalar_type());
  check_accumulator(op, acc, other, "other");
}

// An operator's name in messages, with the index of the list's entry if it has one.
struct OpName {
  const char* name;
  int64_t index = -1;

  OpName(const char* op, int64_t entry = -1) : name(op), index(entry) {}
  friend std::ostream& operator<<(std::ostream& out, const OpName& op) {
    out << op.name;
    if (op.index >= 0) out << '[' << op.index << ']';
    return out;
  }
};

inline void check_same(const OpName& op, const char* name_a, const at::Tensor& a,
                       const char* name_b, const at::Tensor& b) {
  TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type(), op, ": ", name_a, " is ", a.scalar_type(),
                    " but ", name_b, " is ", b.scalar_type());
  TORCH_CHECK_VALUE(a.device() == b.device(), op, ": ", name_a, " is on ", a.device(), " but ",
                    name_b, " is on ", b.device());
}

// X [m, d] or [k, m, d] of floating-point numbers, for two other operands
inline void check_multiplied(const OpName& op, const at::Tensor& X, int64_t m, int64_t d,
                             const char* name_a, const at::Tensor& a, const char* name_b,
                             const at::Tensor& b) {
  TORCH_CHECK_VALUE(X.dim() == 2 || X.dim() == 3, op, ": X must be [m, d] or [k, m, d], got ",
                    X.sizes());
  TORCH_CHECK_VALUE(X.size(-2) == m && X.size(-1) == d, op, ": X must end in [m, d] = [", m, ", ",
                    d, "] for ", name_a, " ", a.sizes(), " and ", name_b, " ", b.sizes(), ", got ",
                    X.sizes());
  TORCH_CHECK_VALUE(at::isFloatingType(X.scalar_type()), op,
                    ": X must be a floating-point tensor, got ", X.scalar_type());
}

// A [m', m], B [d', d], X [m, d] or [k, m, d]
inline void check_kron_matmul(const at::Tensor& A, const at::Tensor& B, const at::Tensor& X,
                              const OpName& op = "kron_matmul") {
  TORCH_CHECK_VALUE(A.dim() == 2, op, ": A must be [m', m], got ", A.sizes());
  TORCH_CHECK_VALUE(B.dim() == 2, op, ": B must be [d', d], got ", B.sizes());
  check_multiplied(op, X, A.size(1), B.size(1), "A", A, "B", B);
  check_same(op, "A", A, "X", X);
  check_same(op, "B", B, "X", X);
}

// U [m, r], S [r, q], V [d, q], X [m, d] or [k, m, d]
inline void check_kron_eigen_matmul(const at::Tensor& U, const at::Tensor& S, const at::Tensor& V,
                                    const at::Tensor& X, const OpName& op = "kron_eigen_matmul") {
  TORCH_CHECK_VALUE(U.dim() == 2, op, ": U must be [m, r], got ", U.sizes());
  TORCH_CHECK_VALUE(V.dim() == 2, op, ": V must be [d, q], got ", V.sizes());
  TORCH_CHECK_VALUE(S.dim() == 2 && S.size(0) == U.size(1) && S.size(1) == V.size(1), op,
                    ": S must be [r, q] = [", U.size(1), ", ", V.size(1), "] for U ", U.sizes(),
                    " and V ", V.sizes(), ", got ", S.sizes());
  check_multiplied(op, X, U.size(0), V.size(0), "U", U, "V", V);
  check_same(op, "U", U, "X", X);
  check_same(op, "S", S, "X", X);
  check_same(op, "V", V, "X", X);
}

inline void check_same_length(const char* op, const char* name_a, size_t a, const char* name_b,
                              size_t b) {
  TORCH_CHECK_VALUE(a == b, op, ": ", name_a, " has ", a, " entries but ", name_b, " has ", b);
}

// x [N, d] or [N, d, t]
inline void check_layer_inputs(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, op, ": x must be [N, d] or [N, d, t], got ",
                    x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op,
                    ": x must be float32 or float64, got ", x.scalar_type());
}

// x [N, d] or [N, d, t]; columns of X V^T
inline void check_pack_layer_inputs(const at::Tensor& x, int64_t columns) {
  const char* op = "pack_layer_inputs";
  check_layer_inputs(op, x);
  TORCH_CHECK_VALUE(columns >= 0, op, ": columns must not be negative, got ", columns);
}

// packed [0] or, where the device makes parts of x, [size]
inline void check_packed(const at::Tensor& x, const at::Tensor& packed, int64_t size) {
  const char* op = "layer_hessian_matmul";
  TORCH_CHECK_VALUE(packed.device() == x.device(), op, ": x is on ", x.device(),
                    " but packed is on ", packed.device());
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kInt, op, ": packed must be int32, got ",
                    packed.scalar_type());
  TORCH_CHECK_VALUE(packed.dim() == 1 && (packed.size(0) == 0 || packed.size(0) == size) &&
                        packed.is_contiguous(),
                    op, ": packed must be what pack_layer_inputs gives for x ", x.sizes(),
                    ", contiguous [0]", size > 0 ? " or [" : "",
                    size > 0 ? std::to_string(size) : "", size > 0 ? "]" : "", ", got ",
                    packed.sizes());
}

// x [N, d] or [N, d, t], s [N, c, m] or [N, c, m, t], V [m, d] or [k, m, d]
inline void check_layer_hessian_matmul(const at::Tensor& x, const at::Tensor& s,
                                       const at::Tensor& V) {
  const char* op = "layer_hessian_matmul";
  check_layer_inputs(op, x);
  TORCH_CHECK_VALUE(s.dim() == x.dim() + 1, op, ": s must be ",
                    x.dim() == 2 ? "[N, c, m]" : "[N, c, m, t]", " for x ", x.sizes(), ", got ",
                    s.sizes());
  TORCH_CHECK_VALUE(s.size(0) == x.size(0), op, ": x has ", x.size(0), " samples but s has ",
                    s.size(0));
  TORCH_CHECK_VALUE(x.dim() == 2 || s.size(3) == x.size(2), op, ": x has ",
                    x.dim() == 3 ? x.size(2) : 1, " positions but s has ", s.size(s.dim() - 1));
  TORCH_CHECK_VALUE(V.dim() == 2 || V.dim() == 3, op, ": V must be [m, d] or [k, m, d], got ",
                    V.sizes());
  TORCH_CHECK_VALUE(V.size(-2) == s.size(2) && V.size(-1) == x.size(1), op,
                    ": V must end in [m, d] = [", s.size(2), ", ", x.size(1), "], got ", V.sizes());
  check_same(op, "x", x, "s", s);
  check_same(op, "x", x, "V", V);
}

// logits [N, c] or [N, c, t], uniform [N t], targets [N] or [N, t], terms [N]
inline void check_sampled_cross_entropy_gradient(const at::Tensor& logits,
                                                 const at::Tensor& uniform,
                                                 const std::optional<at::Tensor>& targets,
                                                 const std::optional<at::Tensor>& terms) {
  const char* op = "sampled_cross_entropy_gradient";
  TORCH_CHECK_VALUE(logits.dim() == 2 || logits.dim() == 3, op,
                    ": logits must be [N, c] or [N, c, t], got ", logits.sizes());
  const auto type = logits.scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op,
      ": logits must be float32, float64, bfloat16 or float16, got ", type);
  const int64_t n = logits.size(0), t = logits.dim() == 3 ? logits.size(2) : 1;
  TORCH_CHECK_VALUE(uniform.dim() == 1 && uniform.size(0) == n * t, op,
                    ": uniform must be [N t] = [", n * t, "] for logits ", logits.sizes(), ", got ",
                    uniform.sizes());
  TORCH_CHECK_VALUE(uniform.scalar_type() == at::kDouble, op, ": uniform must be float64, got ",
                    uniform.scalar_type());
  TORCH_CHECK_VALUE(uniform.device() == logits.device(), op, ": logits is on ", logits.device(),
                    " but uniform is on ", uniform.device());
  if (targets.has_value()) {
    const bool fits = logits.dim() == 2
                          ? targets->dim() == 1 && targets->size(0) == n
                          : targets->dim() == 2 && targets->size(0) == n && targets->size(1) == t;
    TORCH_CHECK_VALUE(fits, op, ": targets must be ", logits.dim() == 2 ? "[N]" : "[N, t]",
                      " for logits ", logits.sizes(), ", got ", targets->sizes());
    TORCH_CHECK_VALUE(targets->scalar_type() == at::kLong, op, ": targets must be int64, got ",
                      targets->scalar_type());
    TORCH_CHECK_VALUE(targets->device() == logits.device(), op, ": logits is on ", logits.device(),
                      " but targets is on ", targets->device());
  }
  if (terms.has_value()) {
    TORCH_CHECK_VALUE(terms->dim() == 1 && terms->size(0) == n, op, ": terms must be [N] = [", n,
                      "], got ", terms->sizes());
    TORCH_CHECK_VALUE(terms->scalar_type() == at::kLong, op, ": terms must be int64, got ",
                      terms->scalar_type());
    TORCH_CHECK_VALUE(terms->device() == logits.device(), op, ": logits is on ", logits.device(),
                      " but terms is on ", terms->device());
  }
}

// factor [N, H, W, C], or none, for gradients out [N, H, W, r, C]; name: of the argument
inline void check_factor(const char* op, const at::Tensor& out,
                         const std::optional<at::Tensor>& factor, const char* name = "factor") {
  if (!factor.has_value()) return;
  const std::vector<int64_t> expected{out.size(0), out.size(1), out.size(2), out.size(4)};
  TORCH_CHECK_VALUE(factor->sizes() == at::IntArrayRef(expected), op, ": ", name,
                    " must be [N, H, W, C] = ", at::IntArrayRef(expected), ", got ",
                    factor->sizes());
  check_same(op, "out", out, name, *factor);
}

// out [N, H, W, r, C], grad [N, Ho, Wo, r, c] with Ho, Wo of windows of that geometry
inline void check_window_gradients(const char* op, const at::Tensor& out, const at::Tensor& grad,
                                   at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                   at::IntArrayRef padding, at::IntArrayRef dilation,
                                   bool ceil_mode) {
  TORCH_CHECK_VALUE(grad.dim() == 5, op, ": grad must be [N, Ho, Wo, r, c], got ", grad.sizes());
  TORCH_CHECK_VALUE(out.dim() == 5 && out.size(0) == grad.size(0) && out.size(3) == grad.size(3),
                    op, ": out must be [N, H, W, r, C] for grad ", grad.sizes(), ", got ",
                    out.sizes());
  for (const at::IntArrayRef values : {kernel_size, stride, padding, dilation}) {
    TORCH_CHECK_VALUE(values.size() == 2, op,
                      ": kernel_size, stride, padding and dilation must have 2 entries, got ",
                      values);
  }
  check_same(op, "out", out, "grad", grad);
  for (int64_t i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(kernel_size[i] >= 1 && stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                      op,
                      ": kernel_size, stride and dilation must be positive and padding not "
                      "negative, got ",
                      kernel_size, ", ", stride, ", ", dilation, " and ", padding);
    const int64_t room = out.size(1 + i) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    const int64_t least = room < 0 ? 0 : room / stride[i] + 1;
    // With ceil_mode a last window may stick out.
    const int64_t most = ceil_mode ? least + 1 : least;
    TORCH_CHECK_VALUE(grad.size(1 + i) >= least && grad.size(1 + i) <= most, op,
                      ": grad must have ", least, " positions along axis ", 1 + i, " for out ",
                      out.sizes(), ", got ", grad.sizes());
  }
}

// out [N, H, W, r, C], grad [N, Ho, Wo, r, m], weight [m, C / g, kh, kw], factor [N, H, W, C]
inline void check_conv_input_gradient(const at::Tensor& out, const at::Tensor& grad,
                                      const at::Tensor& weight, at::IntArrayRef stride,
                                      at::IntArrayRef padding, at::IntArrayRef dilation,
                                      int64_t groups, const std::optional<at::Tensor>& factor) {
  const char* op = "conv_input_gradient_";
  TORCH_CHECK_VALUE(weight.dim() == 4, op, ": weight must be [m, C / g, kh, kw], got ",
                    weight.sizes());
  check_window_gradients(op, out, grad, weight.sizes().slice(2), stride, padding, dilation, false);
  TORCH_CHECK_VALUE(out.is_contiguous(), op, ": out must be contiguous");
  TORCH_CHECK_VALUE(weight.size(0) == grad.size(4), op, ": weight must have m = ", grad.size(4),
                    " rows for grad ", grad.sizes(), ", got ", weight.sizes());
  TORCH_CHECK_VALUE(
      groups >= 1 && weight.size(0) % groups == 0 && weight.size(1) * groups == out.size(4), op,
      ": groups must fit weight ", weight.sizes(), " and out ", out.sizes(), ", got ", groups);
  check_same(op, "grad", grad, "weight", weight);
  check_factor(op, out, factor);
}

// out [N, H, W, r, C], grad [N, Ho, Wo, r, C], indices [N, Ho, Wo, C], factor and relu [N, H, W, C]
inline void check_max_pool_input_gradient(const at::Tensor& out, const at::Tensor& grad,
                                          const at::Tensor& indices, at::IntArrayRef kernel_size,
                                          at::IntArrayRef stride, at::IntArrayRef padding,
                                          at::IntArrayRef dilation,
                                          const std::optional<at::Tensor>& factor,
                                          const std::optional<at::Tensor>& relu) {
  const char* op = "max_pool_input_gradient_";
  check_window_gradients(op, out, grad, kernel_size, stride, padding, dilation, true);
  TORCH_CHECK_VALUE(out.is_non_overlapping_and_dense(), op,
                    ": out must fill its memory, got strides ", out.strides());
  TORCH_CHECK_VALUE(out.size(4) == grad.size(4), op, ": out must have ", grad.size(4),
                    " channels for grad ", grad.sizes(), ", got ", out.sizes());
  TORCH_CHECK_VALUE(
      indices.dim() == 4 && indices.size(0) == grad.size(0) && indices.size(1) == grad.size(1) &&
          indices.size(2) == grad.size(2) && indices.size(3) == grad.size(4),
      op, ": indices must be [N, Ho, Wo, C] for grad ", grad.sizes(), ", got ", indices.sizes());
  TORCH_CHECK_VALUE(indices.scalar_type() == at::kLong, op, ": indices must be int64, got ",
                    indices.scalar_type());
  TORCH_CHECK_VALUE(indices.device() == out.device(), op, ": out is on ", out.device(),
                    " but indices is on ", indices.device());
  check_factor(op, out, factor);
  check_factor(op, out, relu, "relu");
}

}  // namespace hesskern
