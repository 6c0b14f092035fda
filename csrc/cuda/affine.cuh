// A norm as what it is in one channel: an affine function of x and, backward, of the gradient and x; and what every
// pass does with a pack.
#pragma once

#include "moments.cuh"
#include "norm.h"

namespace i2i {
namespace cuda {

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float square_root(float value) { return sqrtf(value); }
__device__ __forceinline__ double square_root(double value) { return sqrt(value); }

// 1 / deviation. `divisor` is the count, or the count - 1 for the unbiased variance.
template <typename S>
__device__ __forceinline__ S inverse_deviation(S m2, S divisor, S eps) {
  return 1 / square_root(m2 / divisor + eps);
}

template <typename S>
__device__ __forceinline__ S at(const Strided& tensor, int64_t image, int64_t channel) {
  return static_cast<const S*>(tensor.data)[image * tensor.image_stride + channel * tensor.channel_stride];
}

// scale * (x - mean) + offset, the norm's value before its activation. Centred on the mean, it keeps the digits that
// scale * x + (offset - scale * mean) loses where the mean is much larger than the deviation.
template <typename S>
struct Affine {
  S mean, scale, offset;

  __device__ __forceinline__ S operator()(S x) const { return multiply_add(scale, x - mean, offset); }
};

// What is known of one channel of one image.
template <typename S>
struct Channel {
  S mean, inverse, layer_mean, layer_inverse, gamma, beta, rho;

  __device__ __forceinline__ Channel(const NormParameters& norm, const Map& map, int64_t image, int64_t channel) {
    const S* instance = static_cast<const S*>(norm.instance_statistics) + (image * map.channels + channel) * 2;
    mean = instance[0];
    inverse = instance[1];
    layer_mean = layer_inverse = beta = 0;
    gamma = rho = 1;
    if (norm.layer_statistics == nullptr) return;
    layer_mean = static_cast<const S*>(norm.layer_statistics)[image * 2];
    layer_inverse = static_cast<const S*>(norm.layer_statistics)[image * 2 + 1];
    gamma = at<S>(norm.gamma, image, channel);
    beta = at<S>(norm.beta, image, channel);
    rho = at<S>(norm.rho, image, channel);
  }

  // gamma * (rho * (x - mean) * inverse + (1 - rho) * (x - layer_mean) * layer_inverse) + beta.
  __device__ __forceinline__ Affine<S> affine() const {
    const S layer = (1 - rho) * layer_inverse;
    return {mean, gamma * multiply_add(rho, inverse, layer), multiply_add(gamma * layer, mean - layer_mean, beta)};
  }
};

// The derivative of the activation at `value`.
template <typename S>
__device__ __forceinline__ S activation_slope(S value, S slope) {
  return value > 0 ? S(1) : slope;
}

// grad_x from the gradient and x. Like x, g (the gradient before the activation) is centred on its mean: where g is
// nearly constant, as under a mean over pixels, the difference keeps its digits.
template <typename S>
struct GradientAffine {
  S mean, slope, offset;

  __device__ __forceinline__ S operator()(const Affine<S>& affine, S grad, S x, S activation) const {
    const S g = activation_slope(affine(x), activation) * grad;
    return multiply_add(affine.scale, g - mean, multiply_add(slope, x - affine.mean, offset));
  }
};

// From the channel's sums of g and of g * (x - mean), for an instance norm alone.
template <typename S>
__device__ __forceinline__ GradientAffine<S> instance_gradient(const Channel<S>& channel, S grad, S product, S pixels,
                                                               S divisor) {
  const S share = channel.gamma * channel.rho * channel.inverse;
  return {grad / pixels, -share * channel.inverse * channel.inverse * product / divisor, 0};
}

// The thread's values of its channels, one for each element of a pack.
template <int kWidth, typename Value, int kChannels>
__device__ __forceinline__ const Value& of_channel(const Value (&values)[kChannels], int j) {
  static_assert(kChannels == 1 || kChannels == kWidth, "as for Moments");
  return values[kChannels == 1 ? 0 : j];
}

// Sums deviations relative to the shifts.
template <typename S, int kWidth, int kChannels>
__device__ __forceinline__ void add_moments(Moments<S, kChannels>& sums, Pack<S, kWidth> x,
                                            const S (&shifts)[kChannels]) {
#pragma unroll
  for (int j = 0; j < kWidth; j++) x.v[j] -= of_channel<kWidth>(shifts, j);
  sums.add(x);
}

// act(affine(x)) + residual.
template <typename S, int kWidth, int kChannels>
__device__ __forceinline__ Pack<S, kWidth> normalise(const Pack<S, kWidth>& x, const Pack<S, kWidth>& residual,
                                                     const Affine<S> (&affines)[kChannels], S slope) {
  Pack<S, kWidth> y;
#pragma unroll
  for (int j = 0; j < kWidth; j++) {
    const S value = of_channel<kWidth>(affines, j)(x.v[j]);
    y.v[j] = activation_slope(value, slope) * value + residual.v[j];
  }
  return y;
}

// Sums g and g * (x - mean), g the gradient before the activation.
template <typename S, int kWidth, int kChannels>
__device__ __forceinline__ void add_gradients(GradientSums<S, kChannels>& sums, Pack<S, kWidth> grad, Pack<S, kWidth> x,
                                              const Affine<S> (&affines)[kChannels], S slope) {
#pragma unroll
  for (int j = 0; j < kWidth; j++) {
    const Affine<S>& affine = of_channel<kWidth>(affines, j);
    grad.v[j] *= activation_slope(affine(x.v[j]), slope);
    x.v[j] -= affine.mean;
  }
  sums.add(grad, x);
}

template <typename S, int kWidth, int kChannels>
__device__ __forceinline__ Pack<S, kWidth> input_gradient(const Pack<S, kWidth>& grad, const Pack<S, kWidth>& x,
                                                          const Affine<S> (&affines)[kChannels],
                                                          const GradientAffine<S> (&gradients)[kChannels], S slope) {
  Pack<S, kWidth> grad_x;
#pragma unroll
  for (int j = 0; j < kWidth; j++) {
    grad_x.v[j] = of_channel<kWidth>(gradients, j)(of_channel<kWidth>(affines, j), grad.v[j], x.v[j], slope);
  }
  return grad_x;
}

}  // namespace cuda
}  // namespace i2i
