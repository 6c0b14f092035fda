// The gather on CUDA devices: checks, outputs and the scratch of the backward.
#include "cuda/patch_gather.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "checks.h"
#include "launch/stream.h"
#include "ops.h"

namespace i2i {
namespace cuda {

at::Tensor patch_gather(const at::Tensor& features, const at::Tensor& ids) {
  check_map(features, "features");
  check_ids(ids, features);
  const c10::DeviceGuard guard(features.device());
  const at::Tensor places = ids.contiguous();
  const PatchMap map{features.size(0), features.size(1), features.size(2) * features.size(3),
                     !features.is_contiguous()};
  at::Tensor out = at::empty({map.images, places.numel(), map.channels}, features.options());
  if (out.numel() == 0) return out;  // a kernel has no empty grid
  check_launch(
      launch_patch_gather(map, features.const_data_ptr(), places.const_data_ptr<int64_t>(), places.numel(),
                          out.mutable_data_ptr(), static_cast<int>(features.element_size()), current_stream(features)),
      "patch_gather");
  return out;
}

at::Tensor patch_gather_backward(const at::Tensor& grad, const at::Tensor& ids, int64_t height, int64_t width,
                                 bool channels_last) {
  TORCH_CHECK_VALUE(
      grad.dim() == 3 && grad.size(0) > 0 && grad.size(1) == ids.numel() && grad.size(2) > 0 && height > 0 && width > 0,
      "grad has shape ", grad.sizes(), "; it must be [N, ", ids.numel(), ", C].");
  check_ids(ids, grad);
  const PatchMap map{grad.size(0), grad.size(2), height * width, channels_last};
  TORCH_CHECK_VALUE(map.height_x_width + ids.numel() <= std::numeric_limits<int>::max(), "a map of ", height, " x ",
                    width, " places is too large.");
  const c10::DeviceGuard guard(grad.device());
  const at::Tensor gradients = grad.contiguous(), places = ids.contiguous();
  const at::Tensor chains = at::zeros({map.height_x_width + places.numel()}, places.options().dtype(at::kInt));
  at::Tensor out = at::empty(
      {map.images, map.channels, height, width},
      grad.options().memory_format(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
  if (places.numel() == 0) return out.zero_();
  check_launch(launch_patch_gather_backward(map, gradients.const_data_ptr(), places.const_data_ptr<int64_t>(),
                                            places.numel(), out.mutable_data_ptr(), dtype_of(grad),
                                            chains.mutable_data_ptr<int>(), current_stream(grad)),
               "patch_gather_backward");
  return out;
}

}  // namespace cuda
}  // namespace i2i
