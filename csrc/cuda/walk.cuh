// How the threads of a block walk over their part of a map, several loads in flight.
#pragma once

#include <type_traits>

#include "moments.cuh"
#include "norm.h"

namespace i2i {
namespace cuda {

// Whether what is loaded will be read again soon, by the next pass.
enum class Cache { kKeep, kStream };

// kWidth elements of T as they lie in memory: a vector, or one element.
template <typename T, int kWidth>
using Raw = std::conditional_t<kWidth == 1, T, Vector<T>>;

template <int kWidth, Cache kCache, typename T>
__device__ __forceinline__ Raw<T, kWidth> load(const T* source) {
  if constexpr (kWidth == 1) {
    return *source;
  } else if constexpr (kCache == Cache::kStream) {
    return load_vector_streaming(source);
  } else {
    return load_vector(source);
  }
}

template <typename T>
__device__ __forceinline__ Pack<Accumulate<T>, Vector<T>::kSize> unpack(const Vector<T>& raw) {
  Pack<Accumulate<T>, Vector<T>::kSize> values;
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; j++) values.v[j] = to_accumulate(raw.v[j]);
  return values;
}

template <typename T>
__device__ __forceinline__ Pack<Accumulate<T>, 1> unpack(T raw) {
  return {{to_accumulate(raw)}};
}

template <typename T, int kWidth>
__device__ __forceinline__ void store(T* target, const Pack<Accumulate<T>, kWidth>& values) {
  if constexpr (kWidth == 1) {
    *target = from_accumulate<T>(values.v[0]);
  } else {
    Vector<T> raw;
#pragma unroll
    for (int j = 0; j < kWidth; j++) raw.v[j] = from_accumulate<T>(values.v[j]);
    store_vector_streaming(target, raw);
  }
}

// A thread's packs: at elements origin + index * stride for index = first, first + step, ... < last. A block's part of
// a map has fewer than 2^31 packs; its place in the map may need 64 bits.
struct Walk {
  int64_t origin, stride;
  int first, last, step;

  __device__ __forceinline__ int64_t element(int index) const { return origin + index * stride; }
};

// kBatch successive packs of a walk from kTensors maps.
template <typename T, int kWidth, int kTensors, int kBatch>
struct Tile {
  Raw<T, kWidth> raw[kTensors][kBatch];

  // From the first kTensors. One that is absent (null) reads as zeros.
  template <Cache kCache, int kGiven>
  __device__ __forceinline__ void load_from(const T* const (&tensors)[kGiven], const Walk& walk, int first) {
#pragma unroll
    for (int t = 0; t < kTensors; t++) {
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const int index = first + k * walk.step;
        raw[t][k] = {};
        if (index < walk.last && tensors[t] != nullptr) {
          raw[t][k] = load<kWidth, kCache>(tensors[t] + walk.element(index));
        }
      }
    }
  }

  // Calls f(element, packs of the first kUsed tensors) for every pack.
  template <int kUsed, typename F>
  __device__ __forceinline__ void visit(const Walk& walk, int first, const F& f) const {
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int index = first + k * walk.step;
      if (index >= walk.last) continue;
      Pack<Accumulate<T>, kWidth> packs[kUsed];
#pragma unroll
      for (int t = 0; t < kUsed; t++) packs[t] = unpack(raw[t][k]);
      f(walk.element(index), packs);
    }
  }
};

// Calls f(element, packs of the first kUsed tensors) for every pack of the walk.
template <int kUsed, Cache kCache, int kWidth, typename T, int kTensors, typename F>
__device__ __forceinline__ void stream(const T* const (&tensors)[kTensors], const Walk& walk, const F& f) {
  for (int first = walk.first; first < walk.last; first += kInFlight * walk.step) {
    Tile<T, kWidth, kUsed, kInFlight> tile;
    tile.template load_from<kCache>(tensors, walk, first);
    tile.template visit<kUsed>(walk, first, f);
  }
}

// Elements [begin, end) of a contiguous map, however they are aligned: aligned vectors, and at most one lone element
// for each thread from before and behind them.
template <typename T>
struct Span {
  static constexpr int kWidth = Vector<T>::kSize;
  Walk vectors, edge;

  __device__ __forceinline__ Span(int64_t begin, int64_t end) {
    const int64_t body = min(ceil_multiple(begin), end);
    const int64_t tail = max(body, end - end % kWidth);
    const int thread = threadIdx.x, threads = blockDim.x;
    vectors = {body, kWidth, thread, static_cast<int>((tail - body) / kWidth), threads};
    const int head = static_cast<int>(body - begin);
    const int64_t element = thread < head ? begin + thread : tail + thread - head;
    edge = {element, 1, 0, element < end ? 1 : 0, 1};
  }

 private:
  __device__ __forceinline__ static int64_t ceil_multiple(int64_t element) {
    return (element + kWidth - 1) / kWidth * kWidth;
  }
  __device__ __forceinline__ static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  __device__ __forceinline__ static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
};

// A span's elements of kTensors maps, loaded whenever they are visited.
template <typename T, int kTensors>
struct Streamed {
  const T* const (&tensors)[kTensors];
  const Span<T>& span;

  template <int kUsed, Cache kCache, typename F>
  __device__ __forceinline__ void visit(const F& f) const {
    stream<kUsed, kCache, Span<T>::kWidth>(tensors, span.vectors, f);
    Tile<T, 1, kUsed, 1> edge;
    edge.template load_from<kCache>(tensors, span.edge, span.edge.first);
    edge.template visit<kUsed>(span.edge, span.edge.first, f);
  }
};

// The same, loaded once and kept in registers: for spans of at most kInFlight vectors for each thread.
template <typename T, int kTensors>
class Held {
 public:
  __device__ __forceinline__ Held(const T* const (&tensors)[kTensors], const Span<T>& span) : span_(span) {
    vectors_.template load_from<Cache::kStream>(tensors, span.vectors, span.vectors.first);
    edge_.template load_from<Cache::kStream>(tensors, span.edge, span.edge.first);
  }

  template <int kUsed, Cache kCache, typename F>
  __device__ __forceinline__ void visit(const F& f) const {
    vectors_.template visit<kUsed>(span_.vectors, span_.vectors.first, f);
    edge_.template visit<kUsed>(span_.edge, span_.edge.first, f);
  }

 private:
  const Span<T>& span_;
  Tile<T, Span<T>::kWidth, kTensors, kInFlight> vectors_;
  Tile<T, 1, kTensors, 1> edge_;
};

}  // namespace cuda
}  // namespace i2i
