// The two layouts of a map, as the passes see them: which channels a thread has, how it walks over its block's part of
// them, and how the block's sums come together.
#pragma once

#include "norm.h"
#include "walk.cuh"

namespace i2i {
namespace cuda {

struct Range {
  int64_t begin, end;
};

// Part `split` of the pixels; but for the last ones, parts begin and end at multiples of `multiple`.
__device__ __forceinline__ Range split_range(int64_t pixels, int64_t splits, int64_t split, int64_t multiple) {
  const int64_t size = ((pixels + splits - 1) / splits + multiple - 1) / multiple * multiple;
  const int64_t begin = split * size, end = begin + size;
  return {begin < pixels ? begin : pixels, end < pixels ? end : pixels};
}

// A block has a part of one channel's plane.
template <typename T>
struct Planes {
  using Element = T;
  static constexpr int kChannels = 1;
  static constexpr int kMultiple = Vector<T>::kSize;

  int64_t image, channel, split;
  int64_t first_pixel;  // the channel's first element
  Range range;

  __device__ __forceinline__ Planes(const Map& map, const Cut& cut, int64_t block) {
    const int64_t plane = block / cut.splits;
    image = plane / map.channels;
    channel = plane % map.channels;
    split = block % cut.splits;
    first_pixel = plane * map.pixels;
    range = split_range(map.pixels, cut.splits, split, kMultiple);
  }

  template <Cache kCache, int kTensors, typename F>
  __device__ __forceinline__ void visit(const T* const (&tensors)[kTensors], const F& f) const {
    const Span<T> span(first_pixel + range.begin, first_pixel + range.end);
    Streamed<T, kTensors>{tensors, span}.template visit<kTensors, kCache>(f);
  }

  // The block's sums, in the thread for which it returns true.
  template <typename Sums>
  __device__ __forceinline__ bool reduce(Sums& sums) const {
    sums = reduce_block(sums);
    return threadIdx.x == 0;
  }

  // The distance between the first pixels of two channels.
  __device__ __forceinline__ static int64_t channel_stride(const Map& map) { return map.pixels; }
};

// A block has some pixels of a row of channels, kWidth for each thread along threadIdx.x.
template <typename T, int kWidth>
struct Pixels {
  using Element = T;
  static constexpr int kChannels = kWidth;
  static constexpr int kMultiple = 1;

  int64_t image, channel, split;
  bool has_channel;
  int64_t first_pixel;
  Range range;
  int64_t stride;

  __device__ __forceinline__ Pixels(const Map& map, const Cut& cut, int64_t block) {
    const int64_t part = block / cut.channel_blocks;
    image = part / cut.splits;
    split = part % cut.splits;
    channel = (block % cut.channel_blocks * cut.lanes + threadIdx.x) * kWidth;
    has_channel = channel < map.channels;
    // Lanes behind the last channel keep company at the barriers; they read the first one's parameters and no pixels.
    if (!has_channel) channel = 0;
    stride = map.channels;
    first_pixel = image * map.pixels * stride + channel;
    range = split_range(map.pixels, cut.splits, split, kMultiple);
    if (!has_channel) range.end = range.begin;
  }

  template <Cache kCache, int kTensors, typename F>
  __device__ __forceinline__ void visit(const T* const (&tensors)[kTensors], const F& f) const {
    const Walk walk{first_pixel + range.begin * stride, stride, static_cast<int>(threadIdx.y),
                    static_cast<int>(range.end - range.begin), static_cast<int>(blockDim.y)};
    stream<kTensors, kCache, kWidth>(tensors, walk, f);
  }

  template <typename Sums>
  __device__ __forceinline__ bool reduce(Sums& sums) const {
    sums = reduce_rows(sums);
    return threadIdx.y == 0 && has_channel;
  }

  __device__ __forceinline__ static int64_t channel_stride(const Map&) { return 1; }
};

}  // namespace cuda
}  // namespace i2i
