// How the row kernels of PatchNCE go about rows: a warp each, lanes over channels.
#pragma once

#include "patch_nce.cuh"

namespace i2i {
namespace cuda {
namespace nce {

// This warp's number in the grid.
__device__ __forceinline__ int64_t global_warp() { return static_cast<int64_t>(blockIdx.x) * kWarps + warp(); }

inline dim3 blocks_for_warps(int64_t warps) { return dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)); }

inline int64_t query_count(const Layers& layers) {
  const Side& last = layers.layer[layers.count - 1].queries;
  return last.first + layers.groups * last.rows;
}

inline int64_t key_count(const Layers& layers) {
  const Side& last = layers.layer[layers.count - 1].keys;
  return last.first + layers.groups * last.rows;
}

// Where row `index` of all queries or all keys stands.
struct Place {
  int layer;
  int64_t group, row;
};

template <bool kKeys>
__device__ __forceinline__ const Side& side_of(const Layer& layer) {
  return kKeys ? layer.keys : layer.queries;
}

template <bool kKeys>
__device__ __forceinline__ Place find_row(const Layers& layers, int64_t index) {
  int layer = 0;
  while (layer + 1 < layers.count && index >= side_of<kKeys>(layers.layer[layer + 1]).first) layer++;
  const Side& side = side_of<kKeys>(layers.layer[layer]);
  return {layer, (index - side.first) / side.rows, (index - side.first) % side.rows};
}

// A row's elements, and its number among all rows of its side.
template <typename T>
__device__ __forceinline__ const T* elements(const Side& side, int64_t group, int64_t row) {
  return static_cast<const T*>(side.features) + (group * side.rows + row) * side.stride;
}

__device__ __forceinline__ int64_t number_of(const Side& side, int64_t group, int64_t row) {
  return side.first + group * side.rows + row;
}

// The sum over the lanes, the same in all of them.
template <typename S>
__device__ __forceinline__ S warp_sum(S value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

template <typename T>
__device__ __forceinline__ Accumulate<T> dot(const T* a, const T* b, int channels) {
  Accumulate<T> sum = 0;
#pragma unroll 4
  for (int c = lane(); c < channels; c += kWarpSize) sum += to_accumulate(a[c]) * to_accumulate(b[c]);
  return warp_sum(sum);
}

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
