// adalin in passes over the whole map, and instance_norm_act where one block is not enough for a plane.
#include "adalin.h"
#include "affine.cuh"
#include "layout.cuh"

namespace i2i {
namespace cuda {

namespace {

// The kernels that merge an image's partial sums have one block for each image: it alone sees all channels.
constexpr int kMergeThreads = 1024;

// The blocks of a pass that a multiprocessor has room for, at least: one loads while another computes.
constexpr int kBlocks = 2;

// The place of a block's sums of one channel in the workspace [images, splits, channels, 2].
__device__ __forceinline__ int64_t partial_index(const Map& map, const Cut& cut, int64_t image, int64_t split,
                                                 int64_t channel) {
  return ((image * cut.splits + split) * map.channels + channel) * 2;
}

// The affine functions of a thread's channels.
template <typename Layout, typename S>
__device__ __forceinline__ void load_affines(const NormParameters& norm, const Map& map, const Layout& at,
                                             Affine<S> (&affines)[Layout::kChannels]) {
#pragma unroll
  for (int j = 0; j < Layout::kChannels; j++) {
    affines[j] = Channel<S>(norm, map, at.image, at.channel + j).affine();
  }
}

// Forward, pass 1: mean and M2 of every block's part. Means are relative to the channel's first pixel: near the mean as
// a rule, it leaves small numbers, which fp32 sums to more digits.
template <typename Layout, typename T, typename S>
__global__ void __launch_bounds__(Cut::kMostThreads, kBlocks) moments(const T* x, S* partials, Map map, Cut cut) {
  const Layout at(map, cut, blockIdx.x);
  const Pack<S, Layout::kChannels> shifts = unpack(load<Layout::kChannels, Cache::kKeep>(x + at.first_pixel));
  Moments<S, Layout::kChannels> sums;
  at.template visit<Cache::kKeep>({x}, [&](int64_t, const auto& packs) { add_moments(sums, packs[0], shifts.v); });
  if (!at.reduce(sums)) return;
#pragma unroll
  for (int j = 0; j < Layout::kChannels; j++) {
    S* partial = partials + partial_index(map, cut, at.image, at.split, at.channel + j);
    partial[0] = sums.mean[j];
    partial[1] = sums.m2[j];
  }
}

// A channel's moments from those of its splits, in the threads with threadIdx.y == 0.
template <typename S>
__device__ __forceinline__ Moments<S, 1> merge_moments(const S* partials, const Map& map, const Cut& cut,
                                                       int64_t channel, int multiple) {
  Moments<S, 1> sums;
  for (int64_t split = threadIdx.y; split < cut.splits && channel < map.channels; split += blockDim.y) {
    const S* partial = partials + partial_index(map, cut, blockIdx.x, split, channel);
    const Range range = split_range(map.pixels, cut.splits, split, multiple);
    Moments<S, 1> part;
    part.count = range.end - range.begin;
    part.mean[0] = partial[0];
    part.m2[0] = partial[1];
    sums.merge(part);
  }
  return reduce_rows(sums);
}

// Forward, pass 2: the statistics of one image.
template <typename Layout, typename T, typename S>
__global__ void __launch_bounds__(kMergeThreads)
    statistics(const T* x, const S* partials, S* instance, S* layer, Map map, Cut cut, S eps, S correction) {
  const T* first_pixel = x + blockIdx.x * map.channels * map.pixels;
  const S origin = to_accumulate(*first_pixel);
  Moments<S, 1> whole;  // of the image, relative to its first element
  for (int64_t first = 0; first < map.channels; first += blockDim.x) {
    const int64_t channel = first + threadIdx.x;
    Moments<S, 1> sums = merge_moments(partials, map, cut, channel, Layout::kMultiple);
    if (threadIdx.y == 0 && channel < map.channels) {
      const S shift = to_accumulate(first_pixel[channel * Layout::channel_stride(map)]);
      S* of_channel = instance + (blockIdx.x * map.channels + channel) * 2;
      of_channel[0] = shift + sums.mean[0];
      of_channel[1] = inverse_deviation(sums.m2[0], sums.count - correction, eps);
      sums.mean[0] += shift - origin;
      whole.merge(sums);
    }
    __syncthreads();
  }
  if (layer == nullptr) return;
  whole = reduce_block(whole);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    layer[blockIdx.x * 2] = origin + whole.mean[0];
    layer[blockIdx.x * 2 + 1] = inverse_deviation(whole.m2[0], whole.count - correction, eps);
  }
}

// Forward, pass 3. Backwards through the map, whose tail pass 1 has just left in the cache.
template <typename Layout, typename T, typename S>
__global__ void __launch_bounds__(Cut::kMostThreads, kBlocks)
    apply(const T* x, const T* residual, T* y, NormParameters norm, Map map, Cut cut, S slope) {
  const Layout at(map, cut, gridDim.x - 1 - blockIdx.x);
  Affine<S> affines[Layout::kChannels];
  load_affines(norm, map, at, affines);
  at.template visit<Cache::kStream>({x, residual}, [&](int64_t element, const auto& packs) {
    store(y + element, normalise(packs[0], packs[1], affines, slope));
  });
}

// Backward, pass 1: the sums of g and g * (x - mean) of every block's part, g the gradient before the activation.
template <typename Layout, typename T, typename S>
__global__ void __launch_bounds__(Cut::kMostThreads, kBlocks)
    gradient_sums(const T* grad, const T* x, S* partials, NormParameters norm, Map map, Cut cut, S slope) {
  const Layout at(map, cut, blockIdx.x);
  Affine<S> affines[Layout::kChannels];
  load_affines(norm, map, at, affines);
  GradientSums<S, Layout::kChannels> sums;
  at.template visit<Cache::kKeep>(
      {grad, x}, [&](int64_t, const auto& packs) { add_gradients(sums, packs[0], packs[1], affines, slope); });
  if (!at.reduce(sums)) return;
#pragma unroll
  for (int j = 0; j < Layout::kChannels; j++) {
    S* partial = partials + partial_index(map, cut, at.image, at.split, at.channel + j);
    partial[0] = sums.grad[j];
    partial[1] = sums.product[j];
  }
}

// A channel's sums from those of its splits, in the threads with threadIdx.y == 0.
template <typename S>
__device__ __forceinline__ GradientSums<S, 1> merge_gradient_sums(const S* partials, const Map& map, const Cut& cut,
                                                                  int64_t channel) {
  GradientSums<S, 1> sums;
  for (int64_t split = threadIdx.y; split < cut.splits && channel < map.channels; split += blockDim.y) {
    const S* partial = partials + partial_index(map, cut, blockIdx.x, split, channel);
    GradientSums<S, 1> part;
    part.grad[0] = partial[0];
    part.product[0] = partial[1];
    sums.merge(part);
  }
  return reduce_rows(sums);
}

// The outputs of backward pass 2, as in NormBackward.
template <typename S>
struct Gradients {
  S *gamma, *beta, *rho_terms;
  GradientAffine<S>* coefficients;
};

// Writes a channel's gradients of gamma, beta and rho, and returns its share in the sums of the layer norm.
template <typename S>
__device__ __forceinline__ GradientSums<S, 1> parameter_gradients(const Channel<S>& channel,
                                                                  const GradientSums<S, 1>& sums,
                                                                  const Gradients<S>& out, int64_t index) {
  const S grad = sums.grad[0], product = sums.product[0];
  // The sum of g times what the layer norm makes of x, and by how much the instance norm's exceeds it.
  const S shift = (channel.mean - channel.layer_mean) * grad;
  const S layer = channel.layer_inverse * (product + shift);
  const S excess = (channel.inverse - channel.layer_inverse) * product - channel.layer_inverse * shift;
  out.beta[index] = grad;
  out.gamma[index] = multiply_add(channel.rho, excess, layer);
  out.rho_terms[index] = channel.gamma * excess;
  const S share = channel.gamma * (1 - channel.rho);
  GradientSums<S, 1> result;
  result.grad[0] = share * grad;
  result.product[0] = share * layer;
  return result;
}

// Backward, pass 2, one image: the gradients of the parameters, and the coefficients of pass 3.
template <typename S>
__global__ void __launch_bounds__(kMergeThreads)
    gradient_coefficients(const S* partials, NormParameters norm, Gradients<S> out, Map map, Cut cut, S correction) {
  const S pixels = map.pixels, elements = map.pixels * map.channels;
  GradientSums<S, 1> whole;
  for (int64_t first = 0; first < map.channels; first += blockDim.x) {
    const int64_t number = first + threadIdx.x, index = blockIdx.x * map.channels + number;
    const GradientSums<S, 1> sums = merge_gradient_sums(partials, map, cut, number);
    if (threadIdx.y == 0 && number < map.channels) {
      const Channel<S> channel(norm, map, blockIdx.x, number);
      out.coefficients[index] = instance_gradient(channel, sums.grad[0], sums.product[0], pixels, pixels - correction);
      if (norm.layer_statistics != nullptr) whole.merge(parameter_gradients(channel, sums, out, index));
    }
    __syncthreads();
  }
  if (norm.layer_statistics == nullptr) return;
  whole = reduce_block(whole);
  if (threadIdx.y != 0) return;
  for (int64_t number = threadIdx.x; number < map.channels; number += blockDim.x) {
    const Channel<S> channel(norm, map, blockIdx.x, number);
    GradientAffine<S>& gradient = out.coefficients[blockIdx.x * map.channels + number];
    const S slope = -channel.layer_inverse * channel.layer_inverse * whole.product[0] / (elements - correction);
    const S mean = channel.gamma * (1 - channel.rho) * gradient.mean - whole.grad[0] / elements;
    gradient.slope += slope;
    gradient.offset = multiply_add(slope, channel.mean - channel.layer_mean, channel.layer_inverse * mean);
  }
}

// grad_rho: its terms [images, channels] summed over the images.
template <typename S>
__global__ void __launch_bounds__(Cut::kMostThreads, kBlocks) sum_images(const S* terms, S* sums, Map map) {
  const int64_t channel = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (channel >= map.channels) return;
  S sum = 0;
  for (int64_t image = 0; image < map.images; image++) sum += terms[image * map.channels + channel];
  sums[channel] = sum;
}

// Backward, pass 3, backwards through the map.
template <typename Layout, typename T, typename S>
__global__ void __launch_bounds__(Cut::kMostThreads, kBlocks)
    apply_gradient(const T* grad, const T* x, T* grad_x, NormParameters norm, const GradientAffine<S>* coefficients,
                   Map map, Cut cut, S slope) {
  const Layout at(map, cut, gridDim.x - 1 - blockIdx.x);
  Affine<S> affines[Layout::kChannels];
  load_affines(norm, map, at, affines);
  GradientAffine<S> gradients[Layout::kChannels];
#pragma unroll
  for (int j = 0; j < Layout::kChannels; j++) {
    gradients[j] = coefficients[at.image * map.channels + at.channel + j];
  }
  at.template visit<Cache::kStream>({grad, x}, [&](int64_t element, const auto& packs) {
    store(grad_x + element, input_gradient(packs[0], packs[1], affines, gradients, slope));
  });
}

template <typename Layout>
struct Type {
  using type = Layout;
};

// Calls f(Type<Layout>) for the map's layout of T.
template <typename T, typename F>
int with_layout(const Map& map, const F& f) {
  if (!map.channels_last) return f(Type<Planes<T>>());
  if (map.channels % Vector<T>::kSize == 0) return f(Type<Pixels<T, Vector<T>::kSize>>());
  return f(Type<Pixels<T, 1>>());
}

template <typename F>
int with_layout(const Map& map, const F& f) {
  switch (map.dtype) {
    case Dtype::kFloat:
      return with_layout<float>(map, f);
    case Dtype::kDouble:
      return with_layout<double>(map, f);
    case Dtype::kBf16:
      return with_layout<Bf16>(map, f);
    default:
      return with_layout<Half>(map, f);
  }
}

// How the kernels of a norm are launched.
template <typename Layout>
struct Passes {
  using T = typename Layout::Element;
  using S = Accumulate<T>;

  Map map;
  Cut cut;
  cudaStream_t stream;

  dim3 grid() const { return dim3(static_cast<unsigned>(map.images * cut.channel_blocks * cut.splits)); }
  dim3 block() const { return dim3(cut.lanes, cut.rows); }
  size_t shared_bytes(size_t of_thread) const { return cut.lanes * cut.rows * of_thread; }

  // Every row of a merging block takes its share of the splits.
  dim3 merge_block() const {
    unsigned rows = 1;
    while (rows < kWarp && rows < cut.splits) rows *= 2;
    return dim3(kMergeThreads / rows, rows);
  }

  int forward(const NormForward& pass) const {
    const auto* x = static_cast<const T*>(pass.x);
    auto* partials = static_cast<S*>(pass.partials);
    int error = launch(moments<Layout, T, S>, grid(), block(), shared_bytes(sizeof(Moments<S, Layout::kChannels>)),
                       stream, x, partials, map, cut);
    if (error != 0) return error;
    error =
        launch(statistics<Layout, T, S>, dim3(map.images), merge_block(), kMergeThreads * sizeof(Moments<S, 1>), stream,
               x, partials, static_cast<S*>(pass.instance_statistics), static_cast<S*>(pass.layer_statistics), map, cut,
               static_cast<S>(pass.eps), static_cast<S>(pass.unbiased));
    if (error != 0) return error;
    return launch(apply<Layout, T, S>, grid(), block(), 0, stream, x, static_cast<const T*>(pass.residual),
                  static_cast<T*>(pass.y), pass.parameters, map, cut, static_cast<S>(pass.slope));
  }

  int backward(const NormBackward& pass) const {
    const auto* grad = static_cast<const T*>(pass.grad);
    const auto* x = static_cast<const T*>(pass.x);
    auto* partials = static_cast<S*>(pass.partials);
    const auto slope = static_cast<S>(pass.slope);
    const Gradients<S> out{static_cast<S*>(pass.grad_gamma), static_cast<S*>(pass.grad_beta),
                           static_cast<S*>(pass.rho_terms), static_cast<GradientAffine<S>*>(pass.coefficients)};
    int error =
        launch(gradient_sums<Layout, T, S>, grid(), block(), shared_bytes(sizeof(GradientSums<S, Layout::kChannels>)),
               stream, grad, x, partials, pass.parameters, map, cut, slope);
    if (error != 0) return error;
    error =
        launch(gradient_coefficients<S>, dim3(map.images), merge_block(), kMergeThreads * sizeof(GradientSums<S, 1>),
               stream, partials, pass.parameters, out, map, cut, static_cast<S>(pass.unbiased));
    if (error != 0) return error;
    if (pass.parameters.layer_statistics != nullptr) {
      error = launch(sum_images<S>, dim3(ceil_divide(map.channels, Cut::kMostThreads)), dim3(Cut::kMostThreads), 0,
                     stream, out.rho_terms, static_cast<S*>(pass.grad_rho), map);
      if (error != 0) return error;
    }
    return launch(apply_gradient<Layout, T, S>, grid(), block(), 0, stream, grad, x, static_cast<T*>(pass.grad_x),
                  pass.parameters, out.coefficients, map, cut, slope);
  }
};

}  // namespace

int norm_forward(const NormForward& pass, void* stream) {
  return with_layout(pass.map, [&](auto layout) {
    using Layout = typename decltype(layout)::type;
    return Passes<Layout>{pass.map, cut_of(pass.map), static_cast<cudaStream_t>(stream)}.forward(pass);
  });
}

int norm_backward(const NormBackward& pass, void* stream) {
  return with_layout(pass.map, [&](auto layout) {
    using Layout = typename decltype(layout)::type;
    return Passes<Layout>{pass.map, cut_of(pass.map), static_cast<cudaStream_t>(stream)}.backward(pass);
  });
}

}  // namespace cuda
}  // namespace i2i
