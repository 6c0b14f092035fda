// instance_norm_act on CUDA devices: checks, outputs, and the choice between one launch and the passes of adalin.
#include "cuda/instance_norm_act.h"

#include <ATen/ops/empty_like.h>

#include "cuda/adalin.h"
#include "launch/norm.h"
#include "ops.h"

namespace i2i {
namespace cuda {

std::tuple<at::Tensor, at::Tensor> instance_norm_act(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                     double eps, double slope) {
  check_instance_norm_act(x, residual);
  const c10::DeviceGuard guard(x.device());
  const Map map = map_of(x);
  const at::Tensor input = aligned(x);
  const at::Tensor added = residual.has_value() ? in_format_of(x, *residual) : at::Tensor();
  at::Tensor y = at::empty_like(x);
  at::Tensor statistics = empty_statistics(x, {map.images, map.channels, 2});

  NormForward pass{};
  pass.map = map;
  pass.x = input.const_data_ptr();
  pass.residual = added.defined() ? added.const_data_ptr() : nullptr;
  pass.parameters.instance_statistics = statistics.const_data_ptr();
  pass.eps = eps;
  pass.slope = slope;
  pass.y = y.mutable_data_ptr();
  pass.instance_statistics = statistics.mutable_data_ptr();
  if (suits_plane_blocks(map)) {
    check_launch(instance_norm_planes(pass, current_stream(x)), "instance_norm_act");
    return {y, statistics};
  }
  const at::Tensor partials = empty_partials(x, map);
  pass.partials = partials.mutable_data_ptr();
  check_launch(norm_forward(pass, current_stream(x)), "instance_norm_act");
  return {y, statistics};
}

at::Tensor instance_norm_act_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& statistics,
                                      double slope) {
  check_instance_norm_act_backward(grad, x, statistics);
  const c10::DeviceGuard guard(x.device());
  const Map map = map_of(x);
  const at::Tensor input = aligned(x), gradient = in_format_of(x, grad), instance = statistics.contiguous();
  at::Tensor grad_x = at::empty_like(x);

  NormBackward pass{};
  pass.map = map;
  pass.grad = gradient.const_data_ptr();
  pass.x = input.const_data_ptr();
  pass.parameters.instance_statistics = instance.const_data_ptr();
  pass.slope = slope;
  pass.grad_x = grad_x.mutable_data_ptr();
  if (suits_plane_blocks(map)) {
    check_launch(instance_norm_planes_backward(pass, current_stream(x)), "instance_norm_act_backward");
    return grad_x;
  }
  const at::Tensor partials = empty_partials(x, map);
  const at::Tensor coefficients = empty_statistics(x, {map.images, map.channels, 3});
  pass.partials = partials.mutable_data_ptr();
  pass.coefficients = coefficients.mutable_data_ptr();
  check_launch(norm_backward(pass, current_stream(x)), "instance_norm_act_backward");
  return grad_x;
}

}  // namespace cuda
}  // namespace i2i
