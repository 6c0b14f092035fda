// The arguments of the norms' launchers. Plain C++: shared by launch/ (torch) and the .cu files (CUDA).
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace i2i {
namespace cuda {

// A map of T [images, channels, pixels], or [images, pixels, channels] if channels_last. Its address, like those of all
// maps of a pass, is a multiple of 16.
struct Map {
  int64_t images, channels, pixels;
  Dtype dtype;
  bool channels_last;
};

// S [images, channels] at any strides, 0 included.
struct Strided {
  const void* data;
  int64_t image_stride, channel_stride;
};

// What makes the norm of a map affine in every channel. Without layer statistics it is instance_norm_act's: gamma 1,
// beta 0, rho 1, and those are not read.
struct NormParameters {
  const void* instance_statistics;  // [images, channels, 2] S: mean, 1 / deviation
  const void* layer_statistics;     // [images, 2] S, or null
  Strided gamma, beta, rho;
};

struct NormForward {
  Map map;
  const void* x;
  const void* residual;  // or null
  NormParameters parameters;
  double eps, slope;
  bool unbiased;
  void* y;
  void* instance_statistics;
  void* layer_statistics;  // or null
  void* partials;          // workspace [images, splits, channels, 2] S
};

struct NormBackward {
  Map map;
  const void* grad;
  const void* x;
  NormParameters parameters;
  double slope;
  bool unbiased;
  void* grad_x;
  // [images, channels] S twice and [channels] S; unused without layer statistics.
  void *grad_gamma, *grad_beta, *grad_rho;
  void* partials;      // workspace [images, splits, channels, 2] S
  void* coefficients;  // workspace [images, channels, 3] S
  void* rho_terms;     // workspace [images, channels] S; unused without layer statistics
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

// Elements of a 16-byte vector.
inline int64_t vector_size(Dtype dtype) { return 16 / element_size(dtype); }

// The 16-byte vectors whose loads a thread has in flight.
constexpr int kInFlight = 4;

// The threads of a block for so many vectors: enough to have them all in flight, if `most` are. Two warps at least, as
// a multiprocessor has room for more warps than blocks.
inline int threads_for(int64_t vectors, int most) {
  int threads = 64;
  while (threads < most && threads * kInFlight < vectors) threads *= 2;
  return threads;
}

// How the passes over a map cut it: into blocks of channels and splits of pixels, by constants and its shape alone, so
// that sums are the same on every device and for every number of images.
struct Cut {
  static constexpr int kMostThreads = 256;
  int lanes, rows;         // of threads: along a plane and 1, or along channels and pixels
  int64_t channel_blocks;  // 1 channel each in a contiguous map
  int64_t splits;
};

inline Cut cut_planes(const Map& map) {
  // At 8 vectors for each thread, what a block does by itself is much more than what it does for the sums of all.
  constexpr int64_t kVectors = 8 * Cut::kMostThreads;
  const int64_t vectors = ceil_divide(map.pixels, vector_size(map.dtype));
  const int64_t splits = ceil_divide(vectors, kVectors);
  return {threads_for(ceil_divide(vectors, splits), Cut::kMostThreads), 1, map.channels, splits};
}

inline Cut cut_pixels(const Map& map) {
  constexpr int64_t kPixels = 256;
  // More blocks for one image would only lengthen the merging of their sums.
  constexpr int64_t kBlocksOfAnImage = 512;
  const bool vectors = map.channels % vector_size(map.dtype) == 0;
  const int64_t packs = vectors ? map.channels / vector_size(map.dtype) : map.channels;
  // A row of lanes reads whole 128-byte lines of vectors, or one warp's worth of lone elements.
  int lanes = vectors ? 8 : 32;
  while (lanes / 2 >= packs) lanes /= 2;
  const int64_t blocks = ceil_divide(packs, lanes);
  const int64_t most = std::max<int64_t>(1, kBlocksOfAnImage / blocks);
  return {lanes, Cut::kMostThreads / lanes, blocks, std::min(ceil_divide(map.pixels, kPixels), most)};
}

inline Cut cut_of(const Map& map) { return map.channels_last ? cut_pixels(map) : cut_planes(map); }

}  // namespace cuda
}  // namespace i2i
