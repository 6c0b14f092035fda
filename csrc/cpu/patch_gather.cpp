// Patches gathered from feature maps on the CPU, and their gradients put back.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "parallel.h"
#include "vectors.h"

namespace i2i {
namespace cpu {
namespace {

// Channels that are moved together. Planes of a power of two of bytes lie in the same sets of a cache, which has few
// ways: more planes at once push each other out of it.
constexpr int64_t kChannels = 8;
// Elements that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

struct Map {
  int64_t images, channels, places;

  int64_t channel_blocks() const { return (channels + kChannels - 1) / kChannels; }
};

// The patches at one place: order[first .. last), in the order in which they were asked for.
struct Run {
  int64_t place, first, last;
};

struct Runs {
  std::vector<int64_t> order;
  std::vector<Run> runs;  // by place
};

// The ids as a pointer, every one inside the map.
const int64_t* checked_ids(const at::Tensor& ids, int64_t places) {
  const int64_t* data = ids.const_data_ptr<int64_t>();
  for (int64_t p = 0; p < ids.numel(); p++)
    TORCH_CHECK_VALUE(data[p] >= 0 && data[p] < places, "ids[", p, "] is ", data[p], "; the map has the places 0 to ",
                      places - 1, ".");
  return data;
}

// The patches in the order of their places, which is the one in which memory is read and written fastest.
std::vector<int64_t> order_by_place(const int64_t* ids, int64_t patches) {
  std::vector<int64_t> order(patches);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [ids](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  return order;
}

Runs group_by_place(const int64_t* ids, int64_t patches) {
  Runs grouped{order_by_place(ids, patches), {}};
  const std::vector<int64_t>& order = grouped.order;
  for (int64_t i = 0; i < patches; i++) {
    if (i == 0 || ids[order[i]] != ids[order[i - 1]]) grouped.runs.push_back({ids[order[i]], i, i});
    grouped.runs.back().last = i + 1;
  }
  return grouped;
}

// Runs f(first, last) over parts of 0 .. count, each item of `cost` elements.
template <typename F>
void in_parallel(int64_t count, int64_t cost, const F& f) {
  parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost)), f);
}

// `count` planes [count, places] to their columns of patches [P, channels].
template <typename T>
I2I_INLINE void gather_block(const Map& map, const T* planes, const int64_t* ids, const std::vector<int64_t>& order,
                             int64_t count, T* out) {
  for (const int64_t p : order) {
    const T* from = planes + ids[p];
    T* to = out + p * map.channels;
    for (int64_t c = 0; c < count; c++) to[c] = from[c * map.places];
  }
}

// planes [N, C, places] to patches [N, P, C].
template <typename T>
void gather_planes(const Map& map, const T* planes, const int64_t* ids, int64_t patches, T* out) {
  const std::vector<int64_t> order = order_by_place(ids, patches);
  in_parallel(map.images * map.channel_blocks(), kChannels * patches, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / map.channel_blocks(), first = task % map.channel_blocks() * kChannels;
      const T* from = planes + (image * map.channels + first) * map.places;
      T* to = out + image * patches * map.channels + first;
      const int64_t count = std::min(kChannels, map.channels - first);
      if (count == kChannels) {  // a number that the compiler knows unrolls the loop
        gather_block(map, from, ids, order, kChannels, to);
      } else {
        gather_block(map, from, ids, order, count, to);
      }
    }
  });
}

// pixels [N, places, C] to patches [N, P, C].
template <typename T>
void gather_pixels(const Map& map, const T* pixels, const int64_t* ids, int64_t patches, T* out) {
  in_parallel(map.images * patches, map.channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      std::memcpy(out + row * map.channels, pixels + (row / patches * map.places + ids[row % patches]) * map.channels,
                  map.channels * sizeof(T));
  });
}

// The sum over a run of the channels first .. first + count of its patches; patches [P, C] of one image.
template <typename T>
void sum_run(const Runs& grouped, const Run& run, const T* patches, int64_t channels, int64_t first, int64_t count,
             T* sums) {
  at::opmath_type<T> exact[kChannels] = {};
  for (int64_t i = run.first; i < run.last; i++) {
    const T* patch = patches + grouped.order[i] * channels + first;
    for (int64_t c = 0; c < count; c++) exact[c] += static_cast<at::opmath_type<T>>(patch[c]);
  }
  for (int64_t c = 0; c < count; c++) sums[c] = static_cast<T>(exact[c]);
}

// patches [N, P, C] to planes [N, C, places].
template <typename T>
void scatter_planes(const Map& map, const Runs& grouped, const T* patches, T* planes) {
  const int64_t image_size = static_cast<int64_t>(grouped.order.size()) * map.channels;
  in_parallel(map.images * map.channel_blocks(), kChannels * map.places, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / map.channel_blocks(), first = task % map.channel_blocks() * kChannels;
      const int64_t count = std::min(kChannels, map.channels - first);
      T* to = planes + (image * map.channels + first) * map.places;
      std::memset(to, 0, count * map.places * sizeof(T));
      for (const Run& run : grouped.runs) {
        T sums[kChannels];
        sum_run(grouped, run, patches + image * image_size, map.channels, first, count, sums);
        for (int64_t c = 0; c < count; c++) to[c * map.places + run.place] = sums[c];
      }
    }
  });
}

// patches [N, P, C] to pixels [N, places, C].
template <typename T>
void scatter_pixels(const Map& map, const Runs& grouped, const T* patches, T* pixels) {
  const int64_t image_size = static_cast<int64_t>(grouped.order.size()) * map.channels;
  in_parallel(map.images * map.places, map.channels, [&](int64_t begin, int64_t end) {
    std::memset(pixels + begin * map.channels, 0, (end - begin) * map.channels * sizeof(T));
    for (int64_t image = begin / map.places; image * map.places < end; image++) {
      const int64_t first_pixel = image * map.places;
      for (const Run& run : grouped.runs) {
        const int64_t pixel = first_pixel + run.place;
        if (pixel < begin || pixel >= end) continue;
        for (int64_t c = 0; c < map.channels; c += kChannels)
          sum_run(grouped, run, patches + image * image_size, map.channels, c, std::min(kChannels, map.channels - c),
                  pixels + pixel * map.channels + c);
      }
    }
  });
}

}  // namespace

at::Tensor patch_gather(const at::Tensor& features, const at::Tensor& ids) {
  check_map(features, "features");
  check_ids(ids, features);
  const Map map{features.size(0), features.size(1), features.size(2) * features.size(3)};
  const at::Tensor dense_ids = ids.contiguous();
  const int64_t* places = checked_ids(dense_ids, map.places);
  const int64_t patches = ids.size(0);
  at::Tensor out = at::empty({map.images, patches, map.channels}, features.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "patch_gather", [&] {
    const auto gather = features.is_contiguous() ? gather_planes<scalar_t> : gather_pixels<scalar_t>;
    gather(map, features.const_data_ptr<scalar_t>(), places, patches, out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

at::Tensor patch_gather_backward(const at::Tensor& grad, const at::Tensor& ids, int64_t height, int64_t width,
                                 bool channels_last) {
  check_ids(ids, grad);
  TORCH_CHECK_VALUE(
      grad.dim() == 3 && grad.size(1) == ids.size(0) && grad.is_floating_point() && height > 0 && width > 0,
      "grad has shape ", grad.sizes(), " and is ", grad.scalar_type(), "; for ", ids.size(0), " ids and a map of ",
      height, " x ", width, " it must be [N, ", ids.size(0), ", C] and floating point, and the map not empty.");
  const Map map{grad.size(0), grad.size(2), height * width};
  const at::Tensor dense_ids = ids.contiguous(), dense_grad = grad.contiguous();
  const Runs grouped = group_by_place(checked_ids(dense_ids, map.places), ids.size(0));
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor out = at::empty({map.images, map.channels, height, width}, grad.options().memory_format(format));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "patch_gather_backward", [&] {
    const auto scatter = channels_last ? scatter_pixels<scalar_t> : scatter_planes<scalar_t>;
    scatter(map, grouped, dense_grad.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

}  // namespace cpu
}  // namespace i2i
