// instance_norm_act on the CPU: sums and map of a channel back to back, while it is in the cache.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "checks.h"
#include "cpu/norm_pieces.h"
#include "ops.h"

namespace i2i {
namespace cpu {
namespace {

// A plane is normalised right after its moments are known, while the caches of its core hold it; so are the images of a
// channels_last map.
template <typename T>
void forward(const at::Tensor& x, const at::Tensor& residual, double eps, double slope, const at::Tensor& y,
             const at::Tensor& statistics) {
  using S = Accumulate<T>;
  const Pieces pieces(x);
  const PlaneMoments<T> moments(pieces, statistics.options());
  const Coefficients<S> coefficients(pieces, slope, statistics.options());
  const Normalisation<S> map = coefficients.forward();
  S* const saved = statistics.data_ptr<S>();

  for_units(pieces, 1, [&](int64_t first_group, int64_t last_group) {
    moments.add(x.const_data_ptr<T>(), first_group, last_group);
    for_planes(pieces, first_group * pieces.channels, last_group * pieces.channels, [&](int64_t plane) {
      const Moments of_plane = moments.of_plane(plane);
      map.mean[plane] = saved[2 * plane] = S(of_plane.mean);
      map.scale[plane] = saved[2 * plane + 1] = S(1 / std::sqrt(of_plane.squares / double(pieces.pixels) + eps));
      map.shift[plane] = 0;
    });
    normalise_groups<T>(pieces, first_group, last_group, x, residual, map, y);
  });
}

template <typename T>
void backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& statistics, double slope,
              const at::Tensor& grad_x) {
  using S = Accumulate<T>;
  const Pieces pieces(x);
  const PieceSums<S> sums(pieces, statistics.options()), products(pieces, statistics.options());
  const Coefficients<S> coefficients(pieces, slope, statistics.options());
  const Normalisation<S> map = coefficients.forward();
  const GradientMap<S> gradient = coefficients.backward();
  const S* const saved = statistics.const_data_ptr<S>();

  for_units(pieces, 1, [&](int64_t first_group, int64_t last_group) {
    const int64_t first_plane = first_group * pieces.channels, last_plane = last_group * pieces.channels;
    for (int64_t plane = first_plane; plane < last_plane; plane++) {
      map.mean[plane] = saved[2 * plane];
      map.scale[plane] = saved[2 * plane + 1];
      map.shift[plane] = 0;
    }
    sum_gradients<T>(pieces, first_group, last_group, grad, x, map, sums, products);
    for_planes(pieces, first_plane, last_plane, [&](int64_t plane) {
      const double scale = map.scale[plane], pixels = double(pieces.pixels);
      gradient.scale[plane] = S(scale);
      gradient.mean_gradient[plane] = S(sums.of_all_pieces(plane) / pixels);
      gradient.slope[plane] = S(-scale * scale * scale * products.of_all_pieces(plane) / pixels);
      gradient.shift[plane] = 0;
    });
    apply_gradients<T>(pieces, first_group, last_group, grad, x, map, gradient, grad_x);
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> instance_norm_act(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                     double eps, double slope) {
  check_instance_norm_act(x, residual);
  const at::Tensor y = at::empty_like(x);
  const at::Tensor statistics = at::empty({x.size(0), x.size(1), 2}, x.options().dtype(statistics_dtype(x)));
  const at::Tensor added = residual ? in_layout_of(x, *residual) : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "instance_norm_act",
                                  [&] { forward<scalar_t>(x, added, eps, slope, y, statistics); });
  return {y, statistics};
}

at::Tensor instance_norm_act_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& statistics,
                                      double slope) {
  check_instance_norm_act_backward(grad, x, statistics);
  const at::Tensor grad_x = at::empty_like(x), incoming = in_layout_of(x, grad), saved = statistics.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "instance_norm_act_backward",
                                  [&] { backward<scalar_t>(incoming, x, saved, slope, grad_x); });
  return grad_x;
}

}  // namespace cpu
}  // namespace i2i
