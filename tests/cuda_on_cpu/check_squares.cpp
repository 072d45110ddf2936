// squares.cu on the CPU.
#include "check.h"
#include "checks.h"
#include "squares.h"

namespace hesskern::cuda::check {

namespace {

struct Case {
  int64_t count, size;
  int processors = 2;
  // Elements before the first one, where memory is not aligned.
  int64_t offset = 0;
};

template <typename T>
void squares(const char* type, const Case& s) {
  multiprocessor_count_is(s.processors);
  const Memory<T> rows(s.offset + s.count * s.size), sum(s.offset + s.size);
  std::vector<double> expected(static_cast<size_t>(s.size));
  for (int64_t i = 0; i < s.size; ++i) {
    sum[s.offset + i] = store<T>(normal());
    expected[static_cast<size_t>(i)] = static_cast<double>(sum[s.offset + i]);
  }
  for (int64_t k = 0; k < s.count; ++k) {
    for (int64_t i = 0; i < s.size; ++i) {
      T& element = rows[s.offset + k * s.size + i];
      element = store<T>(normal());
      expected[static_cast<size_t>(i)] +=
          static_cast<double>(element) * static_cast<double>(element);
    }
  }
  const SquareSum<T> call{sum.data() + s.offset, rows.data() + s.offset, s.count, s.size};
  const Work<T> work = call.plan();
  const Memory<T> workspace(work.workspace);
  const bool ran = work.run(workspace.data(), nullptr) == cudaSuccess;
  const double error = relative_error(
      s.size, [&](int64_t i) { return static_cast<double>(sum[s.offset + i]); },
      [&](int64_t i) { return expected[static_cast<size_t>(i)]; });
  report(std::string("squares ") + type + " [" + std::to_string(s.count) + ", " +
             std::to_string(s.size) + "] on " + std::to_string(s.processors) +
             (s.offset != 0 ? " unaligned" : "") + (work.workspace > 0 ? " in parts" : ""),
         ran ? error : INFINITY, limit_of<T>());
}

template <typename T>
void in_all_shapes(const char* type) {
  squares<T>(type, {5, 64});
  squares<T>(type, {5, 63});
  squares<T>(type, {200, 12, 132});
  squares<T>(type, {200, 7, 132});
  squares<T>(type, {130, 2048, 1});
  squares<T>(type, {3, 1});
  squares<T>(type, {1, 3000, 1});
  squares<T>(type, {65, 32, 2, 1});
  squares<T>(type, {0, 8});
  squares<T>(type, {8, 0});
}

}  // namespace

void check_squares(bool few) {
  squares<float>("float", {70, 40});
  squares<float>("float", {300, 9, 132});
  if (few) return;
  in_all_shapes<float>("float");
  in_all_shapes<double>("double");
  // Equal terms of one sign, whose rounding errors do not cancel.
  multiprocessor_count_is(1);
  const int64_t count = 100'000;
  const Memory<float> rows(count), sum(1);
  for (int64_t k = 0; k < count; ++k) rows[k] = 1.1f;
  sum[0] = 0;
  const Work<float> work = SquareSum<float>{sum.data(), rows.data(), count, 1}.plan();
  const Memory<float> workspace(work.workspace);
  const bool ran = work.run(workspace.data(), nullptr) == cudaSuccess;
  const double expected = static_cast<double>(count) * 1.1f * 1.1f;
  report("squares of equal terms", ran ? std::fabs(sum[0] / expected - 1) : INFINITY, 1e-6);
}

}  // namespace hesskern::cuda::check
