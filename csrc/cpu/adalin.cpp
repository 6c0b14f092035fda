// adalin on the CPU: sums of pieces, statistics of channels and images, then one affine map a channel.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <vector>

#include "checks.h"
#include "cpu/norm_pieces.h"
#include "ops.h"

namespace i2i {
namespace cpu {
namespace {

// What adalin knows of a plane, as doubles: the affine map's parameters and the statistics, as they were saved.
struct Plane {
  double gamma, beta, rho;
  double mean, scale;
  double layer_mean, layer_scale;
};

// gamma, beta [N, C] and rho [C]; instance_statistics [N, C, 2] and layer_statistics [N, 2], to be filled or filled.
template <typename S>
struct Parameters {
  const S *gamma, *beta, *rho;
  S *instance_statistics, *layer_statistics;
  int64_t channels;

  Parameters(const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& rho,
             const at::Tensor& instance_statistics, const at::Tensor& layer_statistics)
      : gamma(gamma.const_data_ptr<S>()),
        beta(beta.const_data_ptr<S>()),
        rho(rho.const_data_ptr<S>()),
        instance_statistics(instance_statistics.data_ptr<S>()),
        layer_statistics(layer_statistics.data_ptr<S>()),
        channels(rho.size(0)) {}

  Plane of_plane(int64_t plane) const {
    const S* const instance = instance_statistics + 2 * plane;
    const S* const layer = layer_statistics + 2 * (plane / channels);
    return {gamma[plane], beta[plane], rho[plane % channels], instance[0], instance[1], layer[0], layer[1]};
  }
};

// The map of a plane. Both directions take it from the saved statistics, so that they agree on where it is positive.
template <typename S>
void set_forward(const Plane& plane, int64_t index, const Normalisation<S>& map) {
  const double layer_scale = (1 - plane.rho) * plane.layer_scale;
  map.mean[index] = S(plane.mean);
  map.scale[index] = S(plane.gamma * (plane.rho * plane.scale + layer_scale));
  map.shift[index] = S(plane.beta + plane.gamma * layer_scale * (plane.mean - plane.layer_mean));
}

// 1 / sqrt(variance + eps) of `count` values.
double inverse_deviation(double squares, double count, bool unbiased, double eps) {
  return 1 / std::sqrt(squares / (count - unbiased) + eps);
}

// The moments of an image from those of its planes.
Moments of_layer(const Moments* planes, int64_t channels, double pixels) {
  Moments layer{0, 0};
  for (int64_t c = 0; c < channels; c++) layer.mean += planes[c].mean;
  layer.mean /= double(channels);
  for (int64_t c = 0; c < channels; c++) {
    const double apart = planes[c].mean - layer.mean;
    layer.squares += planes[c].squares + pixels * apart * apart;
  }
  return layer;
}

template <typename S>
void set_layer_statistics(const Parameters<S>& parameters, const std::vector<Moments>& of_planes, int64_t image,
                          double pixels, bool unbiased, double eps) {
  const Moments layer = of_layer(&of_planes[image * parameters.channels], parameters.channels, pixels);
  S* const statistics = parameters.layer_statistics + 2 * image;
  statistics[0] = S(layer.mean);
  statistics[1] = S(inverse_deviation(layer.squares, double(parameters.channels) * pixels, unbiased, eps));
}

template <typename T>
void forward(const at::Tensor& x, const at::Tensor& residual, const Parameters<Accumulate<T>>& parameters, double eps,
             bool unbiased, double slope, const at::TensorOptions& options, const at::Tensor& y) {
  using S = Accumulate<T>;
  const Pieces pieces(x);
  const PlaneMoments<T> moments(pieces, options);
  const Coefficients<S> coefficients(pieces, slope, options);
  const Normalisation<S> map = coefficients.forward();
  std::vector<Moments> of_planes(pieces.planes());
  const double pixels = double(pieces.pixels);

  for_units(pieces, pieces.groups_per_image(), [&](int64_t first_group, int64_t last_group) {
    const int64_t first_plane = first_group * pieces.channels, last_plane = last_group * pieces.channels;
    moments.add(x.const_data_ptr<T>(), first_group, last_group);
    for_planes(pieces, first_plane, last_plane, [&](int64_t plane) {
      of_planes[plane] = moments.of_plane(plane);
      S* const statistics = parameters.instance_statistics + 2 * plane;
      statistics[0] = S(of_planes[plane].mean);
      statistics[1] = S(inverse_deviation(of_planes[plane].squares, pixels, unbiased, eps));
    });
    for (int64_t image = first_plane / parameters.channels; image < last_plane / parameters.channels; image++) {
      set_layer_statistics(parameters, of_planes, image, pixels, unbiased, eps);
    }
    for (int64_t plane = first_plane; plane < last_plane; plane++) {
      set_forward(parameters.of_plane(plane), plane, map);
    }
    normalise_groups<T>(pieces, first_group, last_group, x, residual, map, y);
  });
}

// What the gradients of a plane take from its sums: the sum of the gradients d with respect to the normalised value,
// and those of their products with the value as normalised over the plane and over the image.
struct PlaneGradient {
  double sum, instance, layer;

  PlaneGradient() = default;
  PlaneGradient(const Plane& plane, double sum, double products)
      : sum(sum),
        instance(plane.scale * products),
        layer(plane.layer_scale * (products + (plane.mean - plane.layer_mean) * sum)) {}
};

// The map to grad_x for all planes of an image.
template <typename S>
void set_backward(const Parameters<S>& parameters, const PlaneGradient* gradients, int64_t first_plane, double pixels,
                  bool unbiased, const GradientMap<S>& map) {
  const int64_t last_plane = first_plane + parameters.channels;
  double sum = 0, products = 0;
  for (int64_t plane = first_plane; plane < last_plane; plane++) {
    const Plane of_plane = parameters.of_plane(plane);
    const double weight = of_plane.gamma * (1 - of_plane.rho);
    sum += weight * gradients[plane].sum;
    products += weight * gradients[plane].layer;
  }
  const double count = pixels * double(parameters.channels);
  for (int64_t plane = first_plane; plane < last_plane; plane++) {
    const Plane of_plane = parameters.of_plane(plane);
    const double instance = of_plane.gamma * of_plane.rho * of_plane.scale;
    const double layer = of_plane.gamma * (1 - of_plane.rho) * of_plane.layer_scale;
    const double mean_gradient = gradients[plane].sum / pixels;
    const double layer_slope = products * of_plane.layer_scale * of_plane.layer_scale / (count - unbiased);
    map.scale[plane] = S(instance + layer);
    map.mean_gradient[plane] = S(mean_gradient);
    map.slope[plane] = S(-(instance * gradients[plane].instance * of_plane.scale / (pixels - unbiased) + layer_slope));
    map.shift[plane] = S(layer * mean_gradient - of_plane.layer_scale * sum / count -
                         layer_slope * (of_plane.mean - of_plane.layer_mean));
  }
}

template <typename T>
void backward(const at::Tensor& grad, const at::Tensor& x, const Parameters<Accumulate<T>>& parameters, bool unbiased,
              double slope, const at::TensorOptions& options, PlaneGradient* gradients, const at::Tensor& grad_x) {
  using S = Accumulate<T>;
  const Pieces pieces(x);
  const PieceSums<S> sums(pieces, options), products(pieces, options);
  const Coefficients<S> coefficients(pieces, slope, options);
  const Normalisation<S> map = coefficients.forward();
  const GradientMap<S> gradient = coefficients.backward();

  for_units(pieces, pieces.groups_per_image(), [&](int64_t first_group, int64_t last_group) {
    const int64_t first_plane = first_group * pieces.channels, last_plane = last_group * pieces.channels;
    for (int64_t plane = first_plane; plane < last_plane; plane++) {
      set_forward(parameters.of_plane(plane), plane, map);
    }
    sum_gradients<T>(pieces, first_group, last_group, grad, x, map, sums, products);
    for_planes(pieces, first_plane, last_plane, [&](int64_t plane) {
      gradients[plane] =
          PlaneGradient(parameters.of_plane(plane), sums.of_all_pieces(plane), products.of_all_pieces(plane));
    });
    for (int64_t plane = first_plane; plane < last_plane; plane += parameters.channels) {
      set_backward(parameters, gradients, plane, double(pieces.pixels), unbiased, gradient);
    }
    apply_gradients<T>(pieces, first_group, last_group, grad, x, map, gradient, grad_x);
  });
}

// grad_gamma, grad_beta [N, C] and grad_rho [C], summed over the images in their order.
template <typename S>
void parameter_gradients(const Parameters<S>& parameters, const std::vector<PlaneGradient>& gradients, S* grad_gamma,
                         S* grad_beta, S* grad_rho) {
  std::vector<double> of_rho(parameters.channels, 0.0);
  for (size_t plane = 0; plane < gradients.size(); plane++) {
    const Plane of_plane = parameters.of_plane(plane);
    const PlaneGradient& gradient = gradients[plane];
    grad_beta[plane] = S(gradient.sum);
    grad_gamma[plane] = S(of_plane.rho * gradient.instance + (1 - of_plane.rho) * gradient.layer);
    of_rho[plane % parameters.channels] += of_plane.gamma * (gradient.instance - gradient.layer);
  }
  for (size_t channel = 0; channel < of_rho.size(); channel++) grad_rho[channel] = S(of_rho[channel]);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> adalin(const at::Tensor& x, const at::Tensor& gamma,
                                                      const at::Tensor& beta, const at::Tensor& rho,
                                                      const std::optional<at::Tensor>& residual, double eps,
                                                      bool unbiased, double slope) {
  check_adalin(x, gamma, beta, rho, residual);
  const at::TensorOptions options = x.options().dtype(statistics_dtype(x));
  const at::Tensor y = at::empty_like(x);
  const at::Tensor instance_statistics = at::empty({x.size(0), x.size(1), 2}, options);
  const at::Tensor layer_statistics = at::empty({x.size(0), 2}, options);
  const at::Tensor gammas = gamma.contiguous(), betas = beta.contiguous(), rhos = rho.contiguous();
  const at::Tensor added = residual ? in_layout_of(x, *residual) : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "adalin", [&] {
    const Parameters<Accumulate<scalar_t>> parameters(gammas, betas, rhos, instance_statistics, layer_statistics);
    forward<scalar_t>(x, added, parameters, eps, unbiased, slope, options, y);
  });
  return {y, instance_statistics, layer_statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> adalin_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& rho,
    const at::Tensor& instance_statistics, const at::Tensor& layer_statistics, bool unbiased, double slope) {
  check_adalin_backward(grad, x, gamma, beta, rho, instance_statistics, layer_statistics);
  const at::TensorOptions options = x.options().dtype(statistics_dtype(x));
  const at::Tensor grad_x = at::empty_like(x), incoming = in_layout_of(x, grad);
  const at::Tensor grad_gamma = at::empty(gamma.sizes(), options), grad_beta = at::empty(beta.sizes(), options);
  const at::Tensor grad_rho = at::empty(rho.sizes(), options);
  const at::Tensor gammas = gamma.contiguous(), betas = beta.contiguous(), rhos = rho.contiguous();
  const at::Tensor instances = instance_statistics.contiguous(), layers = layer_statistics.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "adalin_backward", [&] {
    using S = Accumulate<scalar_t>;
    const Parameters<S> parameters(gammas, betas, rhos, instances, layers);
    std::vector<PlaneGradient> gradients(gammas.numel());
    backward<scalar_t>(incoming, x, parameters, unbiased, slope, options, gradients.data(), grad_x);
    parameter_gradients(parameters, gradients, grad_gamma.data_ptr<S>(), grad_beta.data_ptr<S>(),
                        grad_rho.data_ptr<S>());
  });
  return {grad_x, grad_gamma, grad_beta, grad_rho};
}

}  // namespace cpu
}  // namespace i2i
