// Launchers of the gather: torch-free; each returns a cudaError, 0 if all is well.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace i2i {
namespace cuda {

struct PatchMap {
  int64_t images, channels, height_x_width;
  bool channels_last;
};

// features: the map; ids [P]; out [N, P, C]; all of words of word_bytes (2, 4, 8).
int launch_patch_gather(const PatchMap& map, const void* features, const int64_t* ids, int64_t places, void* out,
                        int word_bytes, void* stream);

// grad [N, P, C]; out: the gradient map, every element of which is written once. chains [height_x_width + P] is zero
// and scratch.
int launch_patch_gather_backward(const PatchMap& map, const void* grad, const int64_t* ids, int64_t places, void* out,
                                 Dtype dtype, int* chains, void* stream);

}  // namespace cuda
}  // namespace i2i
