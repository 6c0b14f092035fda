// The sums over columns in fp64, for gradcheck: a warp per row, one column after the other, no tiles and no splits.
#include "patch_nce_rows.cuh"

namespace i2i {
namespace cuda {
namespace nce {
namespace {

// Lanes own channels of `direction`, so that it can be added to in memory.
__device__ __forceinline__ void scale_direction(double* direction, int channels, double factor) {
  for (int c = lane(); c < channels; c += kWarpSize) direction[c] = factor == 0 ? 0 : direction[c] * factor;
}

template <bool kKeyGradient>
__global__ void __launch_bounds__(kThreads)
    similarities_double(const Layers layers, int64_t count, const Workspace<double> workspace) {
  const int64_t index = global_warp();
  if (index >= count) return;
  const Place place = find_row<kKeyGradient>(layers, index);
  const Layer& layer = layers.layer[place.layer];
  const Side& columns = side_of<!kKeyGradient>(layer);
  const double* row = elements<double>(side_of<kKeyGradient>(layer), place.group, place.row);
  const RowRecord<double> record = (kKeyGradient ? workspace.keys : workspace.queries)[index];
  const RowRecord<double>* records =
      (kKeyGradient ? workspace.queries : workspace.keys) + number_of(columns, place.group, 0);
  const int64_t positive = place.row + (kKeyGradient ? -layers.key_offset : layers.key_offset);
  const double factor = record.inverse * layers.level_scale;
  const int channels = workspace.directions == nullptr ? 0 : layers.channels;
  double* direction = workspace.directions + index * direction_stride(layers.channels);

  Partial<double> partial{record.level, 0};
  scale_direction(direction, channels, 0);
  for (int64_t j = 0; j < columns.rows; j++) {
    if (j == positive) continue;
    const double* column = elements<double>(columns, place.group, j);
    const double level = dot(row, column, layers.channels) * records[j].inverse * factor;
    if (!kKeyGradient && level > partial.anchor + kAnchorSlack) {
      const double shrink = exp2(partial.anchor - level);
      scale_direction(direction, channels, shrink);
      partial = {level, partial.sum * shrink};
    }
    const double power = exp2(level - (kKeyGradient ? records[j].level : partial.anchor));
    const double weight = power * (kKeyGradient ? records[j].weight : records[j].inverse);
    partial.sum += power;
    for (int c = lane(); c < channels; c += kWarpSize) direction[c] += weight * column[c];
  }
  if (!kKeyGradient && lane() == 0) workspace.partials[index] = partial;
}

}  // namespace

int launch_similarities(const Layers& layers, bool key_gradient, const Workspace<double>& workspace,
                        cudaStream_t stream) {
  const int64_t count = key_gradient ? key_count(layers) : query_count(layers);
  return launch(key_gradient ? similarities_double<true> : similarities_double<false>, blocks_for_warps(count),
                dim3(kThreads), 0, stream, layers, count, workspace);
}

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
