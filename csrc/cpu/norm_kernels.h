// What the norms do with one piece of a map: `pixels` pixels of `channels` channels each, adjacent in memory, channels
// fastest. channels = 1 is a run of one plane, which is how a contiguous map is worked on; a channels_last map comes as
// pixels of all its channels. Per-channel arguments have `channels` elements. T is the dtype of the map (float,
// double, at::Half, at::BFloat16), Accumulate<T> that of all arithmetic.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

namespace i2i {
namespace cpu {

template <typename T>
using Accumulate = at::opmath_type<T>;

struct Extent {
  int64_t pixels, channels;
};

// The affine map of every channel, centred so that a large mean costs no digits: (x - mean) * scale + shift. After it
// comes act(v) = v > 0 ? v : slope * v.
template <typename S>
struct Normalisation {
  S *mean, *scale, *shift;
  S slope;

  // That of the planes from this one on.
  Normalisation from(int64_t plane) const { return {mean + plane, scale + plane, shift + plane, slope}; }
};

// The gradient with respect to x, with d that with respect to the normalised value:
// scale * (d - mean_gradient) + slope * (x - mean) + shift.
template <typename S>
struct GradientMap {
  S *scale, *mean_gradient, *slope, *shift;

  GradientMap from(int64_t plane) const { return {scale + plane, mean_gradient + plane, slope + plane, shift + plane}; }
};

// Sums over the piece's pixels, relative to a value near their mean: shift, sum of (x - shift), sum of (x - shift)^2.
template <typename T>
void shifted_sums(const T* x, Extent extent, Accumulate<T>* shift, Accumulate<T>* sum, Accumulate<T>* squares);

// y = act(normalised x) + residual; residual may be null.
template <typename T>
void normalise(const T* x, const T* residual, Extent extent, const Normalisation<Accumulate<T>>& forward, T* y);

// Sums over the piece's pixels of d and of d * (x - mean), with d the gradient with respect to the normalised value.
template <typename T>
void gradient_sums(const T* grad, const T* x, Extent extent, const Normalisation<Accumulate<T>>& forward,
                   Accumulate<T>* sum, Accumulate<T>* products);

template <typename T>
void apply_gradient(const T* grad, const T* x, Extent extent, const Normalisation<Accumulate<T>>& forward,
                    const GradientMap<Accumulate<T>>& backward, T* grad_x);

}  // namespace cpu
}  // namespace i2i
