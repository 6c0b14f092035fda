// instance_norm_act on contiguous maps, in one launch: a block has a whole plane.
#pragma once

#include "norm.h"

namespace i2i {
namespace cuda {

// Whether a block for every plane serves this map better than the passes of adalin.h.
bool suits_plane_blocks(const Map& map);

// Both return the cudaError, 0 if all is well, and need no workspace. `stream` is a cudaStream_t.
int instance_norm_planes(const NormForward& pass, void* stream);
int instance_norm_planes_backward(const NormBackward& pass, void* stream);

}  // namespace cuda
}  // namespace i2i
