// sampled_cross_entropy.cu on the CPU.
#include <algorithm>

#include "check.h"
#include "checks.h"
#include "sampled_cross_entropy.h"

namespace hesskern::cuda::check {

namespace {

constexpr int64_t kIgnored = -100;
// Logits that are no numbers or end the softmax's range.
enum class Special { kNone, kHuge, kNan, kInfinite, kAbsent };

struct Case {
  int64_t n, c, t;
  bool classes_last;  // side by side
  bool masked = false, mean = false;
  Special special = Special::kNone;
  // Of every token; negative: drawn.
  double uniform = -1;
};

// Memory of a tensor [n, c, t], elements apart.
ClassStrides strides_of(const Case& s, int64_t step) {
  if (s.classes_last) return {s.t * s.c * step, 1, s.c};
  // Positions side by side, or the samples where there is one.
  if (s.t == 1) return {step, s.n * step, 1};
  return {s.c * s.t * step, s.t * step, step};
}

template <typename In, typename T>
void sampled(const char* type, const Case& s, int processors) {
  multiprocessor_count_is(processors);
  const int64_t size = s.n * s.c * s.t, step = 3, uniform_step = 2;
  const ClassStrides in = strides_of(s, step), to = strides_of(s, 1);
  const Memory<In> logits(size * step), out(size);
  const Memory<double> uniform(s.n * s.t * uniform_step);
  const Memory<int64_t> targets(s.n * s.t), terms(s.n);
  const auto place = [&](const ClassStrides& strides, int64_t n, int64_t k, int64_t t) {
    return n * strides.sample + k * strides.label + t * strides.position;
  };
  std::uniform_real_distribution<double> even;
  for (int64_t n = 0; n < s.n; ++n) {
    terms[n] = s.mean ? 1 + n % 3 : 1;
    for (int64_t t = 0; t < s.t; ++t) {
      const int64_t index = n * s.t + t;
      targets[index] = s.masked && index % 3 == 1 ? kIgnored : index % s.c;
      uniform[index * uniform_step] = s.uniform >= 0 ? s.uniform : 0.999 * even(generator());
      for (int64_t k = 0; k < s.c; ++k) {
        double value = 2 * normal();
        const bool one = k == s.c / 2;
        if (s.special == Special::kHuge) value *= 1e4;
        if (s.special == Special::kNan && one) value = std::nan("");
        if (s.special == Special::kInfinite && one) value = INFINITY;
        if (s.special == Special::kAbsent && k % 2 == 1) value = -INFINITY;
        logits[place(in, n, k, t)] = store<In>(value);
      }
    }
  }
  SampledCrossEntropy<In, T> call{};
  call.logits = logits.data(), call.out = out.data();
  call.samples = s.n, call.classes = s.c, call.positions = s.t;
  call.logit_strides = in, call.out_strides = to;
  call.uniform = uniform.data(), call.uniform_stride = uniform_step;
  if (s.masked) call.targets = targets.data();
  call.target_sample_stride = s.t, call.target_position_stride = 1;
  call.ignore_index = kIgnored;
  if (s.mean) call.terms = terms.data();
  call.term_stride = 1;
  call.alpha = 0.75;
  const Work<T> work = call.plan();
  bool good = work.workspace == 0 && work.run(nullptr, nullptr) == cudaSuccess;

  double worst = 0;
  std::vector<double> p(static_cast<size_t>(s.c));
  for (int64_t n = 0; n < s.n; ++n) {
    const double scale = 0.75 / std::sqrt(static_cast<double>(s.mean ? terms[n] : 1));
    for (int64_t t = 0; t < s.t; ++t) {
      const int64_t index = n * s.t + t;
      const auto found = [&](int64_t k) { return value_of(out[place(to, n, k, t)]); };
      if (s.masked && targets[index] == kIgnored) {
        for (int64_t k = 0; k < s.c; ++k) good = good && found(k) == 0;
        continue;
      }
      if (s.special == Special::kNan || s.special == Special::kInfinite) {
        for (int64_t k = 0; k < s.c; ++k) good = good && std::isnan(found(k));
        continue;
      }
      double largest = -INFINITY, total = 0;
      for (int64_t k = 0; k < s.c; ++k) {
        largest = std::max(largest, value_of(logits[place(in, n, k, t)]));
      }
      for (int64_t k = 0; k < s.c; ++k) {
        p[k] = std::exp(value_of(logits[place(in, n, k, t)]) - largest);
        total += p[k];
      }
      // No number here lies within rounding of a class's edge.
      int64_t drawn = s.c - 1;
      double up_to = 0;
      for (int64_t k = s.c - 1; k >= 0 && p[k] == 0; --k) drawn = k - 1;
      for (int64_t k = 0; k < s.c; ++k) {
        up_to += p[k] / total;
        if (up_to > uniform[index * uniform_step]) {
          drawn = k;
          break;
        }
      }
      for (int64_t k = 0; k < s.c; ++k) {
        const double expected = scale * (p[k] / total - (k == drawn ? 1 : 0));
        const double difference = std::fabs(found(k) - expected);
        worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
      }
    }
  }
  if (!good) worst = INFINITY;
  const double limit = sizeof(In) == 8 ? 1e-13 : sizeof(In) == 4 ? 1e-6 : 4e-3;
  const char* specials[] = {"", " huge", " nan", " infinite", " absent"};
  report(std::string("sampled_cross_entropy ") + type + " [" + std::to_string(s.n) + ", " +
             std::to_string(s.c) + ", " + std::to_string(s.t) + "]" +
             (s.classes_last ? " classes last" : "") + (s.masked ? " masked" : "") +
             (s.mean ? " mean" : "") + specials[static_cast<int>(s.special)] +
             (s.uniform >= 0 ? " at " + std::to_string(s.uniform) : ""),
         worst, limit);
}

template <typename In, typename T>
void in_all_orders(const char* type) {
  for (const bool classes_last : {true, false}) {
    sampled<In, T>(type, {9, 10, 1, classes_last, true}, 1);
    sampled<In, T>(type, {3, 33, 5, classes_last, true, true}, 2);
    sampled<In, T>(type, {2, 70, 3, classes_last, false, true, Special::kAbsent}, 2);
  }
}

// A class that is nearly certain and drawn: 1 - p to all digits, which p - 1 has not.
void certain() {
  multiprocessor_count_is(1);
  const Memory<float> logits(2), out(2);
  const Memory<double> uniform(1);
  logits[0] = 20, logits[1] = 0, uniform[0] = 0.5;
  SampledCrossEntropy<float, float> call{};
  call.logits = logits.data(), call.out = out.data();
  call.samples = call.positions = 1, call.classes = 2;
  call.uniform = uniform.data(), call.uniform_stride = 1, call.alpha = 1;
  double worst = 0;
  for (const bool rows : {true, false}) {
    // Of one token the other strides are never used.
    call.logit_strides = {0, 1, 0}, call.out_strides = {0, 1, 0};
    const Memory<float> apart(3);
    if (!rows) {
      apart[0] = 20, apart[2] = 0;
      call.logits = apart.data(), call.logit_strides.label = 2;
    }
    if (call.plan().run(nullptr, nullptr) != cudaSuccess) worst = INFINITY;
    const double expected = -1 / (1 + std::exp(20.0));
    worst = std::max(worst, std::fabs(out[0] / expected - 1));
    worst = std::max(worst, std::fabs(out[1] / -expected - 1));
  }
  report("sampled_cross_entropy of a class nearly certain", worst, 1e-6);
}

}  // namespace

void check_sampled_cross_entropy(bool few) {
  sampled<float, float>("float", {9, 10, 1, true, true}, 1);
  sampled<float, float>("float", {3, 33, 5, false, true, true}, 2);
  if (few) return;
  in_all_orders<float, float>("float");
  in_all_orders<double, double>("double");
  in_all_orders<BFloat16, float>("bfloat16");
  in_all_orders<Float16, float>("float16");
  certain();
  const double last = 1 - std::ldexp(1.0, -24);
  for (const bool classes_last : {true, false}) {
    const auto some = [&](int64_t n, int64_t c, int64_t t, Special special, double uniform) {
      sampled<float, float>("float", {n, c, t, classes_last, true, false, special, uniform}, 1);
    };
    some(5, 1, 1, Special::kNone, -1);
    some(1, 1, 1, Special::kNone, last);
    some(4, 32, 1, Special::kNone, 0);
    some(4, 64, 2, Special::kNone, last);
    // The last class has no probability, and must not be drawn.
    some(4, 34, 2, Special::kAbsent, last);
    some(4, 34, 2, Special::kAbsent, 0);
    // No number of [0, 1), but where rounding leaves no class, it is the last one that has any.
    some(4, 70, 2, Special::kAbsent, 1);
    some(5, 300, 2, Special::kHuge, -1);
    some(3, 40, 2, Special::kNan, -1);
    some(3, 5, 2, Special::kInfinite, -1);
    // More tokens than one round of a grid takes.
    some(classes_last ? 150 : 1100, 3, 4, Special::kNone, -1);
    sampled<BFloat16, float>("bfloat16", {2, 5, 1, classes_last, false, false, Special::kNan}, 1);
    sampled<Float16, float>("float16", {2, 5, 1, classes_last, false, false, Special::kNan}, 1);
  }
}

}  // namespace hesskern::cuda::check
