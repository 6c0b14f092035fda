// What the kernels of PatchNCE share. With queries q_i and keys k_j as they are, the unit rows are x / (|x| + eps), and
//
//   forward       row i sums p_ij = exp(s_ij / temperature) and p_ij k_j over the keys of its group but its positive;
//   key gradient  row j sums w_i p_ij q_i over the queries of its group but the one whose positive it is.
//
// Either is one pass of a block of rows over the columns of its group (patch_nce_similarities.cu). The positive stays
// out of the sums and is added by the kernels before and after (patch_nce_rows.cu), in S throughout: the loss and the
// gradient of a row that is nearly solved are small differences from it, and keep their digits that way.
// Similarities are in units of log2: exp(s / temperature) = exp2(level).
#pragma once

#include "device.cuh"
#include "patch_nce.h"

namespace i2i {
namespace cuda {
namespace nce {

constexpr int kThreads = 128;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTileRows = 64;
// Of one tile; more channels are taken in several steps.
constexpr int kTileChannels = 256;
constexpr int column_tile(Math math) { return math == Math::kBf16 ? 64 : math == Math::kTf32 ? 32 : 16; }
constexpr double kLn2 = 0.6931471805599453;
// A row's sums are taken relative to an anchor, and rescaled when a level exceeds it by more than this: exp2 stays
// below 256, and few rows are ever rescaled.
constexpr float kAnchorSlack = 8;

__device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarpSize; }

// What is known of a row before it meets others.
template <typename S>
struct alignas(16) RowRecord {
  S inverse;  // 1 / (|x| + eps); 0 for a row of zeros, which so stays zero and gets no gradient
  S stretch;  // (|x| + eps) / |x|
  S level;    // of a query: forward, the level of its positive; key gradient, log2 of the sum over all its classes
  S weight;   // of a query in the key gradient: the gradient of its loss, times inverse
};

// A row's sum of exp2(level - anchor) over some of its columns.
template <typename S>
struct Partial {
  S anchor, sum;
};

// Which block does what, and where it leaves its results. Rows are those of the queries in the forward, of the keys in
// the key gradient; columns are the others.
struct Schedule {
  int64_t first_block[kMaxLayers + 1];
  int64_t
      first_partial[kMaxLayers];  // split s of row r in the layer leaves its results at first_partial + s * rows + r
  int splits[kMaxLayers];         // into which the columns are cut
  int channel_groups;             // of kTileChannels outputs each, by blocks of their own
};

template <typename S>
struct Workspace {
  RowRecord<S>* queries;
  RowRecord<S>* keys;
  Partial<S>* partials;  // [partial rows, channel_groups], null in the key gradient
  S* directions;         // [partial rows, direction_stride]: the sums of rows, null without gradient
};

// Even, so that two adjacent elements can be stored as one.
__host__ __device__ __forceinline__ int64_t direction_stride(int channels) { return channels + (channels & 1); }

// The launchers of each file; T and S by the Math, which is not kDouble for launch_similarities.
template <typename T>
int launch_statistics(const Layers& layers, const RowWeights& weights, const Workspace<Accumulate<T>>& workspace,
                      cudaStream_t stream);
template <typename T>
int launch_finish(const Layers& layers, const Schedule& schedule, double extra_class, const ForwardOutputs& outputs,
                  const Workspace<Accumulate<T>>& workspace, cudaStream_t stream);
template <typename T>
int launch_key_finish(const Layers& layers, const Schedule& schedule, const RowWeights& weights, void* gradient,
                      const Workspace<Accumulate<T>>& workspace, cudaStream_t stream);
int launch_similarities(const Layers& layers, Math math, bool key_gradient, const Schedule& schedule,
                        const Workspace<float>& workspace, cudaStream_t stream);
int launch_similarities(const Layers& layers, bool key_gradient, const Workspace<double>& workspace,
                        cudaStream_t stream);

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
