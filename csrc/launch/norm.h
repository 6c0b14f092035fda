// What adalin and instance_norm_act share before they launch: maps as the kernels want them, and workspaces.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "checks.h"
#include "cuda/norm.h"
#include "launch/stream.h"

namespace i2i {
namespace cuda {

inline Map map_of(const at::Tensor& x) {
  const Map map{x.size(0), x.size(1), x.size(2) * x.size(3), dtype_of(x), !x.is_contiguous()};
  const Cut cut = cut_of(map);
  TORCH_CHECK_VALUE(map.images * cut.channel_blocks * cut.splits <= std::numeric_limits<int>::max(), "x has shape ",
                    x.sizes(), ", more than one launch can cover; cut the batch.");
  return map;
}

// other, a tensor of x's shape, in the memory format of x.
inline at::Tensor in_format_of(const at::Tensor& x, const at::Tensor& other) {
  return aligned(other.contiguous(x.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast));
}

// gamma or beta [N, C], or rho [C] for every image.
inline Strided strided(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.dim() == 2 ? tensor.stride(0) : 0, tensor.stride(-1)};
}

inline at::Tensor empty_statistics(const at::Tensor& x, at::IntArrayRef shape) {
  return at::empty(shape, x.options().dtype(statistics_dtype(x)));
}

// The workspace of the passes' partial sums.
inline at::Tensor empty_partials(const at::Tensor& x, const Map& map) {
  return empty_statistics(x, {map.images, cut_of(map).splits, map.channels, 2});
}

}  // namespace cuda
}  // namespace i2i
