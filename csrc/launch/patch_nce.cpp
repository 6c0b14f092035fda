// PatchNCE on CUDA tensors: allocates, and calls the launchers of cuda/patch_nce.h.
#include "cuda/patch_nce.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "checks.h"
#include "ops.h"
#include "stream.h"

namespace i2i {
namespace cuda {
namespace {

// fp16 runs as fp32: every fp16 number is a tf32 number, so that tf32 multiplies it exactly, and unlike fp16 it has
// range enough for the weights.
at::ScalarType computing_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

nce::Math math_for(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return nce::Math::kBf16;
    case at::kHalf:
      return nce::Math::kTf32;
    case at::kDouble:
      return nce::Math::kDouble;
    default:
      return at::globalContext().allowTF32CuBLAS() ? nce::Math::kTf32 : nce::Math::kFloat;
  }
}

std::vector<at::Tensor> to_computing_dtype(at::TensorList tensors) {
  std::vector<at::Tensor> converted;
  for (const at::Tensor& x : tensors) converted.push_back(x.to(computing_dtype(x)));
  return converted;
}

// The arguments that both ops on lists of layers share.
struct Arguments {
  std::vector<at::Tensor> queries, keys;  // in the computing dtype
  int64_t groups, key_offset;
  double temperature, eps;
};

// `rows` is what the layers so far have of this side. The kernels count rows, and elements from row to row, in 32 bits.
nce::Side next_side(const at::Tensor& x, int64_t groups, int64_t& rows) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const nce::Side side{x.const_data_ptr(), x.stride(0), rows, x.size(0) / groups};
  rows += x.size(0);
  TORCH_CHECK_VALUE(rows <= kMost && x.stride(0) <= kMost, "patch_nce was given ", rows, " rows, ", x.stride(0),
                    " elements apart; it takes at most ", kMost, " of either.");
  return side;
}

// The layers [first, last).
nce::Layers make_layers(const Arguments& arguments, size_t first, size_t last) {
  nce::Layers layers = {};
  layers.count = static_cast<int>(last - first);
  layers.channels = static_cast<int>(arguments.queries[first].size(1));
  layers.groups = arguments.groups;
  layers.key_offset = arguments.key_offset;
  layers.inverse_temperature = 1 / arguments.temperature;
  layers.level_scale = nce::kLog2E / arguments.temperature;
  layers.eps = arguments.eps;
  int64_t query_rows = 0, key_rows = 0;
  for (size_t i = first; i < last; i++) {
    layers.layer[i - first] = {next_side(arguments.queries[i], arguments.groups, query_rows),
                               next_side(arguments.keys[i], arguments.groups, key_rows)};
  }
  return layers;
}

// Calls body(layers, first query row, query rows, first key row, key rows) for as many layers at a time as one set of
// launches takes.
template <typename Body>
void for_layers(const Arguments& arguments, Body body) {
  const at::TensorList queries(arguments.queries), keys(arguments.keys);
  for (size_t first = 0; first < queries.size(); first += nce::kMaxLayers) {
    const size_t count = std::min(queries.size() - first, size_t{nce::kMaxLayers});
    body(make_layers(arguments, first, first + count), total_rows(queries.slice(0, first)),
         total_rows(queries.slice(first, count)), total_rows(keys.slice(0, first)),
         total_rows(keys.slice(first, count)));
  }
}

at::Tensor bytes(size_t count, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(count)}, like.options().dtype(at::kByte));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_nce(at::TensorList queries, at::TensorList keys, int64_t groups,
                                                         double temperature, int64_t key_offset, double eps,
                                                         std::optional<double> diagonal, bool with_gradient) {
  check_rows(queries, keys, groups, key_offset);
  const at::Tensor& like = queries[0];
  const c10::DeviceGuard guard(like.device());
  const nce::Math math = math_for(like);
  const Arguments arguments{
      to_computing_dtype(queries), to_computing_dtype(keys), groups, key_offset, temperature, eps};

  const int64_t rows = total_rows(queries);
  const at::TensorOptions options = like.options().dtype(statistics_dtype(like));
  at::Tensor loss = at::empty({rows}, options), statistics = at::empty({rows, 2}, options);
  at::Tensor gradient = at::empty({with_gradient ? rows : 0, like.size(1)}, like.options().dtype(prepared_dtype(like)));
  for_layers(arguments, [&](const nce::Layers& layers, int64_t first, int64_t count, int64_t, int64_t) {
    const at::Tensor workspace = bytes(nce::forward_workspace(layers, math, with_gradient), like);
    const nce::ForwardOutputs outputs{loss.narrow(0, first, count).mutable_data_ptr(),
                                      statistics.narrow(0, first, count).mutable_data_ptr(),
                                      with_gradient ? gradient.narrow(0, first, count).mutable_data_ptr() : nullptr};
    check_launch(nce::forward(layers, math, diagonal.value_or(-std::numeric_limits<double>::infinity()), outputs,
                              workspace.mutable_data_ptr(), current_stream(like)),
                 "patch_nce");
  });
  return {loss, statistics, gradient};
}

at::Tensor patch_nce_query_gradient(const at::Tensor& gradient, const at::Tensor& grad_loss) {
  TORCH_CHECK_VALUE(gradient.dim() == 2 && gradient.is_floating_point(), "gradient has shape ", gradient.sizes(),
                    " and is ", gradient.scalar_type(), "; it must be [rows, channels], floating point.");
  check_statistics(grad_loss, gradient, {gradient.size(0)}, "grad_loss");
  const c10::DeviceGuard guard(gradient.device());
  const at::Tensor source = aligned(gradient.contiguous()), result = at::empty_like(source);
  if (source.numel() == 0) return result;
  check_launch(
      nce::query_gradient(dtype_of(source), source.const_data_ptr(), grad_loss.const_data_ptr(), grad_loss.stride(0),
                          source.size(0), source.size(1), result.mutable_data_ptr(), current_stream(source)),
      "patch_nce_query_gradient");
  return result;
}

at::Tensor patch_nce_key_gradient(at::TensorList queries, at::TensorList keys, const at::Tensor& statistics,
                                  const at::Tensor& grad_loss, int64_t groups, double temperature, int64_t key_offset,
                                  double eps) {
  check_rows(queries, keys, groups, key_offset);
  const at::Tensor& like = queries[0];
  check_statistics(statistics, like, {total_rows(queries), 2}, "statistics");
  check_statistics(grad_loss, like, {total_rows(queries)}, "grad_loss");
  const c10::DeviceGuard guard(like.device());
  const nce::Math math = math_for(like);
  const Arguments arguments{
      to_computing_dtype(queries), to_computing_dtype(keys), groups, key_offset, temperature, eps};

  const at::Tensor row_statistics = statistics.contiguous();
  at::Tensor gradient = at::empty({total_rows(keys), like.size(1)}, like.options().dtype(prepared_dtype(like)));
  for_layers(arguments, [&](const nce::Layers& layers, int64_t first, int64_t count, int64_t first_key, int64_t keys) {
    const at::Tensor workspace = bytes(nce::key_gradient_workspace(layers, math), like);
    const nce::RowWeights weights{row_statistics.narrow(0, first, count).const_data_ptr(),
                                  grad_loss.narrow(0, first, count).const_data_ptr(), grad_loss.stride(0)};
    check_launch(nce::key_gradient(layers, math, weights, gradient.narrow(0, first_key, keys).mutable_data_ptr(),
                                   workspace.mutable_data_ptr(), current_stream(like)),
                 "patch_nce_key_gradient");
  });
  return gradient.to(like.scalar_type());
}

}  // namespace cuda
}  // namespace i2i
