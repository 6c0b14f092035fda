// The tensor-core kernel of PatchNCE: FlashAttention with V = K. A block keeps 64 rows in shared memory and streams the
// columns of its group past them in tiles: S = rows x columns^T, weights from S in registers, sums += weights x columns
// out of the same tile. Features are multiplied as they are; their norms enter in fp32, into S and into the weights.
#include "patch_nce_products.cuh"

namespace i2i {
namespace cuda {
namespace nce {
namespace {

// What one block does.
template <typename Element>
struct Work {
  Rows<Element> rows, columns;
  int first_row;
  int first_tile, last_tile;  // of the columns
  int positive_shift;         // row r and column r + positive_shift are positives of each other
  int channel_group;
  int partial;  // where the results of the first row stand
};

template <typename Product, bool kKeyGradient>
__device__ __forceinline__ Work<typename Product::Element> find_work(const Layers& layers, const Schedule& schedule) {
  int index = 0;
  while (blockIdx.x >= schedule.first_block[index + 1]) index++;
  const Layer& layer = layers.layer[index];
  const Side& rows = kKeyGradient ? layer.keys : layer.queries;
  const Side& columns = kKeyGradient ? layer.queries : layer.keys;
  const int splits = schedule.splits[index], row_tiles = static_cast<int>((rows.rows + kTileRows - 1) / kTileRows);

  // Blocks of the same group follow one another, so that they find its columns in the L2 cache.
  int64_t block = blockIdx.x - schedule.first_block[index];
  Work<typename Product::Element> work;
  work.channel_group = block % schedule.channel_groups;
  block /= schedule.channel_groups;
  const int split = block % splits;
  block /= splits;
  work.first_row = block % row_tiles * kTileRows;
  const int64_t group = block / row_tiles;

  work.rows = rows_of<typename Product::Element>(rows, group, layers.channels);
  work.columns = rows_of<typename Product::Element>(columns, group, layers.channels);
  const int64_t tiles = (columns.rows + Product::kColumns - 1) / Product::kColumns;
  work.first_tile = static_cast<int>(split * tiles / splits);
  work.last_tile = static_cast<int>((split + 1) * tiles / splits);
  work.positive_shift = static_cast<int>(kKeyGradient ? -layers.key_offset : layers.key_offset);
  work.partial =
      static_cast<int>(schedule.first_partial[index] + (split * layers.groups + group) * rows.rows) + work.first_row;
  return work;
}

// similarities += the warp's 16 rows x columns^T, over the channels of the tiles. Fragments of 16-bit and 32-bit
// elements are loaded alike: 32 bytes of channels are the depth of one instruction of either kind.
template <typename Product, int kChannels>
__device__ __forceinline__ void multiply_tiles(Accumulators<Product::kColumns / 8>& similarities,
                                               const unsigned char* rows, const unsigned char* columns) {
  constexpr int kStride = kRowBytes<typename Product::Element, kChannels>;
  constexpr int kDepth = kChannels * static_cast<int>(sizeof(typename Product::Element)) / (2 * kChunkBytes);
  const unsigned char* my_row = rows + (warp() * 16 + lane() % 16) * kStride + lane() / 16 * kChunkBytes;
  const unsigned char* my_column = columns + (lane() % 8 + lane() / 16 * 8) * kStride + lane() / 8 % 2 * kChunkBytes;
#pragma unroll 4
  for (int k = 0; k < kDepth; k++) {
    uint32_t a[4];
    load_matrix_x4(a, my_row + k * 2 * kChunkBytes);
#pragma unroll
    for (int n = 0; n < Product::kColumns / 16; n++) {
      uint32_t b[4];
      load_matrix_x4(b, my_column + n * 16 * kStride + k * 2 * kChunkBytes);
      Product::multiply(similarities[2 * n], a, b[0], b[1]);
      Product::multiply(similarities[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// The row of the tile that a lane holds elements of, for h = 0 and 1.
__device__ __forceinline__ int lane_row(int h) { return warp() * 16 + lane() / 4 + 8 * h; }

// Those two rows.
struct LaneRows {
  int positive;     // the column that is left out for h = 0; 8 more for h = 1
  float factor[2];  // from a similarity with a unit column to a level
  float anchor[2];
  float sum[2];  // over the lane's own columns
};

template <typename Element, int kChannels>
__device__ __forceinline__ LaneRows lane_rows(const unsigned char* rows, const Work<Element>& work, float scale) {
  LaneRows mine;
  mine.positive = work.first_row + lane_row(0) + work.positive_shift;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const RowRecord<float>& record = record_of<Element, kChannels>(rows, lane_row(h));
    mine.factor[h] = record.inverse * scale;
    mine.anchor[h] = record.level;
    mine.sum[h] = 0;
  }
  return mine;
}

// Turns raw similarities into levels above the row's anchor, in the key gradient above the level of the column. Fused,
// a small difference of large levels keeps its digits. -infinity for positives and for columns beyond the group.
template <typename Element, int kChannels, bool kKeyGradient, int kTiles>
__device__ __forceinline__ void to_levels(Accumulators<kTiles>& values, const LaneRows& mine,
                                          const unsigned char* columns, int first_column, int column_count) {
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int column = first_column + column_of(i, e), h = e / 2;
      const RowRecord<float>& record = record_of<Element, kChannels>(columns, column_of(i, e));
      const float base = kKeyGradient ? record.level : mine.anchor[h];
      const bool left_out = column >= column_count || column == mine.positive + 8 * h;
      values[i][e] = left_out ? -INFINITY : fmaf(values[i][e] * record.inverse, mine.factor[h], -base);
    }
  }
}

// Raises the anchor of rows whose levels are far above it, and rescales what was summed so far.
template <int kTiles, int kSumTiles>
__device__ __forceinline__ void raise_anchors(LaneRows& mine, Accumulators<kSumTiles>& sums,
                                              Accumulators<kTiles>& levels) {
  float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) top[e / 2] = fmaxf(top[e / 2], levels[i][e]);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(kAllLanes, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(kAllLanes, top[h], 2));
  }
  if (!__any_sync(kAllLanes, fmaxf(top[0], top[1]) > kAnchorSlack)) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float rise = top[h] > kAnchorSlack ? top[h] : 0;
    const float factor = exp2_fast(-rise);
    mine.anchor[h] += rise;
    mine.sum[h] *= factor;
#pragma unroll
    for (int n = 0; n < kSumTiles; n++) {
      sums[n][2 * h] *= factor;
      sums[n][2 * h + 1] *= factor;
    }
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      levels[i][2 * h] -= rise;
      levels[i][2 * h + 1] -= rise;
    }
  }
}

// Turns levels into the weights of the columns as they are, which includes the columns' norms.
template <typename Element, int kChannels, bool kKeyGradient, int kTiles>
__device__ __forceinline__ void to_weights(Accumulators<kTiles>& values, LaneRows& mine, const unsigned char* columns) {
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const RowRecord<float>& column = record_of<Element, kChannels>(columns, column_of(i, e));
      const float power = exp2_fast(values[i][e]);
      mine.sum[e / 2] += power;
      values[i][e] = power * (kKeyGradient ? column.weight : column.inverse);
    }
  }
}

// Two floats that are stored as one.
struct alignas(8) FloatPair {
  float first, second;
};

template <typename Element, bool kKeyGradient, int kSumTiles>
__device__ __forceinline__ void store_results(LaneRows& mine, const Accumulators<kSumTiles>& sums,
                                              const Work<Element>& work, const Workspace<float>& workspace,
                                              int channels, int channel_groups) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane_row(h);
    mine.sum[h] += __shfl_xor_sync(kAllLanes, mine.sum[h], 1);
    mine.sum[h] += __shfl_xor_sync(kAllLanes, mine.sum[h], 2);
    if (work.first_row + row >= work.rows.count) continue;
    const int64_t partial = work.partial + row;
    if (!kKeyGradient && lane() % 4 == 0) {
      workspace.partials[partial * channel_groups + work.channel_group] = {mine.anchor[h], mine.sum[h]};
    }
    if (workspace.directions == nullptr) continue;
    float* direction = workspace.directions + partial * direction_stride(channels);
#pragma unroll
    for (int n = 0; n < kSumTiles; n++) {
      const int channel = work.channel_group * kTileChannels + column_of(n, 0);
      if (channel < channels) {
        *reinterpret_cast<FloatPair*>(direction + channel) = {sums[n][2 * h], sums[n][2 * h + 1]};
      }
    }
  }
}

template <typename Product, int kChannels>
constexpr size_t shared_bytes() {
  return (kTileRows + Product::kStages * Product::kColumns) * kRowBytes<typename Product::Element, kChannels>;
}

// One step is a tile of columns, or with more than kChannels channels a part of them; the part that the sums are of
// comes last, so that it is still there when the weights are known.
template <typename Product, int kChannels, bool kKeyGradient>
__global__ void __launch_bounds__(kThreads, 2)
    similarities(const Layers layers, const Schedule schedule, const Workspace<float> workspace) {
  using Element = typename Product::Element;
  constexpr int kStages = Product::kStages, kColumns = Product::kColumns;
  constexpr int kStageBytes = kColumns * kRowBytes<Element, kChannels>;
  unsigned char* const rows = shared_memory();
  unsigned char* const stages = rows + kTileRows * kRowBytes<Element, kChannels>;
  const Work<Element> work = find_work<Product, kKeyGradient>(layers, schedule);
  const int parts = (layers.channels + kChannels - 1) / kChannels;
  const int steps = (work.last_tile - work.first_tile) * parts;

  const auto channel_of = [&](int step) { return (work.channel_group + 1 + step) % parts * kChannels; };
  const auto load_rows = [&](int step) {
    load_tile<Element, kChannels, kTileRows>(rows, work.rows, kKeyGradient ? workspace.keys : workspace.queries,
                                             work.first_row, channel_of(step), layers.channels);
  };
  const auto load_columns = [&](int step) {
    load_tile<Element, kChannels, kColumns>(
        stages + step % kStages * kStageBytes, work.columns, kKeyGradient ? workspace.queries : workspace.keys,
        (work.first_tile + step / parts) * kColumns, channel_of(step), layers.channels);
  };

  LaneRows mine;
  Accumulators<kChannels / 8> sums = {};
  Accumulators<kColumns / 8> values = {};
  load_rows(0);
  load_columns(0);
  copy_async_commit();
  for (int step = 0; step < steps; step++) {
    unsigned char* const columns = stages + step % kStages * kStageBytes;
    if (kStages > 1) {
      if (step + 1 < steps) load_columns(step + 1);
      copy_async_commit();
    }
    copy_async_wait<kStages - 1>();
    if (step == 0 || parts > 1) round_tile<Product, kChannels, kTileRows>(rows);
    round_tile<Product, kChannels, kColumns>(columns);
    __syncthreads();
    if (step == 0) mine = lane_rows<Element, kChannels>(rows, work, static_cast<float>(layers.level_scale));
    multiply_tiles<Product, kChannels>(values, rows, columns);
    if ((step + 1) % parts == 0) {
      const int first_column = (work.first_tile + step / parts) * kColumns;
      to_levels<Element, kChannels, kKeyGradient>(values, mine, columns, first_column, work.columns.count);
      if constexpr (!kKeyGradient) raise_anchors(mine, sums, values);
      to_weights<Element, kChannels, kKeyGradient>(values, mine, columns);
      if (workspace.directions != nullptr) Product::template add_weighted<kChannels>(sums, values, columns);
      for (float (&tile)[4] : values) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    }
    __syncthreads();
    if (step + 1 < steps && parts > 1) load_rows(step + 1);
    if (step + 1 < steps && kStages == 1) load_columns(step + 1);
    copy_async_commit();
  }
  store_results<Element, kKeyGradient>(mine, sums, work, workspace, layers.channels, schedule.channel_groups);
}

template <typename Product, int kChannels, bool kKeyGradient>
int launch_instance(const Layers& layers, const Schedule& schedule, const Workspace<float>& workspace,
                    cudaStream_t stream) {
  return launch(similarities<Product, kChannels, kKeyGradient>,
                dim3(static_cast<unsigned>(schedule.first_block[layers.count])), dim3(kThreads),
                shared_bytes<Product, kChannels>(), stream, layers, schedule, workspace);
}

template <typename Product>
int launch_math(const Layers& layers, bool key_gradient, const Schedule& schedule, const Workspace<float>& workspace,
                cudaStream_t stream) {
  constexpr int kNarrow = 128;
  if (layers.channels <= kNarrow) {
    return key_gradient ? launch_instance<Product, kNarrow, true>(layers, schedule, workspace, stream)
                        : launch_instance<Product, kNarrow, false>(layers, schedule, workspace, stream);
  }
  return key_gradient ? launch_instance<Product, kTileChannels, true>(layers, schedule, workspace, stream)
                      : launch_instance<Product, kTileChannels, false>(layers, schedule, workspace, stream);
}

}  // namespace

int launch_similarities(const Layers& layers, Math math, bool key_gradient, const Schedule& schedule,
                        const Workspace<float>& workspace, cudaStream_t stream) {
  switch (math) {
    case Math::kBf16:
      return launch_math<Bf16Product>(layers, key_gradient, schedule, workspace, stream);
    case Math::kTf32:
      return launch_math<Tf32Product<false>>(layers, key_gradient, schedule, workspace, stream);
    default:
      return launch_math<Tf32Product<true>>(layers, key_gradient, schedule, workspace, stream);
  }
}

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
