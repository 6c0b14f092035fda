// The table of contents of the native ops: their schemas, and their registration for one backend.
//
// T is the dtype of x, query or features: fp16, bf16, fp32 or fp64. S is the dtype that statistics are kept in: fp64
// for fp64, else fp32. Results are deterministic: sums are taken in an order that depends on the shapes alone.
#pragma once

#include <torch/library.h>

#include "ops.h"

namespace i2i {

inline void define_schemas(torch::Library& library) {
  // PatchNCE of all layers of a direction. Layer l has queries [Nq_l, C] and keys [Nk_l, C], both T, rows at any
  // stride, elements of a row adjacent; `groups` cuts the rows of either into equal pieces, and the positive of a
  // piece's row i is its key i + key_offset. R is the sum of Nq_l. Returns
  //   loss [R] S;
  //   statistics [R, 2] S: log(sum of exp(similarity / temperature)), with the diagonal's extra class if there is one,
  //     and the probability of all but the positive (what the key gradient needs);
  //   gradient [R, C] T, fp32 for fp16: of each row's loss with respect to its raw query; [0, C] without
  //     with_gradient.
  library.def(
      "patch_nce(Tensor[] queries, Tensor[] keys, int groups, float temperature, int key_offset, float eps, "
      "float? diagonal, bool with_gradient) -> (Tensor loss, Tensor statistics, Tensor gradient)");
  // gradient [R, C] times grad_loss [R] S, row by row: [R, C] in the dtype of gradient.
  library.def("patch_nce_query_gradient(Tensor gradient, Tensor grad_loss) -> Tensor");
  // The gradient [sum of Nk_l, C] T with respect to the raw keys of all layers.
  library.def(
      "patch_nce_key_gradient(Tensor[] queries, Tensor[] keys, Tensor statistics, Tensor grad_loss, int groups, "
      "float temperature, int key_offset, float eps) -> Tensor");

  // act(gamma * (rho * instance_norm(x) + (1 - rho) * layer_norm(x)) + beta) + residual, with act(v) = v > 0 ? v :
  // slope * v. x [N, C, H, W] T, contiguous or channels_last; gamma, beta [N, C] S at any strides; rho [C] S; residual
  // like x.
  // Returns y (T, in the memory format of x), and (mean, 1 / sqrt(variance + eps)) as instance_statistics [N, C, 2] S
  // and layer_statistics [N, 2] S. unbiased divides by count - 1.
  library.def(
      "adalin(Tensor x, Tensor gamma, Tensor beta, Tensor rho, Tensor? residual, float eps, bool unbiased, float "
      "slope) "
      "-> (Tensor y, Tensor instance_statistics, Tensor layer_statistics)");
  // grad like y. Returns grad_x (T, in the memory format of x), grad_gamma [N, C] S, grad_beta [N, C] S, grad_rho [C]
  // S.
  library.def(
      "adalin_backward(Tensor grad, Tensor x, Tensor gamma, Tensor beta, Tensor rho, Tensor instance_statistics, "
      "Tensor layer_statistics, bool unbiased, float slope) "
      "-> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta, Tensor grad_rho)");

  // act((x - mean) / sqrt(biased variance + eps)) + residual, over the pixels of every channel of every image.
  // Returns y like x, and statistics [N, C, 2] S: mean and 1 / sqrt(variance + eps).
  library.def("instance_norm_act(Tensor x, Tensor? residual, float eps, float slope) -> (Tensor y, Tensor statistics)");
  library.def("instance_norm_act_backward(Tensor grad, Tensor x, Tensor statistics, float slope) -> Tensor");

  // features [N, C, H, W] T, contiguous or channels_last; ids int64 [P] on the same device, each row * W + column:
  // [N, P, C] T. An id may occur more than once.
  library.def("patch_gather(Tensor features, Tensor ids) -> Tensor");
  // grad [N, P, C]: the gradient [N, C, height, width] T, contiguous or channels_last.
  library.def(
      "patch_gather_backward(Tensor grad, Tensor ids, SymInt height, SymInt width, bool channels_last) -> Tensor");
}

}  // namespace i2i

// Registers the ops of `backend` (cpu or cuda) with `library`.
#define I2I_REGISTER(library, backend)                                                   \
  library.impl("patch_nce", &i2i::backend::patch_nce);                                   \
  library.impl("patch_nce_query_gradient", &i2i::backend::patch_nce_query_gradient);     \
  library.impl("patch_nce_key_gradient", &i2i::backend::patch_nce_key_gradient);         \
  library.impl("adalin", &i2i::backend::adalin);                                         \
  library.impl("adalin_backward", &i2i::backend::adalin_backward);                       \
  library.impl("instance_norm_act", &i2i::backend::instance_norm_act);                   \
  library.impl("instance_norm_act_backward", &i2i::backend::instance_norm_act_backward); \
  library.impl("patch_gather", &i2i::backend::patch_gather);                             \
  library.impl("patch_gather_backward", &i2i::backend::patch_gather_backward)
