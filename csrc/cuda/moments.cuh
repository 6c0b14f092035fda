// Sums that merge: mean and sum of squared deviations, and the two sums of a norm's gradient. Merging follows an order
// that the shapes set, so equal inputs give equal bits.
#pragma once

#include <cstring>

#include "device.cuh"

namespace i2i {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// kWidth neighbouring elements in the dtype of sums.
template <typename S, int kWidth>
struct Pack {
  static constexpr int kSize = kWidth;
  S v[kWidth];
};

// Count, mean and sum of squared deviations from the mean (M2), of kChannels channels with one count. Welford's update
// and Chan's merge: they never subtract large sums, as mean(x^2) - mean(x)^2 does.
template <typename S, int kChannels>
struct Moments {
  using Scalar = S;
  S count = 0;
  S mean[kChannels] = {};
  S m2[kChannels] = {};

  // One value for every channel; or several for the one channel there is.
  template <int kWidth>
  __device__ __forceinline__ void add(const Pack<S, kWidth>& values) {
    if constexpr (kWidth == kChannels) {
      count += 1;
      const S weight = 1 / count;
#pragma unroll
      for (int j = 0; j < kChannels; j++) {
        const S delta = values.v[j] - mean[j];
        mean[j] += delta * weight;
        m2[j] += delta * (values.v[j] - mean[j]);
      }
    } else {
      merge(of_pack(values));
    }
  }

  __device__ __forceinline__ void merge(const Moments& other) {
    const S total = count + other.count;
    // Nothing joins nothing where both are empty.
    const S weight = total > 0 ? other.count / total : 0;
#pragma unroll
    for (int j = 0; j < kChannels; j++) {
      const S delta = other.mean[j] - mean[j];
      mean[j] += delta * weight;
      m2[j] += other.m2[j] + delta * delta * count * weight;
    }
    count = total;
  }

 private:
  // Of one channel's values: halves of equal counts merge without a division.
  template <int kWidth>
  __device__ __forceinline__ static Moments of_pack(Pack<S, kWidth> means) {
    static_assert(kChannels == 1, "a pack holds one value of every channel, or values of one channel");
    Pack<S, kWidth> squares = {};
#pragma unroll
    for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; j++) {
        const S delta = means.v[j + half] - means.v[j];
        means.v[j] += delta / 2;
        squares.v[j] += squares.v[j + half] + delta * delta * (kWidth / half) / 4;
      }
    }
    Moments result;
    result.count = kWidth;
    result.mean[0] = means.v[0];
    result.m2[0] = squares.v[0];
    return result;
  }
};

// The sums of g and of g * (x - mean), of kChannels channels.
template <typename S, int kChannels>
struct GradientSums {
  using Scalar = S;
  S grad[kChannels] = {};
  S product[kChannels] = {};

  template <int kWidth>
  __device__ __forceinline__ void add(const Pack<S, kWidth>& g, const Pack<S, kWidth>& centred) {
    static_assert(kChannels == kWidth || kChannels == 1, "as for Moments");
    GradientSums<S, kWidth> pack;
#pragma unroll
    for (int j = 0; j < kWidth; j++) {
      pack.grad[j] = g.v[j];
      pack.product[j] = g.v[j] * centred.v[j];
    }
#pragma unroll
    for (int half = kWidth / 2; half >= kChannels; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; j++) {
        pack.grad[j] += pack.grad[j + half];
        pack.product[j] += pack.product[j + half];
      }
    }
#pragma unroll
    for (int j = 0; j < kChannels; j++) {
      grad[j] += pack.grad[j];
      product[j] += pack.product[j];
    }
  }

  __device__ __forceinline__ void merge(const GradientSums& other) {
#pragma unroll
    for (int j = 0; j < kChannels; j++) {
      grad[j] += other.grad[j];
      product[j] += other.product[j];
    }
  }
};

template <typename Sums>
__device__ __forceinline__ Sums shuffle_down(const Sums& mine, int distance) {
  using S = typename Sums::Scalar;
  S values[sizeof(Sums) / sizeof(S)];
  memcpy(values, &mine, sizeof(Sums));
#pragma unroll
  for (S& value : values) value = __shfl_down_sync(kAllLanes, value, distance);
  Sums other;
  memcpy(&other, values, sizeof(Sums));
  return other;
}

// The merger of a warp's sums, in its lane 0.
template <typename Sums>
__device__ __forceinline__ Sums reduce_warp(Sums mine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) mine.merge(shuffle_down(mine, distance));
  return mine;
}

// The merger of a block's sums, in every thread. The block has whole warps, and nobody uses shared memory any more.
template <typename Sums>
__device__ __forceinline__ Sums reduce_block(Sums mine) {
  Sums* slots = reinterpret_cast<Sums*>(shared_memory());  // [warps]
  const int thread = threadIdx.x + blockDim.x * threadIdx.y;
  const int lane = thread % kWarp, warps = blockDim.x * blockDim.y / kWarp;
  mine = reduce_warp(mine);
  if (lane == 0) slots[thread / kWarp] = mine;
  __syncthreads();
  if (thread < kWarp) {
    mine = reduce_warp(lane < warps ? slots[lane] : Sums());
    if (lane == 0) slots[0] = mine;
  }
  __syncthreads();
  return slots[0];
}

// For every threadIdx.x the merger over threadIdx.y, in the threads with threadIdx.y == 0. blockDim.y is a power of 2,
// and nobody uses shared memory any more.
template <typename Sums>
__device__ __forceinline__ Sums reduce_rows(Sums mine) {
  Sums* slots = reinterpret_cast<Sums*>(shared_memory());  // [blockDim.y, blockDim.x]
  slots[threadIdx.y * blockDim.x + threadIdx.x] = mine;
  for (unsigned rows = blockDim.y / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (threadIdx.y < rows) {
      mine.merge(slots[(threadIdx.y + rows) * blockDim.x + threadIdx.x]);
      slots[threadIdx.y * blockDim.x + threadIdx.x] = mine;
    }
  }
  return mine;
}

}  // namespace cuda
}  // namespace i2i
