// The matrix products of PatchNCE by the tensor-core instructions of one dtype each.
#pragma once

#include "patch_nce_tiles.cuh"

namespace i2i {
namespace cuda {
namespace nce {

// Of an m16n8 tile of accumulators, lane l holds rows l / 4 and 8 more, of both columns 2 * (l % 4) and the next.
template <int kTiles>
using Accumulators = float[kTiles][4];

// The column of the tile that an accumulator belongs to.
__device__ __forceinline__ int column_of(int tile, int element) { return tile * 8 + 2 * (lane() % 4) + element % 2; }

struct Bf16Product {
  using Element = Bf16;
  static constexpr int kColumns = column_tile(Math::kBf16);
  static constexpr int kStages = 2;
  static constexpr bool kRoundsTiles = false;

  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(c, a, b0, b1);
  }

  // sums += weights x columns. The accumulators of two tiles of weights are just the fragment of a 16 x 16 left
  // operand.
  template <int kChannels>
  static __device__ __forceinline__ void add_weighted(Accumulators<kChannels / 8>& sums,
                                                      const Accumulators<kColumns / 8>& weights,
                                                      const unsigned char* columns) {
    const unsigned char* mine = columns + (lane() % 16) * kRowBytes<Element, kChannels> + (lane() / 16) * kChunkBytes;
#pragma unroll
    for (int k = 0; k < kColumns / 16; k++) {
      const float (&first)[4] = weights[2 * k];
      const float (&second)[4] = weights[2 * k + 1];
      const uint32_t a[4] = {pack_bf16(first[0], first[1]), pack_bf16(first[2], first[3]),
                             pack_bf16(second[0], second[1]), pack_bf16(second[2], second[3])};
#pragma unroll
      for (int n = 0; n < kChannels / 16; n++) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, mine + k * 16 * kRowBytes<Element, kChannels> + n * 2 * kChunkBytes);
        mma_bf16(sums[2 * n], a, b[0], b[1]);
        mma_bf16(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
};

// With kExact a product is as accurate as one of fp32: either operand is a tf32 and the rest, which a tf32 holds but
// for its last bit; only the product of the rests is left out, 2^-22 of the whole at most. Sums are another matter:
// tensor cores cut off what their accumulators cannot hold instead of rounding it. Similarities, which an exponential
// makes large, are therefore summed apart; the weighted sums of columns, which have no registers left for that, keep a
// bias that grows with the number of columns.
template <bool kExact>
struct Tf32Product {
  using Element = float;
  static constexpr int kColumns = column_tile(kExact ? Math::kFloat : Math::kTf32);
  static constexpr int kStages = kExact ? 2 : 1;
  static constexpr bool kRoundsTiles = !kExact;

  static __device__ __forceinline__ void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    const float value = __uint_as_float(bits);
    high = round_to_tf32(value);
    low = __float_as_uint(value - __uint_as_float(high));
  }

  static __device__ __forceinline__ void add_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kExact) {
      uint32_t high[4], low[4], high0, low0, high1, low1;
#pragma unroll
      for (int i = 0; i < 4; i++) split(a[i], high[i], low[i]);
      split(b0, high0, low0);
      split(b1, high1, low1);
      mma_tf32(c, low, high0, high1);
      mma_tf32(c, high, low0, low1);
      mma_tf32(c, high, high0, high1);
    } else {
      mma_tf32(c, a, b0, b1);
    }
  }

  // For similarities: with kExact the product is added by an addition that rounds.
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kExact) {
      float product[4] = {};
      add_product(product, a, b0, b1);
#pragma unroll
      for (int i = 0; i < 4; i++) c[i] += product[i];
    } else {
      add_product(c, a, b0, b1);
    }
  }

  // sums += weights x columns. The order of the eight columns that one instruction sums over is free: its places t and
  // t + 4 take the columns 2t and 2t + 1, whose weights the lane holds already. The lanes read from rows 2t, element g:
  // bank 8t + g of 32, without a conflict.
  template <int kChannels>
  static __device__ __forceinline__ void add_weighted(Accumulators<kChannels / 8>& sums,
                                                      const Accumulators<kColumns / 8>& weights,
                                                      const unsigned char* columns) {
    constexpr int kStride = kRowBytes<Element, kChannels> / sizeof(uint32_t);
    const uint32_t* mine = reinterpret_cast<const uint32_t*>(columns) + 2 * (lane() % 4) * kStride + lane() / 4;
#pragma unroll
    for (int k = 0; k < kColumns / 8; k++) {
      const float (&w)[4] = weights[k];
      const uint32_t a[4] = {operand(w[0]), operand(w[2]), operand(w[1]), operand(w[3])};
#pragma unroll
      for (int n = 0; n < kChannels / 8; n++) {
        // Keeps the compiler from loading more ahead than there are registers for.
        if (kExact && n % 8 == 0) __syncwarp();
        const uint32_t* b = mine + k * 8 * kStride + n * 8;
        add_product(sums[n], a, b[0], b[kStride]);
      }
    }
  }

  static __device__ __forceinline__ uint32_t operand(float weight) {
    return kExact ? __float_as_uint(weight) : round_to_tf32(weight);
  }
};

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
