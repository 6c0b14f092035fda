// adalin on CUDA devices: checks, outputs and workspaces.
#include "cuda/adalin.h"

#include <ATen/ops/empty_like.h>

#include "launch/norm.h"
#include "ops.h"

namespace i2i {
namespace cuda {
namespace {

NormParameters parameters_of(const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& rho,
                             const at::Tensor& instance_statistics, const at::Tensor& layer_statistics) {
  return {instance_statistics.const_data_ptr(), layer_statistics.const_data_ptr(), strided(gamma), strided(beta),
          strided(rho)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> adalin(const at::Tensor& x, const at::Tensor& gamma,
                                                      const at::Tensor& beta, const at::Tensor& rho,
                                                      const std::optional<at::Tensor>& residual, double eps,
                                                      bool unbiased, double slope) {
  check_adalin(x, gamma, beta, rho, residual);
  const c10::DeviceGuard guard(x.device());
  const Map map = map_of(x);
  const at::Tensor input = aligned(x);
  const at::Tensor added = residual.has_value() ? in_format_of(x, *residual) : at::Tensor();
  at::Tensor y = at::empty_like(x);
  at::Tensor instance_statistics = empty_statistics(x, {map.images, map.channels, 2});
  at::Tensor layer_statistics = empty_statistics(x, {map.images, 2});
  const at::Tensor partials = empty_partials(x, map);

  NormForward pass{};
  pass.map = map;
  pass.x = input.const_data_ptr();
  pass.residual = added.defined() ? added.const_data_ptr() : nullptr;
  pass.parameters = parameters_of(gamma, beta, rho, instance_statistics, layer_statistics);
  pass.eps = eps;
  pass.slope = slope;
  pass.unbiased = unbiased;
  pass.y = y.mutable_data_ptr();
  pass.instance_statistics = instance_statistics.mutable_data_ptr();
  pass.layer_statistics = layer_statistics.mutable_data_ptr();
  pass.partials = partials.mutable_data_ptr();
  check_launch(norm_forward(pass, current_stream(x)), "adalin");
  return {y, instance_statistics, layer_statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> adalin_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& rho,
    const at::Tensor& instance_statistics, const at::Tensor& layer_statistics, bool unbiased, double slope) {
  check_adalin_backward(grad, x, gamma, beta, rho, instance_statistics, layer_statistics);
  const c10::DeviceGuard guard(x.device());
  const Map map = map_of(x);
  const at::Tensor input = aligned(x), gradient = in_format_of(x, grad);
  const at::Tensor instance = instance_statistics.contiguous(), layer = layer_statistics.contiguous();
  at::Tensor grad_x = at::empty_like(x);
  at::Tensor grad_gamma = empty_statistics(x, {map.images, map.channels});
  at::Tensor grad_beta = empty_statistics(x, {map.images, map.channels});
  at::Tensor grad_rho = empty_statistics(x, {map.channels});
  const at::Tensor partials = empty_partials(x, map);
  const at::Tensor coefficients = empty_statistics(x, {map.images, map.channels, 3});
  const at::Tensor rho_terms = empty_statistics(x, {map.images, map.channels});

  NormBackward pass{};
  pass.map = map;
  pass.grad = gradient.const_data_ptr();
  pass.x = input.const_data_ptr();
  pass.parameters = parameters_of(gamma, beta, rho, instance, layer);
  pass.slope = slope;
  pass.unbiased = unbiased;
  pass.grad_x = grad_x.mutable_data_ptr();
  pass.grad_gamma = grad_gamma.mutable_data_ptr();
  pass.grad_beta = grad_beta.mutable_data_ptr();
  pass.grad_rho = grad_rho.mutable_data_ptr();
  pass.partials = partials.mutable_data_ptr();
  pass.coefficients = coefficients.mutable_data_ptr();
  pass.rho_terms = rho_terms.mutable_data_ptr();
  check_launch(norm_backward(pass, current_stream(x)), "adalin_backward");
  return {grad_x, grad_gamma, grad_beta, grad_rho};
}

}  // namespace cuda
}  // namespace i2i
