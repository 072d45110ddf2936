#pragma once

#include "cuda/core/axis.h"
#include "cuda/core/work.h"
#include "samples.h"

namespace hesskern::cuda {

// The Gram matrix of weighted samples that the copy engine brings, for a block whose warps either
// make operands or multiply them (roles.cu): compute capability 9.0 alone. slabs: how
// the samples lie in memory; the plan cuts them into slabs anew.

// Whether it is the faster one of the current device, and fits.
template <typename In>
bool roles_pay(const SampleSlabs<In>& slabs);

template <typename In>
Work<float> plan_roles(const SampleSlabs<In>& slabs, const SymmetricSum<float>& sum);

}  // namespace hesskern::cuda
