// How the norms cut a map into pieces, share them out among threads and put the pieces' sums together. A piece depends
// on the shape alone, and so does every result.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/norm_kernels.h"
#include "cpu/parallel.h"

namespace i2i {
namespace cpu {

// A map as [groups, pixels, channels], the last fastest: a contiguous one as N * C planes of one channel, a
// channels_last one as N images of C channels. The plane of channel c of group g is plane g * channels + c, in either
// layout that of channel c of image n is n * C + c.
struct Pieces {
  // A piece's second read comes from the cache of a core.
  static constexpr int64_t kElements = 16384;
  // Of many channels at once: enough pixels that the sums are small beside them, few enough for fp32 sums one by one.
  static constexpr int64_t kLeastPixels = 32, kMostPixels = 512;
  // What a thread must have to do to be worth its start, in elements.
  static constexpr int64_t kGrain = 32768;

  int64_t images, groups, pixels, channels;
  int64_t piece_pixels, pieces_per_group;
  int64_t grain;

  explicit Pieces(const at::Tensor& x) : images(x.size(0)), pixels(x.size(2) * x.size(3)) {
    channels = x.is_contiguous() ? 1 : x.size(1);
    groups = images * x.size(1) / channels;
    piece_pixels = channels == 1 ? kElements : std::clamp(kElements / channels, kLeastPixels, kMostPixels);
    piece_pixels = std::min(pixels, piece_pixels);
    pieces_per_group = (pixels + piece_pixels - 1) / piece_pixels;
    grain = kGrain / (piece_pixels * channels) + 1;
  }

  int64_t planes() const { return groups * channels; }
  int64_t groups_per_image() const { return groups / images; }
  int64_t planes_per_image() const { return planes() / images; }
  int64_t count() const { return groups * pieces_per_group; }
  int64_t group(int64_t piece) const { return piece / pieces_per_group; }
  int64_t first_plane(int64_t piece) const { return group(piece) * channels; }
  // The pixels of the k-th piece of a group.
  int64_t pixels_of(int64_t k) const { return std::min(piece_pixels, pixels - k * piece_pixels); }
  Extent extent(int64_t piece) const { return {pixels_of(piece % pieces_per_group), channels}; }
  // The first element of a piece.
  int64_t offset(int64_t piece) const {
    return (group(piece) * pixels + piece % pieces_per_group * piece_pixels) * channels;
  }
};

// at::parallel_for over single indices. A loop too short to share out costs nothing more than the loop.
template <typename Body>
void for_each(int64_t first, int64_t last, int64_t grain, const Body& body) {
  const auto loop = [&](int64_t from, int64_t to) {
    for (int64_t index = from; index < to; index++) body(index);
  };
  if (last - first <= grain) {
    loop(first, last);
  } else {
    parallel_for(first, last, grain, loop);
  }
}

// Calls body(piece) for the pieces of these groups.
template <typename Body>
void for_pieces(const Pieces& pieces, int64_t first_group, int64_t last_group, const Body& body) {
  for_each(first_group * pieces.pieces_per_group, last_group * pieces.pieces_per_group, pieces.grain, body);
}

// As for_pieces, the last piece first: after a pass in order, the last pieces are still in the caches.
template <typename Body>
void for_pieces_backwards(const Pieces& pieces, int64_t first_group, int64_t last_group, const Body& body) {
  const int64_t mirror = (first_group + last_group) * pieces.pieces_per_group - 1;
  for_pieces(pieces, first_group, last_group, [&](int64_t piece) { body(mirror - piece); });
}

// Calls body(plane) for these planes, to put the sums of their pieces together.
template <typename Body>
void for_planes(const Pieces& pieces, int64_t first_plane, int64_t last_plane, const Body& body) {
  constexpr int64_t kGrain = 4096;
  for_each(first_plane, last_plane, kGrain / pieces.pieces_per_group + 1, body);
}

// Calls body(first_group, last_group) for units of `groups_per_unit` groups: one thread a unit if there are many of
// them, else all threads in every unit, whose own loops then share it out. Tiny units are put together, so that the
// long chains of arithmetic from a plane's values to its statistics overlap.
template <typename Body>
void for_units(const Pieces& pieces, int64_t groups_per_unit, const Body& body) {
  const int64_t group_elements = pieces.pixels * pieces.channels;
  const int64_t tiny = std::max<int64_t>(1, Pieces::kElements / (group_elements * groups_per_unit));
  const int64_t groups = groups_per_unit * tiny, units = (pieces.groups + groups - 1) / groups;
  const bool many = units >= 4 * at::get_num_threads();
  for_each(0, units, many ? Pieces::kGrain / (group_elements * groups) + 1 : units,
           [&](int64_t unit) { body(unit * groups, std::min(pieces.groups, (unit + 1) * groups)); });
}

// A map that goes with x, in the layout of x: a copy if it comes in another, as a gradient may.
inline at::Tensor in_layout_of(const at::Tensor& x, const at::Tensor& other) {
  return other.contiguous(x.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
}

// The storage of a Normalisation and a GradientMap of all planes.
template <typename S>
class Coefficients {
 public:
  Coefficients(const Pieces& pieces, double slope, const at::TensorOptions& options)
      : storage_(at::empty({7, pieces.planes()}, options)), slope_(S(slope)) {}

  Normalisation<S> forward() const { return {row(0), row(1), row(2), slope_}; }
  GradientMap<S> backward() const { return {row(3), row(4), row(5), row(6)}; }

 private:
  S* row(int64_t index) const { return storage_.data_ptr<S>() + index * storage_.size(1); }

  const at::Tensor storage_;
  const S slope_;
};

// One sum of every piece and channel, [pieces, channels] in memory; the planes of a piece are `channels` in a row.
template <typename S>
class PieceSums {
 public:
  PieceSums(const Pieces& pieces, const at::TensorOptions& options)
      : pieces_(pieces),
        storage_(at::empty({pieces.count(), pieces.channels}, options)),
        data_(storage_.data_ptr<S>()) {}

  S* of_piece(int64_t piece) const { return data_ + piece * pieces_.channels; }
  // That of the plane's first piece; those of its other pieces follow `channels` apart.
  const S* of_plane(int64_t plane) const {
    return of_piece(plane / pieces_.channels * pieces_.pieces_per_group) + plane % pieces_.channels;
  }
  // Over all pieces of the plane.
  double of_all_pieces(int64_t plane) const {
    const S* const sums = of_plane(plane);
    double total = 0;
    for (int64_t k = 0; k < pieces_.pieces_per_group; k++) total += sums[k * pieces_.channels];
    return total;
  }

 private:
  const Pieces pieces_;
  const at::Tensor storage_;
  S* const data_;
};

struct Moments {
  double mean;
  // The sum of the squared deviations from the mean.
  double squares;
};

// Mean and variance of every plane.
template <typename T>
class PlaneMoments {
  using S = Accumulate<T>;

 public:
  PlaneMoments(const Pieces& pieces, const at::TensorOptions& options)
      : pieces_(pieces), shift_(pieces, options), sum_(pieces, options), squares_(pieces, options) {}

  void add(const T* x, int64_t first_group, int64_t last_group) const {
    for_pieces(pieces_, first_group, last_group, [&](int64_t piece) {
      shifted_sums(x + pieces_.offset(piece), pieces_.extent(piece), shift_.of_piece(piece), sum_.of_piece(piece),
                   squares_.of_piece(piece));
    });
  }

  // Of a plane whose group has been added. With the moments of each piece known, the squares about the common
  // mean follow without cancellation (Chan et al. 1979).
  Moments of_plane(int64_t plane) const {
    const S *const shift = shift_.of_plane(plane), *const sum = sum_.of_plane(plane),
                   *const squares = squares_.of_plane(plane);
    double total = 0;
    for (int64_t k = 0, i = 0; k < pieces_.pieces_per_group; k++, i += pieces_.channels) {
      total += double(pieces_.pixels_of(k)) * shift[i] + sum[i];
    }
    Moments all{total / double(pieces_.pixels), 0};
    for (int64_t k = 0, i = 0; k < pieces_.pieces_per_group; k++, i += pieces_.channels) {
      // Over the piece, the sum of (x - mean)^2 with x - mean = (x - shift) - apart.
      const double apart = all.mean - shift[i];
      all.squares += squares[i] - apart * (2 * sum[i] - double(pieces_.pixels_of(k)) * apart);
    }
    all.squares = std::max(all.squares, 0.0);
    return all;
  }

 private:
  const Pieces pieces_;
  const PieceSums<S> shift_, sum_, squares_;
};

// y = act(normalised x) + residual over these groups; residual may be undefined.
template <typename T>
void normalise_groups(const Pieces& pieces, int64_t first_group, int64_t last_group, const at::Tensor& x,
                      const at::Tensor& residual, const Normalisation<Accumulate<T>>& map, const at::Tensor& y) {
  const T* const values = x.const_data_ptr<T>();
  const T* const residuals = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
  T* const results = y.data_ptr<T>();
  for_pieces_backwards(pieces, first_group, last_group, [&](int64_t piece) {
    const int64_t offset = pieces.offset(piece);
    normalise(values + offset, residuals == nullptr ? nullptr : residuals + offset, pieces.extent(piece),
              map.from(pieces.first_plane(piece)), results + offset);
  });
}

// The gradient_sums of the pieces of these groups.
template <typename T>
void sum_gradients(const Pieces& pieces, int64_t first_group, int64_t last_group, const at::Tensor& grad,
                   const at::Tensor& x, const Normalisation<Accumulate<T>>& map, const PieceSums<Accumulate<T>>& sums,
                   const PieceSums<Accumulate<T>>& products) {
  const T *const gradients = grad.const_data_ptr<T>(), *const values = x.const_data_ptr<T>();
  for_pieces(pieces, first_group, last_group, [&](int64_t piece) {
    const int64_t offset = pieces.offset(piece);
    gradient_sums(gradients + offset, values + offset, pieces.extent(piece), map.from(pieces.first_plane(piece)),
                  sums.of_piece(piece), products.of_piece(piece));
  });
}

template <typename T>
void apply_gradients(const Pieces& pieces, int64_t first_group, int64_t last_group, const at::Tensor& grad,
                     const at::Tensor& x, const Normalisation<Accumulate<T>>& map,
                     const GradientMap<Accumulate<T>>& gradient, const at::Tensor& grad_x) {
  const T *const gradients = grad.const_data_ptr<T>(), *const values = x.const_data_ptr<T>();
  T* const results = grad_x.data_ptr<T>();
  for_pieces_backwards(pieces, first_group, last_group, [&](int64_t piece) {
    const int64_t offset = pieces.offset(piece), plane = pieces.first_plane(piece);
    apply_gradient(gradients + offset, values + offset, pieces.extent(piece), map.from(plane), gradient.from(plane),
                   results + offset);
  });
}

}  // namespace cpu
}  // namespace i2i
