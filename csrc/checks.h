// What the native ops rely on, checked where a caller comes past i2i_dist/ops/: each a sentence that names the
// argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace i2i {

// x [N, C, H, W], not empty, floating point, dense in memory as contiguous or channels_last.
inline void check_map(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0 && x.is_floating_point(), name, " has shape ", x.sizes(), " and is ",
                    x.scalar_type(), "; it must be [N, C, H, W], floating point and not empty.");
  TORCH_CHECK_VALUE(x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast), name, " has strides ",
                    x.strides(), "; make it contiguous or channels_last.");
}

// other has the shape, dtype and device of x.
inline void check_like(const at::Tensor& other, const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(
      other.sizes() == x.sizes() && other.scalar_type() == x.scalar_type() && other.device() == x.device(), name,
      " has shape ", other.sizes(), ", ", other.scalar_type(), ", ", other.device(), "; it must be ", x.sizes(), ", ",
      x.scalar_type(), ", ", x.device(), ".");
}

// The statistics' dtype for x: fp64 for fp64, else fp32.
inline at::ScalarType statistics_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The dtype of the gradient that patch_nce prepares for queries like x. fp16 has no range for one that the gradient of
// the loss, and with it a loss scale, does not yet multiply.
inline at::ScalarType prepared_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

inline int64_t total_rows(at::TensorList layers) {
  int64_t rows = 0;
  for (const at::Tensor& layer : layers) rows += layer.size(0);
  return rows;
}

// other has this shape, in the statistics' dtype of x and on its device; strides are free.
inline void check_statistics(const at::Tensor& other, const at::Tensor& x, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK_VALUE(
      other.sizes() == shape && other.scalar_type() == statistics_dtype(x) && other.device() == x.device(), name,
      " has shape ", other.sizes(), ", ", other.scalar_type(), ", ", other.device(), "; it must be ", shape, ", ",
      statistics_dtype(x), ", ", x.device(), ".");
}

// The arguments of adalin: a map x; gamma, beta [N, C] and rho [C]; a residual like x.
inline void check_adalin(const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& rho,
                         const std::optional<at::Tensor>& residual) {
  check_map(x, "x");
  check_statistics(gamma, x, {x.size(0), x.size(1)}, "gamma");
  check_statistics(beta, x, {x.size(0), x.size(1)}, "beta");
  check_statistics(rho, x, {x.size(1)}, "rho");
  if (residual) check_like(*residual, x, "residual");
}

// The arguments of adalin_backward: those of adalin, grad like x, and the statistics [N, C, 2] and [N, 2].
inline void check_adalin_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gamma,
                                  const at::Tensor& beta, const at::Tensor& rho, const at::Tensor& instance_statistics,
                                  const at::Tensor& layer_statistics) {
  check_adalin(x, gamma, beta, rho, std::nullopt);
  check_like(grad, x, "grad");
  check_statistics(instance_statistics, x, {x.size(0), x.size(1), 2}, "instance_statistics");
  check_statistics(layer_statistics, x, {x.size(0), 2}, "layer_statistics");
}

// The arguments of instance_norm_act: a map x and a residual like it.
inline void check_instance_norm_act(const at::Tensor& x, const std::optional<at::Tensor>& residual) {
  check_map(x, "x");
  if (residual) check_like(*residual, x, "residual");
}

// The arguments of instance_norm_act_backward: a map x, grad like it, and the statistics [N, C, 2].
inline void check_instance_norm_act_backward(const at::Tensor& grad, const at::Tensor& x,
                                             const at::Tensor& statistics) {
  check_map(x, "x");
  check_like(grad, x, "grad");
  check_statistics(statistics, x, {x.size(0), x.size(1), 2}, "statistics");
}

// ids int64 [P] on the device of `other`.
inline void check_ids(const at::Tensor& ids, const at::Tensor& other) {
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.scalar_type() == at::kLong && ids.device() == other.device(),
                    "ids has shape ", ids.sizes(), ", ", ids.scalar_type(), ", ", ids.device(), "; it must be [P], ",
                    at::kLong, ", ", other.device(), ".");
}

// As many queries as keys, at least one; each [rows, C] with one C, dtype and device; rows divide into groups; every
// query row has a positive; the elements of a row are adjacent.
inline void check_rows(at::TensorList queries, at::TensorList keys, int64_t groups, int64_t key_offset) {
  TORCH_CHECK_VALUE(!queries.empty() && queries.size() == keys.size(), "patch_nce was given ", queries.size(),
                    " queries and ", keys.size(), " keys; it needs as many of one as of the other, at least one.");
  const at::Tensor& first = queries[0];
  for (size_t layer = 0; layer < queries.size(); layer++) {
    for (const at::Tensor& rows : {queries[layer], keys[layer]}) {
      TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) == first.size(1) && rows.size(1) > 0 &&
                            rows.scalar_type() == first.scalar_type() && rows.device() == first.device() &&
                            rows.is_floating_point(),
                        "layer ", layer, " has rows ", rows.sizes(), ", ", rows.scalar_type(), ", ", rows.device(),
                        "; all must be [rows, ", first.size(1), "], ", first.scalar_type(), ", ", first.device(), ".");
      TORCH_CHECK_VALUE(rows.stride(1) == 1 || rows.size(1) == 1, "layer ", layer, " has rows of strides ",
                        rows.strides(), "; the elements of a row must be adjacent.");
    }
    const int64_t rows = queries[layer].size(0), others = keys[layer].size(0);
    TORCH_CHECK_VALUE(groups > 0 && rows > 0 && rows % groups == 0 && others % groups == 0 && key_offset >= 0 &&
                          rows / groups + key_offset <= others / groups,
                      "layer ", layer, ": ", rows, " queries and ", others, " keys with groups=", groups,
                      " and key_offset=", key_offset, " leave rows without a positive.");
  }
}

}  // namespace i2i
