// The norms in passes over the whole map, for either layout: partial sums, statistics or coefficients, apply. adalin
// runs in them; so does instance_norm_act where a block cannot have a plane for itself.
#pragma once

#include "norm.h"

namespace i2i {
namespace cuda {

// Both return the cudaError, 0 if all is well. `stream` is a cudaStream_t.
int norm_forward(const NormForward& pass, void* stream);
int norm_backward(const NormBackward& pass, void* stream);

}  // namespace cuda
}  // namespace i2i
