// What comes before and after the sums over columns, row by row: norms and positives before; the loss and the way of
// the gradient through the norm after.
#include "patch_nce_rows.cuh"

namespace i2i {
namespace cuda {
namespace nce {
namespace {

template <typename T>
__device__ __forceinline__ RowRecord<Accumulate<T>> norm_record(const T* x, int channels, double eps) {
  using S = Accumulate<T>;
  const S norm = sqrt(dot(x, x, channels)), longer = norm + static_cast<S>(eps);
  if (norm == 0) return {0, 0, 0, 0};
  return {1 / longer, longer / norm, 0, 0};
}

// In the forward, without weights: the level of the query's positive.
template <typename T>
__device__ __forceinline__ void query_record(const Layers& layers, const RowWeights& weights, int64_t index,
                                             RowRecord<Accumulate<T>>* records) {
  using S = Accumulate<T>;
  const Place place = find_row<false>(layers, index);
  const Layer& layer = layers.layer[place.layer];
  const T* query = elements<T>(layer.queries, place.group, place.row);
  RowRecord<S> record = norm_record(query, layers.channels, layers.eps);
  if (weights.statistics == nullptr) {
    const T* key = elements<T>(layer.keys, place.group, place.row + layers.key_offset);
    const S inverse = norm_record(key, layers.channels, layers.eps).inverse;
    record.level = dot(query, key, layers.channels) * inverse * (record.inverse * static_cast<S>(layers.level_scale));
  } else {
    record.level = static_cast<const S*>(weights.statistics)[2 * index] * static_cast<S>(kLog2E);
    record.weight = static_cast<const S*>(weights.grad_loss)[index * weights.grad_loss_stride] * record.inverse;
  }
  if (lane() == 0) records[index] = record;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_statistics(const Layers layers, const RowWeights weights, int64_t queries, int64_t keys,
                   const Workspace<Accumulate<T>> workspace) {
  const int64_t index = global_warp();
  if (index < queries) {
    query_record<T>(layers, weights, index, workspace.queries);
  } else if (index < queries + keys) {
    const Place place = find_row<true>(layers, index - queries);
    const T* key = elements<T>(layers.layer[place.layer].keys, place.group, place.row);
    const RowRecord<Accumulate<T>> record = norm_record(key, layers.channels, layers.eps);
    if (lane() == 0) workspace.keys[index - queries] = record;
  }
}

// Takes the gradient with respect to a row's unit vector, direction(c), to the row itself:
// (g - unit (unit . g) (|x| + eps) / |x|) / (|x| + eps).
template <typename T, typename Direction>
__device__ __forceinline__ void write_through_norm(const T* x, const RowRecord<Accumulate<T>>& record, int channels,
                                                   T* gradient, Direction direction) {
  using S = Accumulate<T>;
  S along = 0;
  for (int c = lane(); c < channels; c += kWarpSize) along += to_accumulate(x[c]) * record.inverse * direction(c);
  along = warp_sum(along) * record.stretch;
  for (int c = lane(); c < channels; c += kWarpSize) {
    const S unit = to_accumulate(x[c]) * record.inverse;
    gradient[c] = from_accumulate<T>((direction(c) - unit * along) * record.inverse);
  }
}

// The partial results of one row: those of split s are `step` after those of split s - 1.
template <typename S>
struct RowPartials {
  const Partial<S>* sums;
  const S* directions;
  int64_t step;
  int splits, channel_groups;
  int64_t direction_stride;

  __device__ const Partial<S>& at(int split, int group) const { return sums[split * step * channel_groups + group]; }
  __device__ S direction(int split, int channel) const { return directions[split * step * direction_stride + channel]; }
};

template <typename S>
__device__ __forceinline__ RowPartials<S> partials_of(const Layers& layers, const Schedule& schedule,
                                                      const Workspace<S>& workspace, const Side& side,
                                                      const Place& place) {
  const int64_t first = schedule.first_partial[place.layer] + place.group * side.rows + place.row;
  const int64_t stride = direction_stride(layers.channels);
  return {workspace.partials + first * schedule.channel_groups,
          workspace.directions + first * stride,
          layers.groups * side.rows,
          schedule.splits[place.layer],
          schedule.channel_groups,
          stride};
}

// The classes of a row brought together, relative to one anchor: the sum over all but the positive, and the positive.
template <typename S>
struct Classes {
  S anchor, others, positive;
};

// The blocks of another channel group summed the same levels in another order, and may have chosen other anchors: what
// belongs together comes from the same group.
template <typename S>
__device__ __forceinline__ Classes<S> merge(const RowPartials<S>& partials, int group, S positive, S extra_class) {
  S anchor = extra_class > positive ? extra_class : positive;
  for (int s = 0; s < partials.splits; s++) {
    const S other = partials.at(s, group).anchor;
    anchor = other > anchor ? other : anchor;
  }
  S others = exp2(extra_class - anchor);
  for (int s = 0; s < partials.splits; s++) {
    others += partials.at(s, group).sum * exp2(partials.at(s, group).anchor - anchor);
  }
  return {anchor, others, exp2(positive - anchor)};
}

// loss = log(sum over all classes / positive), by log1p so that a small sum of the others keeps its digits.
template <typename S>
__device__ __forceinline__ void write_loss(const Classes<S>& classes, S positive, S* loss, S* statistics) {
  const S above = (classes.anchor - positive) * static_cast<S>(kLn2);
  *loss = above + log1p(classes.others + expm1(-above));
  statistics[0] = *loss + positive * static_cast<S>(kLn2);
  statistics[1] = classes.others / (classes.others + classes.positive);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish(const Layers layers, const Schedule schedule, double extra_class, const ForwardOutputs outputs,
           int64_t queries, const Workspace<Accumulate<T>> workspace) {
  using S = Accumulate<T>;
  const int64_t index = global_warp();
  if (index >= queries) return;
  const Place place = find_row<false>(layers, index);
  const Layer& layer = layers.layer[place.layer];
  const RowPartials<S> partials = partials_of(layers, schedule, workspace, layer.queries, place);
  const RowRecord<S> query = workspace.queries[index];
  const S extra_level = static_cast<S>(extra_class * layers.level_scale);

  Classes<S> classes = merge(partials, 0, query.level, extra_level);
  if (lane() == 0) {
    write_loss(classes, query.level, static_cast<S*>(outputs.loss) + index,
               static_cast<S*>(outputs.statistics) + 2 * index);
  }
  if (outputs.gradient == nullptr) return;

  const T* key = elements<T>(layer.keys, place.group, place.row + layers.key_offset);
  const S key_inverse = workspace.keys[number_of(layer.keys, place.group, place.row + layers.key_offset)].inverse;
  int group = 0;
  const auto direction = [&](int channel) {
    const int its_group = partials.channel_groups > 1 ? channel / kTileChannels : 0;
    if (its_group != group) {
      group = its_group;
      classes = merge(partials, group, query.level, extra_level);
    }
    S sum = -classes.others * key_inverse * to_accumulate(key[channel]);
    for (int s = 0; s < partials.splits; s++) {
      sum += exp2(partials.at(s, group).anchor - classes.anchor) * partials.direction(s, channel);
    }
    return sum / (classes.others + classes.positive) * static_cast<S>(layers.inverse_temperature);
  };
  write_through_norm(elements<T>(layer.queries, place.group, place.row), query, layers.channels,
                     static_cast<T*>(outputs.gradient) + index * layers.channels, direction);
}

// The key whose query is row - key_offset is that one's positive: weight -(probability of all other classes).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    key_finish(const Layers layers, const Schedule schedule, const RowWeights weights, T* gradient, int64_t keys,
               const Workspace<Accumulate<T>> workspace) {
  using S = Accumulate<T>;
  const int64_t index = global_warp();
  if (index >= keys) return;
  const Place place = find_row<true>(layers, index);
  const Layer& layer = layers.layer[place.layer];
  const RowPartials<S> partials = partials_of(layers, schedule, workspace, layer.keys, place);

  const int64_t row = place.row - layers.key_offset;
  const bool has_query = row >= 0 && row < layer.queries.rows;
  const T* query = elements<T>(layer.queries, place.group, has_query ? row : 0);
  S query_weight = 0;
  if (has_query) {
    const int64_t number = number_of(layer.queries, place.group, row);
    query_weight = workspace.queries[number].weight * static_cast<const S*>(weights.statistics)[2 * number + 1];
  }
  const auto direction = [&](int channel) {
    S sum = -query_weight * to_accumulate(query[channel]);
    for (int s = 0; s < partials.splits; s++) sum += partials.direction(s, channel);
    return sum * static_cast<S>(layers.inverse_temperature);
  };
  write_through_norm(elements<T>(layer.keys, place.group, place.row), workspace.keys[index], layers.channels,
                     gradient + index * layers.channels, direction);
}

// A thread per 16 bytes, which may reach over the ends of rows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_rows(const T* gradient, const Accumulate<T>* grad_loss, int64_t grad_loss_stride, int64_t count,
               int64_t channels, T* result) {
  constexpr int kWidth = Vector<T>::kSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (first >= count) return;
  int64_t row = first / channels, channel = first % channels;
  const auto scaled = [&](T value) {
    const T product = from_accumulate<T>(to_accumulate(value) * grad_loss[row * grad_loss_stride]);
    if (++channel == channels) {
      channel = 0;
      row++;
    }
    return product;
  };
  if (first + kWidth <= count) {
    Vector<T> vector = load_vector_streaming(gradient + first);
#pragma unroll
    for (int i = 0; i < kWidth; i++) vector.v[i] = scaled(vector.v[i]);
    store_vector_streaming(result + first, vector);
  } else {
    for (int64_t i = first; i < count; i++) result[i] = scaled(gradient[i]);
  }
}

template <typename T>
int launch_scale(const void* gradient, const void* grad_loss, int64_t grad_loss_stride, int64_t count, int64_t channels,
                 void* result, cudaStream_t stream) {
  const int64_t per_block = int64_t{kThreads} * Vector<T>::kSize;
  return launch(scale_rows<T>, dim3(static_cast<unsigned>((count + per_block - 1) / per_block)), dim3(kThreads), 0,
                stream, static_cast<const T*>(gradient), static_cast<const Accumulate<T>*>(grad_loss), grad_loss_stride,
                count, channels, static_cast<T*>(result));
}

}  // namespace

template <typename T>
int launch_statistics(const Layers& layers, const RowWeights& weights, const Workspace<Accumulate<T>>& workspace,
                      cudaStream_t stream) {
  const int64_t queries = query_count(layers), keys = key_count(layers);
  return launch(row_statistics<T>, blocks_for_warps(queries + keys), dim3(kThreads), 0, stream, layers, weights,
                queries, keys, workspace);
}

template <typename T>
int launch_finish(const Layers& layers, const Schedule& schedule, double extra_class, const ForwardOutputs& outputs,
                  const Workspace<Accumulate<T>>& workspace, cudaStream_t stream) {
  const int64_t queries = query_count(layers);
  return launch(finish<T>, blocks_for_warps(queries), dim3(kThreads), 0, stream, layers, schedule, extra_class, outputs,
                queries, workspace);
}

template <typename T>
int launch_key_finish(const Layers& layers, const Schedule& schedule, const RowWeights& weights, void* gradient,
                      const Workspace<Accumulate<T>>& workspace, cudaStream_t stream) {
  const int64_t keys = key_count(layers);
  return launch(key_finish<T>, blocks_for_warps(keys), dim3(kThreads), 0, stream, layers, schedule, weights,
                static_cast<T*>(gradient), keys, workspace);
}

#define I2I_INSTANTIATE(T)                                                                                            \
  template int launch_statistics<T>(const Layers&, const RowWeights&, const Workspace<Accumulate<T>>&, cudaStream_t); \
  template int launch_finish<T>(const Layers&, const Schedule&, double, const ForwardOutputs&,                        \
                                const Workspace<Accumulate<T>>&, cudaStream_t);                                       \
  template int launch_key_finish<T>(const Layers&, const Schedule&, const RowWeights&, void*,                         \
                                    const Workspace<Accumulate<T>>&, cudaStream_t)
I2I_INSTANTIATE(Bf16);
I2I_INSTANTIATE(float);
I2I_INSTANTIATE(double);
#undef I2I_INSTANTIATE

int query_gradient(Dtype dtype, const void* gradient, const void* grad_loss, int64_t grad_loss_stride, int64_t rows,
                   int64_t channels, void* result, void* stream) {
  const int64_t count = rows * channels;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::kHalf:
      return launch_scale<Half>(gradient, grad_loss, grad_loss_stride, count, channels, result, queue);
    case Dtype::kBf16:
      return launch_scale<Bf16>(gradient, grad_loss, grad_loss_stride, count, channels, result, queue);
    case Dtype::kFloat:
      return launch_scale<float>(gradient, grad_loss, grad_loss_stride, count, channels, result, queue);
    default:
      return launch_scale<double>(gradient, grad_loss, grad_loss_stride, count, channels, result, queue);
  }
}

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
