// The order of the launches of PatchNCE, how their work is cut, and their scratch memory.
#include <algorithm>

#include "patch_nce.cuh"

namespace i2i {
namespace cuda {
namespace nce {
namespace {

// Blocks aimed at where rows alone give fewer: two on each of 132 multiprocessors. A constant, so that the order of
// sums and with it every bit of the results is the same on all devices.
constexpr int64_t kBlocksAimedAt = 264;
// Of a split: with fewer, what it saves is lost again on its partial results.
constexpr int64_t kLeastColumns = 128;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

const Side& rows_of(const Layer& layer, bool key_gradient) { return key_gradient ? layer.keys : layer.queries; }

const Side& columns_of(const Layer& layer, bool key_gradient) { return key_gradient ? layer.queries : layer.keys; }

// The columns are cut into as many splits as fill the device once, evenly, and only between tiles.
Schedule make_schedule(const Layers& layers, Math math, bool key_gradient, bool with_gradient) {
  Schedule schedule = {};
  const bool in_tiles = math != Math::kDouble;
  schedule.channel_groups =
      in_tiles && with_gradient ? static_cast<int>(ceil_divide(layers.channels, kTileChannels)) : 1;
  int64_t blocks[kMaxLayers] = {}, all_blocks = 0;
  for (int l = 0; l < layers.count; l++) {
    blocks[l] =
        layers.groups * ceil_divide(rows_of(layers.layer[l], key_gradient).rows, kTileRows) * schedule.channel_groups;
    all_blocks += blocks[l];
  }
  const int64_t wanted = std::max<int64_t>(kBlocksAimedAt / all_blocks, 1);
  int64_t first_partial = 0;
  for (int l = 0; l < layers.count; l++) {
    const int64_t worthwhile = std::max<int64_t>(columns_of(layers.layer[l], key_gradient).rows / kLeastColumns, 1);
    schedule.splits[l] = in_tiles ? static_cast<int>(std::min(wanted, worthwhile)) : 1;
    schedule.first_block[l + 1] = schedule.first_block[l] + blocks[l] * schedule.splits[l];
    schedule.first_partial[l] = first_partial;
    first_partial += schedule.splits[l] * layers.groups * rows_of(layers.layer[l], key_gradient).rows;
  }
  return schedule;
}

int64_t end_of(const Layers& layers, const Side& last) { return last.first + layers.groups * last.rows; }

int64_t partial_rows(const Layers& layers, const Schedule& schedule, bool key_gradient) {
  const int last = layers.count - 1;
  return schedule.first_partial[last] +
         schedule.splits[last] * layers.groups * rows_of(layers.layer[last], key_gradient).rows;
}

// Hands out parts of the scratch memory; from null on it only counts.
class Allotment {
 public:
  explicit Allotment(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename U>
  U* take(int64_t count) {
    constexpr size_t kAlignment = 128;
    const size_t begin = used_;
    used_ += (count * sizeof(U) + kAlignment - 1) / kAlignment * kAlignment;
    return memory_ == nullptr ? nullptr : reinterpret_cast<U*>(memory_ + begin);
  }

  size_t used() const { return used_; }

 private:
  unsigned char* memory_;
  size_t used_ = 0;
};

// 65,536 queries and keys of one layer, 256 channels, with gradient: 2 x 1.0 MB of records, 0.5 MB of partial sums and
// 67.1 MB of directions; the outputs are 0.8 MB and, in bf16, 33.6 MB of gradient: 104 MB in all.
template <typename S>
Workspace<S> allot(Allotment& memory, const Layers& layers, const Schedule& schedule, bool key_gradient,
                   bool with_gradient) {
  const Layer& last = layers.layer[layers.count - 1];
  const int64_t partials = partial_rows(layers, schedule, key_gradient);
  Workspace<S> workspace = {};
  workspace.queries = memory.take<RowRecord<S>>(end_of(layers, last.queries));
  workspace.keys = memory.take<RowRecord<S>>(end_of(layers, last.keys));
  if (!key_gradient) workspace.partials = memory.take<Partial<S>>(partials * schedule.channel_groups);
  if (with_gradient) workspace.directions = memory.take<S>(partials * direction_stride(layers.channels));
  return workspace;
}

size_t workspace_bytes(const Layers& layers, Math math, bool key_gradient, bool with_gradient) {
  const Schedule schedule = make_schedule(layers, math, key_gradient, with_gradient);
  Allotment counting(nullptr);
  if (math == Math::kDouble) {
    allot<double>(counting, layers, schedule, key_gradient, with_gradient);
  } else {
    allot<float>(counting, layers, schedule, key_gradient, with_gradient);
  }
  return counting.used();
}

int sum_over_columns(const Layers& layers, Math math, bool key_gradient, const Schedule& schedule,
                     const Workspace<float>& workspace, cudaStream_t stream) {
  return launch_similarities(layers, math, key_gradient, schedule, workspace, stream);
}

int sum_over_columns(const Layers& layers, Math, bool key_gradient, const Schedule&, const Workspace<double>& workspace,
                     cudaStream_t stream) {
  return launch_similarities(layers, key_gradient, workspace, stream);
}

template <typename T>
int run_forward(const Layers& layers, Math math, double extra_class, const ForwardOutputs& outputs, void* memory,
                cudaStream_t stream) {
  const bool with_gradient = outputs.gradient != nullptr;
  const Schedule schedule = make_schedule(layers, math, false, with_gradient);
  Allotment allotment(memory);
  const auto workspace = allot<Accumulate<T>>(allotment, layers, schedule, false, with_gradient);
  int error = launch_statistics<T>(layers, RowWeights{}, workspace, stream);
  if (error == 0) error = sum_over_columns(layers, math, false, schedule, workspace, stream);
  if (error == 0) error = launch_finish<T>(layers, schedule, extra_class, outputs, workspace, stream);
  return error;
}

template <typename T>
int run_key_gradient(const Layers& layers, Math math, const RowWeights& weights, void* gradient, void* memory,
                     cudaStream_t stream) {
  const Schedule schedule = make_schedule(layers, math, true, true);
  Allotment allotment(memory);
  const auto workspace = allot<Accumulate<T>>(allotment, layers, schedule, true, true);
  int error = launch_statistics<T>(layers, weights, workspace, stream);
  if (error == 0) error = sum_over_columns(layers, math, true, schedule, workspace, stream);
  if (error == 0) error = launch_key_finish<T>(layers, schedule, weights, gradient, workspace, stream);
  return error;
}

}  // namespace

size_t forward_workspace(const Layers& layers, Math math, bool with_gradient) {
  return workspace_bytes(layers, math, false, with_gradient);
}

size_t key_gradient_workspace(const Layers& layers, Math math) { return workspace_bytes(layers, math, true, true); }

int forward(const Layers& layers, Math math, double extra_class, const ForwardOutputs& outputs, void* workspace,
            void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (math == Math::kBf16) return run_forward<Bf16>(layers, math, extra_class, outputs, workspace, queue);
  if (math == Math::kDouble) return run_forward<double>(layers, math, extra_class, outputs, workspace, queue);
  return run_forward<float>(layers, math, extra_class, outputs, workspace, queue);
}

int key_gradient(const Layers& layers, Math math, const RowWeights& weights, void* gradient, void* workspace,
                 void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (math == Math::kBf16) return run_key_gradient<Bf16>(layers, math, weights, gradient, workspace, queue);
  if (math == Math::kDouble) return run_key_gradient<double>(layers, math, weights, gradient, workspace, queue);
  return run_key_gradient<float>(layers, math, weights, gradient, workspace, queue);
}

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
