// instance_norm_act of contiguous maps: a block normalises a plane, which it holds in registers if that fits.
#include "affine.cuh"
#include "instance_norm_act.h"
#include "walk.cuh"

namespace i2i {
namespace cuda {

namespace {

constexpr int kMostThreads = 1024;

// The plane of this block.
template <typename T>
__device__ __forceinline__ Span<T> plane_of_block(int64_t pixels) {
  return Span<T>(blockIdx.x * pixels, (int64_t{blockIdx.x} + 1) * pixels);
}

// Forward. Source is how a block comes by its plane, twice: Held or Streamed.
template <template <typename, int> class Source, typename T, typename S = Accumulate<T>>
__global__ void __launch_bounds__(kMostThreads)
    normalise_planes(const T* x, const T* residual, T* y, S* statistics, int64_t pixels, S eps, S slope) {
  const Span<T> span = plane_of_block<T>(pixels);
  const T* const tensors[] = {x, residual};
  const Source<T, 2> source{tensors, span};
  const S shifts[] = {to_accumulate(x[blockIdx.x * pixels])};
  Moments<S, 1> sums;
  source.template visit<1, Cache::kKeep>([&](int64_t, const auto& packs) { add_moments(sums, packs[0], shifts); });
  sums = reduce_block(sums);
  const Affine<S> affines[] = {{shifts[0] + sums.mean[0], inverse_deviation(sums.m2[0], sums.count, eps), 0}};
  if (threadIdx.x == 0) {
    statistics[blockIdx.x * 2] = affines[0].mean;
    statistics[blockIdx.x * 2 + 1] = affines[0].scale;
  }
  source.template visit<2, Cache::kStream>(
      [&](int64_t element, const auto& packs) { store(y + element, normalise(packs[0], packs[1], affines, slope)); });
}

// Backward, likewise.
template <template <typename, int> class Source, typename T, typename S = Accumulate<T>>
__global__ void __launch_bounds__(kMostThreads)
    plane_gradients(const T* grad, const T* x, T* grad_x, NormParameters norm, Map map, S slope) {
  const Span<T> span = plane_of_block<T>(map.pixels);
  const T* const tensors[] = {grad, x};
  const Source<T, 2> source{tensors, span};
  const Channel<S> channel(norm, map, 0, blockIdx.x);
  const Affine<S> affines[] = {channel.affine()};
  GradientSums<S, 1> sums;
  source.template visit<2, Cache::kKeep>(
      [&](int64_t, const auto& packs) { add_gradients(sums, packs[0], packs[1], affines, slope); });
  sums = reduce_block(sums);
  const S pixels = map.pixels;
  const GradientAffine<S> gradients[] = {instance_gradient(channel, sums.grad[0], sums.product[0], pixels, pixels)};
  source.template visit<2, Cache::kStream>([&](int64_t element, const auto& packs) {
    store(grad_x + element, input_gradient(packs[0], packs[1], affines, gradients, slope));
  });
}

int64_t vectors_of_plane(const Map& map) { return ceil_divide(map.pixels, vector_size(map.dtype)); }

// Whether the registers of a block can hold a plane.
bool is_small(const Map& map) { return vectors_of_plane(map) <= int64_t{kInFlight} * kMostThreads; }

int threads_of_plane(const Map& map) { return threads_for(vectors_of_plane(map), kMostThreads); }

// How the kernels are launched.
template <template <typename, int> class Source, typename T>
struct Planes {
  using S = Accumulate<T>;

  static int forward(const NormForward& pass, cudaStream_t stream) {
    const size_t shared_bytes = kWarp * sizeof(Moments<S, 1>);
    return launch(normalise_planes<Source, T>, dim3(pass.map.images * pass.map.channels),
                  dim3(threads_of_plane(pass.map)), shared_bytes, stream, static_cast<const T*>(pass.x),
                  static_cast<const T*>(pass.residual), static_cast<T*>(pass.y),
                  static_cast<S*>(pass.instance_statistics), pass.map.pixels, static_cast<S>(pass.eps),
                  static_cast<S>(pass.slope));
  }

  static int backward(const NormBackward& pass, cudaStream_t stream) {
    const size_t shared_bytes = kWarp * sizeof(GradientSums<S, 1>);
    return launch(plane_gradients<Source, T>, dim3(pass.map.images * pass.map.channels),
                  dim3(threads_of_plane(pass.map)), shared_bytes, stream, static_cast<const T*>(pass.grad),
                  static_cast<const T*>(pass.x), static_cast<T*>(pass.grad_x), pass.parameters, pass.map,
                  static_cast<S>(pass.slope));
  }
};

template <typename T, typename F>
int with_source(const Map& map, const F& f) {
  return is_small(map) ? f(Planes<Held, T>()) : f(Planes<Streamed, T>());
}

template <typename F>
int with_planes(const Map& map, const F& f) {
  switch (map.dtype) {
    case Dtype::kFloat:
      return with_source<float>(map, f);
    case Dtype::kDouble:
      // Its sums leave no registers to hold a plane.
      return f(Planes<Streamed, double>());
    case Dtype::kBf16:
      return with_source<Bf16>(map, f);
    default:
      return with_source<Half>(map, f);
  }
}

}  // namespace

bool suits_plane_blocks(const Map& map) {
  // Fewer blocks that each read a large plane would leave most of a GPU without work.
  constexpr int64_t kManyPlanes = 128;
  return !map.channels_last && (is_small(map) || map.images * map.channels >= kManyPlanes);
}

int instance_norm_planes(const NormForward& pass, void* stream) {
  return with_planes(pass.map, [&](auto planes) { return planes.forward(pass, static_cast<cudaStream_t>(stream)); });
}

int instance_norm_planes_backward(const NormBackward& pass, void* stream) {
  return with_planes(pass.map, [&](auto planes) { return planes.backward(pass, static_cast<cudaStream_t>(stream)); });
}

}  // namespace cuda
}  // namespace i2i
