// Tiles of rows in shared memory: how they are laid out, loaded and rounded.
#pragma once

#include "patch_nce.cuh"

namespace i2i {
namespace cuda {
namespace nce {

// Rows of a tile in shared memory stand kChannels elements and these bytes apart. That puts the 16-byte chunks of eight
// adjacent rows, which ldmatrix reads at once, on different banks; and it holds the row's RowRecord.
constexpr int kPadBytes = sizeof(RowRecord<float>);
constexpr int kChunkBytes = 16;

template <typename Element, int kChannels>
constexpr int kRowBytes = kChannels * static_cast<int>(sizeof(Element)) + kPadBytes;

// One side of a group, as a block sees it. It stays in registers beside the sums, which leave few: so 32 bits wherever
// they do.
template <typename Element>
struct Rows {
  const Element* features;
  int first_record;
  int stride;
  int count;
  bool in_chunks;  // rows are cut into 16-byte chunks, none of which reaches beyond its row
};

template <typename Element>
__device__ __forceinline__ Rows<Element> rows_of(const Side& side, int64_t group, int channels) {
  const Element* features = static_cast<const Element*>(side.features);
  const uint64_t misaligned = reinterpret_cast<uint64_t>(features) | (side.stride * sizeof(Element)) |
                              (static_cast<uint64_t>(channels) * sizeof(Element));
  return {features + group * side.rows * side.stride, static_cast<int>(side.first + group * side.rows),
          static_cast<int>(side.stride), static_cast<int>(side.rows), misaligned % kChunkBytes == 0};
}

// Calls body(row, chunk) for those 16-byte chunks of a tile that this thread looks after: all at one place of their
// rows.
template <int kRows, int kChunks, typename Body>
__device__ __forceinline__ void for_own_chunks(Body body) {
  static_assert(kThreads % kChunks == 0 && kRows % (kThreads / kChunks) == 0, "all threads look after equally many");
#pragma unroll 4
  for (int row = threadIdx.x / kChunks; row < kRows; row += kThreads / kChunks) body(row, threadIdx.x % kChunks);
}

// Begins to copy rows `first` and on, kChannels channels from `channel` on, and the rows' records. Rows beyond the
// group and channels beyond the last are zeros.
template <typename Element, int kChannels, int kRows>
__device__ __forceinline__ void load_tile(unsigned char* tile, const Rows<Element>& rows,
                                          const RowRecord<float>* records, int first, int channel, int channels) {
  constexpr int kStride = kRowBytes<Element, kChannels>, kWidth = Vector<Element>::kSize;
  for_own_chunks<kRows, kChannels / kWidth>([&](int row, int chunk) {
    unsigned char* target = tile + row * kStride + chunk * kChunkBytes;
    const int here = channel + chunk * kWidth;
    const int valid = first + row < rows.count ? channels - here : 0;
    const Element* source = rows.features + (valid > 0 ? static_cast<int64_t>(first + row) * rows.stride + here : 0);
    if (rows.in_chunks) {
      copy_async16(target, source, valid > 0);
    } else {
      for (int i = 0; i < kWidth; i++) reinterpret_cast<Element*>(target)[i] = i < valid ? source[i] : Element{};
    }
  });
  if (threadIdx.x < kRows) {
    const bool valid = first + static_cast<int>(threadIdx.x) < rows.count;
    copy_async16(tile + threadIdx.x * kStride + kChannels * sizeof(Element),
                 records + (valid ? rows.first_record + first + threadIdx.x : 0), valid);
  }
}

// Rounds the chunks of a tile that this thread copied itself, which it may do before the barrier.
template <typename Product, int kChannels, int kRows>
__device__ __forceinline__ void round_tile(unsigned char* tile) {
  if constexpr (Product::kRoundsTiles) {
    for_own_chunks<kRows, kChannels / Vector<float>::kSize>([&](int row, int chunk) {
      float* values = reinterpret_cast<float*>(tile + row * kRowBytes<float, kChannels> + chunk * kChunkBytes);
      Vector<float> vector = load_vector(values);
      for (float& value : vector.v) value = __uint_as_float(round_to_tf32(value));
      store_vector(values, vector);
    });
  }
}

template <typename Element, int kChannels>
__device__ __forceinline__ const RowRecord<float>& record_of(const unsigned char* tile, int row) {
  return *reinterpret_cast<const RowRecord<float>*>(tile + row * kRowBytes<Element, kChannels> +
                                                    kChannels * sizeof(Element));
}

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
