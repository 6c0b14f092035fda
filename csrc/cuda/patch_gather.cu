// Rows of a feature map at chosen places, and the gradient map: deterministic, and every byte of it written once.
//
// The gradient map is far larger than the gradients that go into it, so backward walks over the map and asks at each
// place which gradients belong there. The answer is a chain of ids per place: its first, and for every id the next one
// of the same place, in ascending order, which fixes the order of the sum.
#include <algorithm>

#include "device.cuh"
#include "patch_gather.h"

namespace i2i {
namespace cuda {
namespace {

constexpr int kColumns = 32, kRows = 8, kThreads = kColumns * kRows;  // of a block
constexpr unsigned kMaxGridYZ = 65535;

// What a kernel walks over, each thread along a few columns of one row, for every image.
struct Extent {
  int64_t images, rows, columns;
};

unsigned blocks_for(int64_t count, int block, unsigned most) {
  return static_cast<unsigned>(std::min<int64_t>((count + block - 1) / block, most));
}

dim3 grid_for(const Extent& extent) {
  return dim3(static_cast<unsigned>((extent.rows + kRows - 1) / kRows),
              blocks_for(extent.columns, kColumns, kMaxGridYZ), blocks_for(extent.images, 1, kMaxGridYZ));
}

template <typename Visit>  // (image, row, column)
__device__ __forceinline__ void for_each(const Extent& extent, Visit visit) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y;
  if (row >= extent.rows) return;
  for (int64_t image = blockIdx.z; image < extent.images; image += gridDim.z)
    for (int64_t column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x; column < extent.columns;
         column += static_cast<int64_t>(gridDim.y) * kColumns)
      visit(image, row, column);
}

// Where the word of (image, channel, place) lies.
struct Strides {
  int64_t image, channel, place;
};

Strides strides_of(const PatchMap& map) {
  const int64_t image = map.channels * map.height_x_width;
  return map.channels_last ? Strides{image, 1, map.channels} : Strides{image, map.height_x_width, 1};
}

// An id outside the map ends the kernel, as it does in torch's index_select.
__device__ __forceinline__ int64_t checked(int64_t id, int64_t height_x_width) {
  if (id < 0 || id >= height_x_width) __trap();
  return id;
}

// out [N, P, C]: rows are ids, columns channels.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    gather(Extent extent, Strides strides, int64_t height_x_width, const Word* __restrict__ features,
           const int64_t* __restrict__ ids, Word* __restrict__ out) {
  for_each(extent, [&](int64_t image, int64_t row, int64_t column) {
    const int64_t place = checked(ids[row], height_x_width);
    out[(image * extent.rows + row) * extent.columns + column] =
        features[image * strides.image + column * strides.channel + place * strides.place];
  });
}

// first [H * W] gets P - p for the first id p of a place, so that 0 means none and the maximum is the first; next [P]
// the following id of the same place, or P. One warp per id.
__global__ void __launch_bounds__(kThreads)
    build_chains(const int64_t* __restrict__ ids, int places, int64_t height_x_width, int* __restrict__ first,
                 int* __restrict__ next) {
  const int p = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.y);
  if (p >= places) return;
  const int64_t place = checked(ids[p], height_x_width);
  int following = places;
  for (int other = p + 1 + static_cast<int>(threadIdx.x); other < places; other += kColumns)
    if (ids[other] == place) following = min(following, other);
  for (int distance = kColumns / 2; distance > 0; distance /= 2)
    following = min(following, __shfl_xor_sync(~0u, following, distance));
  if (threadIdx.x != 0) return;
  next[p] = following;
  atomicMax(&first[place], places - p);
}

// The sum of one channel's gradients, [P] at a stride, over the chain that begins at p.
template <typename T>
__device__ __forceinline__ T chain_sum(const T* __restrict__ grad, int64_t stride, const int* __restrict__ next, int p,
                                       int places) {
  if (p == places) return from_accumulate<T>(0);
  Accumulate<T> sum = to_accumulate(grad[p * stride]);
  for (p = next[p]; p < places; p = next[p]) sum += to_accumulate(grad[p * stride]);
  return from_accumulate<T>(sum);
}

// Of T, as many as are written at once.
template <typename T, bool kVector>
struct Piece : Vector<T> {};
template <typename T>
struct Piece<T, false> {
  static constexpr int kSize = 1;
  T v[1];
};

// grad [N, P, C]; out in pieces along its innermost dimension. Rows are channels and columns pieces of places, or with
// kChannelsLast the other way round.
template <typename T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads)
    gradient(Extent extent, const T* __restrict__ grad, int64_t channels, const int* __restrict__ first,
             const int* __restrict__ next, int places, Piece<T, kVector>* __restrict__ out) {
  for_each(extent, [&](int64_t image, int64_t row, int64_t column) {
    Piece<T, kVector> piece;
#pragma unroll
    for (int i = 0; i < piece.kSize; i++) {
      const int64_t inner = column * piece.kSize + i;
      const int64_t place = kChannelsLast ? row : inner, channel = kChannelsLast ? inner : row;
      piece.v[i] = chain_sum(grad + image * places * channels + channel, channels, next, places - first[place], places);
    }
    out[(image * extent.rows + row) * extent.columns + column] = piece;
  });
}

template <typename Word>
int gather_words(const PatchMap& map, const void* features, const int64_t* ids, int64_t places, void* out,
                 void* stream) {
  const Extent extent{map.images, places, map.channels};
  return launch(gather<Word>, grid_for(extent), dim3(kColumns, kRows), 0, static_cast<cudaStream_t>(stream), extent,
                strides_of(map), map.height_x_width, static_cast<const Word*>(features), ids, static_cast<Word*>(out));
}

template <typename T, bool kChannelsLast, bool kVector>
int write_gradient(const PatchMap& map, const void* grad, const int* chains, int places, void* out, void* stream) {
  const int64_t inner = (kChannelsLast ? map.channels : map.height_x_width) / Piece<T, kVector>::kSize;
  const Extent extent{map.images, kChannelsLast ? map.height_x_width : map.channels, inner};
  return launch(gradient<T, kChannelsLast, kVector>, grid_for(extent), dim3(kColumns, kRows), 0,
                static_cast<cudaStream_t>(stream), extent, static_cast<const T*>(grad), map.channels, chains,
                chains + map.height_x_width, places, static_cast<Piece<T, kVector>*>(out));
}

template <typename T>
int write_gradient(const PatchMap& map, const void* grad, const int* chains, int places, void* out, void* stream) {
  const int64_t inner = map.channels_last ? map.channels : map.height_x_width;
  const bool vector = inner % Vector<T>::kSize == 0;
  const auto write = map.channels_last ? (vector ? write_gradient<T, true, true> : write_gradient<T, true, false>)
                                       : (vector ? write_gradient<T, false, true> : write_gradient<T, false, false>);
  return write(map, grad, chains, places, out, stream);
}

}  // namespace

int launch_patch_gather(const PatchMap& map, const void* features, const int64_t* ids, int64_t places, void* out,
                        int word_bytes, void* stream) {
  const int64_t words = 16 / word_bytes;
  if (map.channels_last && map.channels % words == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0) {
    const PatchMap vectors{map.images, map.channels / words, map.height_x_width, true};
    return gather_words<uint4>(vectors, features, ids, places, out, stream);
  }
  const auto gather_all = word_bytes == 2   ? gather_words<uint16_t>
                          : word_bytes == 4 ? gather_words<uint32_t>
                                            : gather_words<uint64_t>;
  return gather_all(map, features, ids, places, out, stream);
}

int launch_patch_gather_backward(const PatchMap& map, const void* grad, const int64_t* ids, int64_t places, void* out,
                                 Dtype dtype, int* chains, void* stream) {
  const int count = static_cast<int>(places);
  const unsigned blocks = static_cast<unsigned>((places + kRows - 1) / kRows);
  const int error = launch(build_chains, dim3(blocks), dim3(kColumns, kRows), 0, static_cast<cudaStream_t>(stream), ids,
                           count, map.height_x_width, chains, chains + map.height_x_width);
  if (error != 0) return error;
  switch (dtype) {
    case Dtype::kHalf:
      return write_gradient<Half>(map, grad, chains, count, out, stream);
    case Dtype::kBf16:
      return write_gradient<Bf16>(map, grad, chains, count, out, stream);
    case Dtype::kFloat:
      return write_gradient<float>(map, grad, chains, count, out, stream);
    case Dtype::kDouble:
      return write_gradient<double>(map, grad, chains, count, out, stream);
  }
  return -1;
}

}  // namespace cuda
}  // namespace i2i
