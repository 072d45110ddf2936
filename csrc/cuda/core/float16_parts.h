// float32 numbers as the sum of two float16 (hi/lo): products of float32 accuracy on 16-bit tensor
// cores.
//
// v scaled by a power of two s with |s v| < 2^16 is high + low, high = float16(s v) and
// low = float16(s v - high), to 2^-24 of itself and never worse than 2^-40 of the largest value
// under the same scale. Of the four products of two such numbers three are taken; low times low is
// below 2^-24. Against three products of tf32 numbers that is half the tensor cores' time and half
// the shared memory. The scale belongs to what is multiplied together and is undone in float32
// arithmetic, so that the range of float16 is no limit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "warp.h"

namespace hesskern::cuda {

// Two scaled values to a word of high and a word of low parts, x in the lower halves.
__device__ inline void split_pair(float x, float y, uint32_t& high, uint32_t& low) {
  high = float16_pair(x, y);
  float high_x, high_y;
  floats_of_pair(high, high_x, high_y);
  low = float16_pair(x - high_x, y - high_y);
}

// value 2^e, to within float's range for |e| <= 252; beyond, as for 252.
__device__ inline float times_power(float value, int e) {
  const auto within = [](int x) { return x < -126 ? -126 : x > 126 ? 126 : x; };
  const int first = within(e), second = within(e - first);
  return value * float_of(static_cast<uint32_t>(first + 127) << 23) *
         float_of(static_cast<uint32_t>(second + 127) << 23);
}

// The largest power of two in a finite magnitude other than zero, by its bits.
__device__ inline int exponent_of_bits(uint32_t bits) {
  const int biased = static_cast<int>(bits >> 23);
  if (biased > 0) return biased - 127;
  int size = 0;
  while (bits >> size != 0) ++size;
  return size - 150;
}

// Of columns whose largest magnitude has these bits: 2^exponent times it is below 2^(15 - room).
// With room it is a guess from some rows: where they are zero, others must show.
__device__ inline int packed_exponent(uint32_t bits, int room) {
  if (bits == 0) return room == 0 ? 0 : 150;
  return bits >= 0x7f800000u ? 0 : 14 - room - exponent_of_bits(bits);
}

// Two powers of two whose product is one: values times to_half fit float16.
struct Scale {
  float to_half, back;
};

// A scale for all values of a warp whose magnitudes are at most largest_of_lane in each lane, or
// differences of two such values: they become at most 2^15. Not more than 2^63, so that back^2 is
// a normal number: smaller values have no squares in float32. A NaN stays where it is; under an
// infinity the others vanish, and back is NaN so that nothing of this tile looks right.
__device__ inline Scale scale_for(float largest_of_lane) {
  constexpr int kOne = 127, kTop = 13, kMost = 63;
  const int exponent = static_cast<int>(warp_max(bits_of(largest_of_lane)) >> 23);
  const int down = exponent - kTop > kOne - kMost ? exponent - kTop : kOne - kMost;
  Scale scale;
  scale.to_half = float_of(static_cast<uint32_t>(2 * kOne - down) << 23);
  scale.back =
      exponent == 255 ? float_of(0x7fffffffu) : float_of(static_cast<uint32_t>(down) << 23);
  return scale;
}

}  // namespace hesskern::cuda
