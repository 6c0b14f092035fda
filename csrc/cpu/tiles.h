// Tiles of similarities between normalised rows, never the whole matrix: a block of stationary rows meets the streamed
// rows tile after tile. S is float or double.
//
// Inside a tile the channels and the streamed rows are padded to whole vectors: padded channels hold zeros and padded
// rows are rows of zeros, so that no loop over a tile has a remainder.
#pragma once

#include <ATen/Functions.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace i2i {
namespace cpu {

// Streamed rows in a tile: with 256 channels all that a block of rows works on fits into an L2 cache of 1 MiB.
constexpr int64_t kTileRows = 256;

inline int64_t padded(int64_t count) { return (count + kLanes<float> - 1) / kLanes<float> * kLanes<float>; }

// The raw rows of one image on one layer.
template <typename S>
struct Rows {
  const S* data;
  int64_t stride;
  int64_t count;
  int64_t first;         // number of rows before these, over all layers and images
  int64_t first_padded;  // the same with every image's rows padded

  const S* row(int64_t i) const { return data + i * stride; }
};

// Rows first .. first + count of image `image`; images are numbered over all layers.
struct Block {
  size_t image;
  int64_t first;
  int64_t count;
};

template <typename S>
std::vector<Block> cut(const std::vector<Rows<S>>& images, int64_t block_rows) {
  std::vector<Block> blocks;
  for (size_t image = 0; image < images.size(); image++)
    for (int64_t first = 0; first < images[image].count; first += block_rows)
      blocks.push_back({image, first, std::min(block_rows, images[image].count - first)});
  return blocks;
}

template <typename S>
I2I_INLINE S dot(const S* a, const S* b, int64_t padded_channels) {
  Vector<S> sum{};
  for (int64_t c = 0; c < padded_channels; c += kLanes<S>) sum += load(a + c) * load(b + c);
  return sum_of<S>(sum);
}

// 1 / (norm + eps), and 0 for a row of zeros.
template <typename S>
I2I_INLINE S inverse_of(S norm, S eps) {
  return norm > 0 ? 1 / (norm + eps) : 0;
}

// Copies a row, pads it with zeros and returns its norm.
template <typename S>
I2I_INLINE S copy_row(const S* from, int64_t channels, S* to) {
  std::memcpy(to, from, channels * sizeof(S));
  std::fill(to + channels, to + padded(channels), S(0));
  return std::sqrt(dot(to, to, padded(channels)));
}

template <typename S>
I2I_INLINE void scale_row(S* row, int64_t padded_channels, S factor) {
  for (int64_t c = 0; c < padded_channels; c += kLanes<S>) store<S>(row + c, load(row + c) * factor);
}

// Normalises `count` rows into unit [count, padded channels]; norms [count] are those of the raw rows.
template <typename S>
I2I_INLINE void normalise(const Rows<S>& rows, int64_t first, int64_t count, int64_t channels, S eps, S* unit,
                          S* norms) {
  for (int64_t i = 0; i < count; i++) {
    S* to = unit + i * padded(channels);
    norms[i] = copy_row(rows.row(first + i), channels, to);
    scale_row(to, padded(channels), inverse_of(norms[i], eps));
  }
}

// The streamed rows of all images as the tiles read them. Similarities need the unit rows transposed: [channels, w] for
// a tile of w rows (padded). Weighted sums take the raw rows, with 1 / (norm + eps) as a factor of the weight.
template <typename S>
struct Streamed {
  Streamed(const std::vector<Rows<S>>& images, int64_t channels, S eps) : images(images), channels(channels), eps(eps) {
    const int64_t rows = images.back().first_padded + padded(images.back().count);
    memory = at::empty({rows * (channels + 1)}, c10::CppTypeToScalarType<S>::value);
    columns = memory.template mutable_data_ptr<S>();
    inverses = columns + rows * channels;
  }

  Block tile(size_t image, int64_t first) const {
    return {image, first, std::min(kTileRows, images[image].count - first)};
  }
  S* tile_columns(const Block& tile) const {
    return columns + (images[tile.image].first_padded + tile.first) * channels;
  }
  const S* tile_rows(const Block& tile) const { return images[tile.image].row(tile.first); }
  S* tile_inverses(const Block& tile) const { return inverses + images[tile.image].first_padded + tile.first; }

  const std::vector<Rows<S>>& images;
  int64_t channels;
  S eps;
  at::Tensor memory;
  S* columns;   // [padded rows, channels], cut into tiles
  S* inverses;  // [padded rows]
};

// to [columns, to_stride] = from [kLanes, columns] transposed: kLanes rows become one vector wide.
template <typename S>
I2I_INLINE void transpose_strip(const S* from, int64_t from_stride, int64_t columns, S* to, int64_t to_stride) {
  for (int64_t c = 0; c < columns; c++) {
    Vector<S> column;
    for (int64_t i = 0; i < kLanes<S>; i++) column[i] = from[i * from_stride + c];
    store<S>(to + c * to_stride, column);
  }
}

// Fills the columns and inverses of one tile; strip holds [kLanes, padded channels].
template <typename S>
I2I_INLINE void pack_tile(const Streamed<S>& streamed, const Block& tile, S* strip) {
  const int64_t width = padded(tile.count), channels = streamed.channels, row_size = padded(channels);
  S* inverses = streamed.tile_inverses(tile);
  for (int64_t first = 0; first < width; first += kLanes<S>) {
    const int64_t count = std::clamp<int64_t>(tile.count - first, 0, kLanes<S>);
    normalise(streamed.images[tile.image], tile.first + first, count, channels, streamed.eps, strip, inverses + first);
    for (int64_t i = 0; i < count; i++) inverses[first + i] = inverse_of(inverses[first + i], streamed.eps);
    std::fill(inverses + first + count, inverses + first + kLanes<S>, S(0));
    std::fill(strip + count * row_size, strip + kLanes<S> * row_size, S(0));
    transpose_strip(strip, row_size, channels, streamed.tile_columns(tile) + first, width);
  }
}

// c [m, n] = a [m, k] b [k, n], added to c if `add`. Rows of c have room for n padded.
I2I_INLINE void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
                         int64_t b_stride, float* c, int64_t c_stride, bool add) {
  at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, add, a, b, c, false);
}

template <int rows>
I2I_INLINE void multiply_rows(int64_t n, int64_t k, const double* a, int64_t a_stride, const double* b,
                              int64_t b_stride, double* c, int64_t c_stride, bool add) {
  for (int64_t j = 0; j < n; j += kLanes<double>) {
    const int64_t width = std::min(kLanes<double>, n - j);
    Vector<double> sums[rows] = {};
    for (int64_t i = 0; add && i < rows; i++) sums[i] = load(c + i * c_stride + j);
    for (int64_t l = 0; l < k; l++) {
      const Vector<double> right = load_first(b + l * b_stride + j, width);
      for (int64_t i = 0; i < rows; i++) sums[i] += a[i * a_stride + l] * right;
    }
    for (int64_t i = 0; i < rows; i++) store<double>(c + i * c_stride + j, sums[i]);
  }
}

// Written out, because torch exports no product of fp64 that stays on one thread.
I2I_INLINE void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t a_stride, const double* b,
                         int64_t b_stride, double* c, int64_t c_stride, bool add) {
  int64_t i = 0;
  for (; i + 8 <= m; i += 8)
    multiply_rows<8>(n, k, a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, add);
  for (; i < m; i++) multiply_rows<1>(n, k, a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, add);
}

// The gradient of a raw row x from that of its unit row x / (norm + eps): gradient, in place, [padded channels].
template <typename S>
I2I_INLINE void through_normalisation(S* gradient, const S* unit, int64_t padded_channels, S norm, S eps) {
  const S along = norm > 0 || std::isnan(norm) ? dot(gradient, unit, padded_channels) * (1 + eps / norm) : 0;
  const S inverse = inverse_of(norm, eps);
  for (int64_t c = 0; c < padded_channels; c += kLanes<S>)
    store<S>(gradient + c, (load(gradient + c) - along * load(unit + c)) * inverse);
}

}  // namespace cpu
}  // namespace i2i
