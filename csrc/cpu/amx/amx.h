// Products of float32 matrices by the tile unit (AMX) that some x86 processors have. It multiplies
// bfloat16 and sums in float32, sixteen times as many products in a cycle as AVX-512.
//
// A float32 has 24 significant bits and is exactly the sum of three bfloat16 of eight,
// x = x1 + x2 + x3, each a rounding of what the ones before leave. Of the nine products of two such
// sums the six that count are taken,
//   x y ~ x1 y1 + x1 y2 + x2 y1 + x1 y3 + x2 y2 + x3 y1;
// the others come to 2^-24 |x y| at most, an error as of one rounding of a float32 product
// (Henry, Tang, Heinecke: Leveraging the bfloat16 artificial intelligence datatype for
// higher-precision computations, 2019).
//
// The unit takes numbers below 2^-126 as zeros, and rounding the largest overflows. Operands whose
// largest number is so small or so large that this could show are refused by split_*(), and the
// caller multiplies them another way. What else is lost belongs to products below 2^-109, beside
// which there are some of 2^-80 and more.
#pragma once

#include <cstdint>

namespace hesskern::cpu::amx {

// Whether the machine has the unit, the system lends it to this process, and HESSKERN_SIMD does
// not name a lesser instruction set.
bool available();

// Columns of a panel, and rows of an operand that one step takes.
constexpr int64_t kPanel = 32, kStep = 32;
// bfloat16 numbers that a panel takes for one step: its parts, in two tiles each.
constexpr int64_t kStepSize = 3 * kPanel * kStep;

inline int64_t steps(int64_t rows) {
  return (rows + kStep - 1) / kStep;
}

// Lends the unit's registers to this thread, and gives them back as they were configured.
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  alignas(64) unsigned char before_[64];
};

// How numbers split: not at all, as the largest is not finite or products could leave float32's
// range; into a first part alone, as all of them are bfloat16; or into all parts.
enum class Split { refused, first, all };

// The split of several panels together.
inline Split together(Split a, Split b) {
  if (a == Split::refused || b == Split::refused) return Split::refused;
  return a == Split::first && b == Split::first ? Split::first : Split::all;
}

// One step of a panel as the left and the right operand, filled up with zeros; either may be null,
// and nothing is promised of them where the numbers are refused.
// x [rows, columns], rows ld apart: up to kStep rows, over which products sum, of up to kPanel
// columns.
Split split_columns(uint16_t* left, uint16_t* right, const float* x, int64_t ld, int64_t rows,
                    int64_t columns);
// The same of the transposed matrix: up to kPanel rows of up to kStep columns.
Split split_rows(uint16_t* left, uint16_t* right, const float* x, int64_t ld, int64_t rows,
                 int64_t columns);

// sum [kPanel, kPanel] += left^T right over so many steps, or the squares of its elements. The
// product is summed by itself, its small terms first; split: of both operands together. On a thread
// that has a Session.
void add_product(float* sum, const uint16_t* left, const uint16_t* right, int64_t steps,
                 Split split);
void add_squares(float* sum, const uint16_t* left, const uint16_t* right, int64_t steps,
                 Split split);

}  // namespace hesskern::cpu::amx
