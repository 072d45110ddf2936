// narrow_rows.cu, narrow_positions.cu and root_rows.cu on the CPU.
#include <cmath>

#include "accumulator.h"
#include "check.h"
#include "checks.h"
#include "core/warp.h"
#include "input_covariance.h"
#include "narrow_positions.h"
#include "narrow_rows.h"
#include "output_hessian.h"
#include "root_rows.h"

namespace hesskern::cuda::check {

namespace {

// The device that a check finds, until the end of its block.
class OnDevice {
 public:
  explicit OnDevice(int processors, int capability = 90, int most_shared = 227 << 10)
      : before_(emulation::device()) {
    emulation::device() = {processors, most_shared, capability};
  }
  ~OnDevice() { emulation::device() = before_; }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  emulation::Properties before_;
};

std::string device_name() {
  const emulation::Properties& device = emulation::device();
  return " on " + std::to_string(device.processors) + " of sm_" +
         std::to_string(device.capability) + ", " + std::to_string(device.most_shared >> 10) +
         " KB";
}

template <typename In>
std::string type_name() {
  return std::is_same_v<In, float>      ? "float"
         : std::is_same_v<In, BFloat16> ? "bfloat16"
         : std::is_same_v<In, Float16>  ? "float16"
                                        : "double";
}

// What to expect of acc: the sum over rows k of value(k, i) value(k, j).
template <typename T, class Value>
void expect_gram(Accumulator<T>& acc, int64_t rows, int64_t m, Value value) {
  std::vector<double> row(static_cast<size_t>(m));
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t i = 0; i < m; ++i) row[static_cast<size_t>(i)] = value(k, i);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = i; j < m; ++j) {
        acc.expected(0, i, j) +=
            acc.sum.alpha * row[static_cast<size_t>(i)] * row[static_cast<size_t>(j)];
      }
    }
  }
}

void expect_true(const std::string& name, bool good) {
  report(name, good ? 0 : 1, 0);
}

enum class Data { kNormal, kNonNegative, kDecades, kTiny };

double sample_of(Data data, int64_t row) {
  switch (data) {
    case Data::kNonNegative:
      return std::fabs(normal());
    case Data::kDecades:
      return normal() * std::pow(10.0, static_cast<double>(row / 3 % 25 - 12));
    case Data::kTiny:
      return normal() * 1e-18;
    default:
      return normal();
  }
}

// x [n, m], misaligned by offset elements.
template <typename In>
void rows(int64_t n, int64_t m, int64_t offset = 0, Data data = Data::kNormal,
          double limit = 6e-7) {
  const Memory<In> memory(n * m + offset);
  In* x = memory.data() + offset;
  for (int64_t k = 0; k < n * m; ++k) x[k] = store<In>(sample_of(data, k / m));
  Accumulator<float> acc(1, m, m + 2, data == Data::kTiny ? 1e36f : 0.7f);
  expect_gram(acc, n, m, [&](int64_t k, int64_t i) { return value_of(x[k * m + i]); });
  const std::string name = "narrow rows " + type_name<In>() + " [" + std::to_string(n) + ", " +
                           std::to_string(m) + "] at " + std::to_string(offset) + device_name();
  const InputCovariance<In, float> call{x, {m}, {1}, n, m, false, false, acc.sum};
  if (!NarrowRows<In>{x, n, m, nullptr, 1, acc.sum}.fits()) {
    return expect_true(name + ": does not fit", false);
  }
  run(call, acc, name, limit);
}

// jacobian [n, c, m] and probabilities [n, c], misaligned by so many elements.
template <typename In>
void softmax(int64_t n, int64_t c, int64_t m, int64_t offset = 0, int64_t p_offset = 0,
             Data data = Data::kNormal, double limit = 6e-7, bool fits = true) {
  const Memory<In> memory(n * c * m + offset);
  const Memory<float> weights(n * c + p_offset);
  In* g = memory.data() + offset;
  float* p = weights.data() + p_offset;
  for (int64_t k = 0; k < n * c * m; ++k) {
    g[k] = store<In>((data == Data::kNormal ? 1 : 0) + sample_of(data, k / c / m));
  }
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t j = 0; j < c; ++j) {
      // Some classes have no probability at all.
      total += p[i * c + j] = j % 5 == 3 ? 0.0f : static_cast<float>(std::exp(normal()));
    }
    for (int64_t j = 0; j < c; ++j) p[i * c + j] /= static_cast<float>(total);
  }
  Accumulator<float> acc(1, m, m, data == Data::kTiny ? 1e36f : 1.25f);
  expect_gram(acc, n * c, m, [&](int64_t k, int64_t a) {
    const int64_t i = k / c;
    double mean = 0;
    for (int64_t j = 0; j < c; ++j) {
      mean += static_cast<double>(p[i * c + j]) * value_of(g[(i * c + j) * m + a]);
    }
    return std::sqrt(static_cast<double>(p[k])) * (value_of(g[k * m + a]) - mean);
  });
  const std::string name = "narrow softmax " + type_name<In>() + " [" + std::to_string(n) + ", " +
                           std::to_string(c) + ", " + std::to_string(m) + "] at " +
                           std::to_string(offset) + ", " + std::to_string(p_offset) + device_name();
  const OutputHessian<In, float> call{g, p, n, c, m, 1, c * m, m, 1, 0, false, acc.sum};
  if (NarrowRows<In>{g, n * c, m, p, c, acc.sum}.fits() != fits) {
    return expect_true(name + ": fits or not", false);
  }
  if (call.readable()) return run(call, acc, name, limit);
  expect_true(name + ": is not read as it is", !std::is_same_v<In, float>);
}

enum class Layout { kPositionsLast, kOutputsLast, kPadded, kSwapped };

// jacobian [n, c, m, t] in several orders, misaligned by offset elements.
template <typename In, typename T = float>
void roots(int64_t n, int64_t c, int64_t m, int64_t t, Layout layout = Layout::kPositionsLast,
           int64_t offset = 0, Data data = Data::kNormal) {
  const bool padded = layout == Layout::kPadded, last = layout != Layout::kOutputsLast;
  const int64_t block = m * t + (padded ? 3 : 0);
  const Memory<In> memory(n * c * block + offset);
  In* g = memory.data() + offset;
  for (int64_t k = 0; k < n * c * block; ++k) g[k] = store<In>(sample_of(data, k / block));
  const bool swapped = layout == Layout::kSwapped;
  const int64_t sample = swapped ? block : c * block, group = swapped ? n * block : block;
  Accumulator<T> acc(1, m, m + 1, T(0.75));
  const RootRows<In, T> call{g,     n,      c, m, t, sample, group, last ? t : 1, last ? 1 : m,
                             false, acc.sum};
  expect_gram(acc, n * c * t, m, [&](int64_t k, int64_t i) {
    return value_of(g[k / t / c * call.sample_stride + k / t % c * call.class_stride +
                      i * call.output_stride + k % t * call.position_stride]);
  });
  const std::string name = "root rows " + type_name<In>() + " [" + std::to_string(n) + ", " +
                           std::to_string(c) + ", " + std::to_string(m) + ", " + std::to_string(t) +
                           "] at " + std::to_string(offset) + " layout " +
                           std::to_string(static_cast<int>(layout)) + device_name();
  if (!call.readable()) return expect_true(name + ": is not read as it is", swapped && t > 1);
  run(call, acc, name, limit_of<T>());
}

// One number that is none leaves its diagonal element not finite.
template <typename In, class Call>
void spoiled(const std::string& name, const Memory<In>& memory, int64_t at, double bad, int64_t m,
             int64_t column, Call call_for) {
  const In before = memory[at];
  memory[at] = store<In>(bad);
  Accumulator<float> acc(1, m, m, 1.0f);
  const auto call = call_for(acc.sum);
  const Work<float> work = call.plan();
  const Memory<float> workspace(work.workspace);
  const bool good = work.run(workspace.data(), nullptr) == cudaSuccess;
  memory[at] = before;
  expect_true("narrow " + name + " with " + std::to_string(bad) + " at " + std::to_string(column),
              good && !std::isfinite(acc.at(0, column, column)));
}

template <typename In>
void not_numbers() {
  constexpr int64_t n = 9, c = 5, t = 20;
  const OnDevice device(1);
  for (const double bad : {std::nan(""), static_cast<double>(INFINITY), -1.0 * INFINITY}) {
    for (const int64_t m : {12, 64}) {
      const Memory<In> x(n * c * m * t);
      for (int64_t k = 0; k < x.size(); ++k) x[k] = store<In>(normal());
      const Memory<float> p(n * c);
      for (int64_t k = 0; k < n * c; ++k) p[k] = 1.0f / c;
      for (const int64_t column : {int64_t{0}, m - 1}) {
        const int64_t row = n * c - 1;
        spoiled("softmax " + type_name<In>(), x, row * m + column, bad, m, column,
                [&](const SymmetricSum<float>& sum) {
                  return OutputHessian<In, float>{x.data(), p.data(), n, c, m,     1,
                                                  c * m,    m,        1, 0, false, sum};
                });
        spoiled("rows " + type_name<In>(), x, row * m + column, bad, m, column,
                [&](const SymmetricSum<float>& sum) {
                  return InputCovariance<In, float>{x.data(), {m},   {1},   n * c,
                                                    m,        false, false, sum};
                });
        spoiled("positions " + type_name<In>(), x, (2 * m + column) * t + 7, bad, m, column,
                [&](const SymmetricSum<float>& sum) {
                  return NarrowPositions<In>{x.data(), n, m, t, sum};
                });
      }
    }
  }
}

// What is too large to be run here is planned without overflow.
void large_plans() {
  const OnDevice device(132);
  const Memory<float> memory(64);
  const SymmetricSum<float> sum{memory.data(), 1, 4, 16, 4, 1, 1.0f};
  const int64_t size = 3 * 256 * 4;
  const NarrowRows<float> rows{memory.data(), int64_t{1} << 36, 4, nullptr, 1, sum};
  expect_true("narrow rows of 2^38 elements",
              rows.fits() && rows.plan().workspace > 0 && rows.plan().workspace < 132 * 32 * size);
  const NarrowPositions<float> positions{memory.data(), int64_t{1} << 34, 9, 16, sum};
  expect_true("narrow positions of 2^38 elements",
              positions.fits() && positions.plan().workspace > 0 &&
                  positions.plan().workspace < 132 * 32 * size);
  // Sizes that no int holds do not fit.
  const NarrowRows<float> classes{memory.data(), int64_t{1} << 34, 4,
                                  memory.data(), int64_t{1} << 33, sum};
  expect_true("narrow rows of 2^33 classes", !classes.fits());
}

}  // namespace

void check_narrow_rows(bool few) {
  for (const int capability : {90, 80}) {
    const OnDevice device(1, capability, 20 << 10);
    softmax<float>(51, 3, 10);
    rows<float>(397, 12);
  }
  if (few) return;
  // Few blocks, so that stages are used again and again: by the copy engine, by lanes 16 bytes at
  // a time, and, not aligned, 4 bytes.
  for (const int capability : {90, 80}) {
    const OnDevice device(1, capability, 64 << 10);
    softmax<float>(85, 10, 10);
    softmax<float>(70, 3, 32);
    softmax<float>(50, 5, 64);
    softmax<BFloat16>(66, 4, 20);
    rows<float>(600, 16);
    rows<float>(550, 10);
    softmax<float>(50, 5, 60);
    rows<BFloat16>(600, 64);
  }
  {
    const OnDevice device(1, 90, 99 << 10);
    rows<float>(530, 64);
  }
  {
    const OnDevice device(1, 90, 64 << 10);
    softmax<float>(85, 3, 7, 1, 0);
    softmax<float>(50, 7, 24, 3, 1);
    softmax<float>(41, 6, 60, 2, 2);
    softmax<float>(41, 5, 20, 0, 1);
    softmax<Float16>(41, 5, 20, 2, 3);
    rows<float>(399, 28, 1);
    rows<float>(401, 3, 3);
    rows<Float16>(260, 36, 2);
  }
  {
    const OnDevice device(2);
    // Every number of columns about the blocks' edges, every remainder of samples, few classes.
    for (const int64_t m : {1, 2, 3, 4, 15, 16, 17, 30, 31, 32, 33, 36, 47, 48, 49, 52, 63, 64}) {
      softmax<float>(1 + m % 6, 2 + m % 4, m);
      rows<float>(1 + 7 * m % 67, m);
    }
    for (const int64_t m : {4, 8, 32, 36, 64}) {
      softmax<BFloat16>(1 + m % 5, 3 + m % 4, m);
      softmax<Float16>(2 + m % 7, 2 + m % 3, m);
      rows<BFloat16>(1 + 9 * m % 71, m);
      rows<Float16>(2 + 5 * m % 71, m);
    }
    for (const int64_t n : {1, 2, 3, 4, 5, 7, 31, 32, 33, 39}) {
      rows<float>(n, 5);
      rows<BFloat16>(n, 12);
      softmax<float>(n, 2, 6);
    }
    softmax<float>(6, 27, 64);
    softmax<float>(5, 300, 2);
    // What has to go another way.
    softmax<float>(5, 60, 64, 0, 0, Data::kNormal, 3e-6, false);
    softmax<BFloat16>(3, 4, 10, 0, 0, Data::kNormal, 3e-6, false);
    softmax<Float16>(3, 4, 12, 1, 0, Data::kNormal, 3e-6, false);
    softmax<float>(3, 4, 65, 0, 0, Data::kNormal, 3e-6, false);
    rows<float>(100, 20, 0, Data::kDecades);
    rows<float>(100, 33, 0, Data::kTiny);
    softmax<float>(30, 4, 20, 0, 0, Data::kDecades);
    softmax<float>(30, 5, 13, 0, 0, Data::kTiny);
  }
  {
    // Sums that are cut off instead of rounded all err to the same side.
    const OnDevice device(1, 90, 20 << 10);
    rows<float>(12000, 4, 0, Data::kNonNegative, 5e-7);
    softmax<float>(2000, 6, 3, 0, 0, Data::kNonNegative, 1e-6);
  }
  {
    // Groups of more than four samples.
    const OnDevice device(1);
    rows<float>(12001, 4);
    rows<BFloat16>(8217, 8);
    softmax<float>(1541, 2, 3);
    softmax<float>(1027, 4, 4);
  }
  {
    const OnDevice device(1, 90, 20 << 10);
    rows<BFloat16>(12000, 4, 0, Data::kNonNegative, 5e-7);
  }
  not_numbers<float>();
  not_numbers<BFloat16>();
  not_numbers<Float16>();
  large_plans();
}

void check_root_rows(bool few) {
  {
    const OnDevice device(1, 90, 99 << 10);
    roots<float>(3, 2, 6, 20);
    roots<float>(9, 6, 9, 70);
  }
  if (few) return;
  for (const int capability : {90, 80}) {
    // Many pieces a warp: stages are used again.
    const OnDevice device(1, capability, 99 << 10);
    roots<float>(11, 10, 9, 70);
    roots<float>(7, 10, 25, 36);
    roots<float>(4, 10, 40, 33);
    roots<float>(5, 5, 50, 20);
    roots<BFloat16>(10, 5, 64, 12);
  }
  const OnDevice device(2);
  for (const int64_t m : {1, 2, 3, 4, 5, 6, 7, 8}) {
    roots<float>(3, 2, m, 4 * m);
    roots<float>(2, 3, m, 4 * m + 1);
    roots<float>(2, 1, m, 4 * m, Layout::kPositionsLast, 1);
  }
  // Threads and warps take several pieces of several samples.
  roots<float>(40, 60, 3, 8);
  roots<float>(30, 60, 2, 3);
  for (const int64_t m : {9, 16, 17, 31, 32, 33, 48, 49, 64}) {
    for (const int64_t t : {2, 16, 37, 132}) roots<float>(1 + t % 3, 2, m, t);
    roots<float>(2, 1, m, 20, Layout::kPositionsLast, 1);
    roots<BFloat16>(2, 2, m, 36);
    roots<Float16>(1, 3, m, 20);
  }
  roots<BFloat16>(2, 2, 5, 36, Layout::kPositionsLast, 4);
  // The way of other input covariances: odd rows of positions, strides, more rows, double.
  roots<BFloat16>(2, 2, 12, 35);
  roots<Float16>(2, 2, 12, 36, Layout::kPositionsLast, 1);
  roots<float>(2, 2, 70, 12);
  roots<float>(3, 2, 12, 10, Layout::kOutputsLast);
  roots<BFloat16>(3, 2, 12, 10, Layout::kOutputsLast);
  roots<float>(3, 2, 12, 10, Layout::kPadded);
  roots<float>(3, 2, 12, 10, Layout::kSwapped);
  roots<float>(3, 1, 12, 10, Layout::kSwapped);
  roots<float>(1, 3, 12, 10, Layout::kSwapped);
  roots<float>(3, 4, 12, 1);
  roots<float>(3, 4, 12, 1, Layout::kPadded);
  roots<float>(3, 4, 12, 1, Layout::kSwapped);
  roots<BFloat16>(5, 7, 12, 1);
  roots<double, double>(3, 2, 12, 10);
  roots<double, double>(3, 2, 12, 1);
  roots<float>(10, 6, 20, 16, Layout::kPositionsLast, 0, Data::kDecades);
  roots<float>(10, 6, 7, 16, Layout::kPositionsLast, 0, Data::kDecades);
  roots<float>(20, 10, 9, 64, Layout::kPositionsLast, 0, Data::kNonNegative);
}

}  // namespace hesskern::cuda::check
