// The native ops as functions of tensors. i2i::cpu holds them for the CPU (cpu/), i2i::cuda for CUDA devices: launch/
// allocates there and calls the torch-free launchers of cuda/. What each argument is stands beside the schemas in
// schemas.h; arguments have been checked by the functions of i2i_dist/ops/ in the words of a user.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#define I2I_DECLARE_OPS                                                                                                \
  std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_nce(                                                            \
      at::TensorList queries, at::TensorList keys, int64_t groups, double temperature, int64_t key_offset, double eps, \
      std::optional<double> diagonal, bool with_gradient);                                                             \
  at::Tensor patch_nce_query_gradient(const at::Tensor& gradient, const at::Tensor& grad_loss);                        \
  at::Tensor patch_nce_key_gradient(at::TensorList queries, at::TensorList keys, const at::Tensor& statistics,         \
                                    const at::Tensor& grad_loss, int64_t groups, double temperature,                   \
                                    int64_t key_offset, double eps);                                                   \
  std::tuple<at::Tensor, at::Tensor, at::Tensor> adalin(                                                               \
      const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& rho,                     \
      const std::optional<at::Tensor>& residual, double eps, bool unbiased, double slope);                             \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> adalin_backward(                                          \
      const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta,                    \
      const at::Tensor& rho, const at::Tensor& instance_statistics, const at::Tensor& layer_statistics, bool unbiased, \
      double slope);                                                                                                   \
  std::tuple<at::Tensor, at::Tensor> instance_norm_act(const at::Tensor& x, const std::optional<at::Tensor>& residual, \
                                                       double eps, double slope);                                      \
  at::Tensor instance_norm_act_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& statistics,     \
                                        double slope);                                                                 \
  at::Tensor patch_gather(const at::Tensor& features, const at::Tensor& ids);                                          \
  at::Tensor patch_gather_backward(const at::Tensor& grad, const at::Tensor& ids, int64_t height, int64_t width,       \
                                   bool channels_last);

namespace i2i {
namespace cpu {
I2I_DECLARE_OPS
}
namespace cuda {
I2I_DECLARE_OPS
}
}  // namespace i2i

#undef I2I_DECLARE_OPS
