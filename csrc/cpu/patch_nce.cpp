// PatchNCE on the CPU. Forward: blocks of queries stay, keys stream past; key gradient: the other way round. Every
// block is walked by one thread in one order, so that results do not depend on the number of threads.
#include <ATen/Functions.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "parallel.h"
#include "tiles.h"

namespace i2i {
namespace cpu {
namespace {

constexpr double kLog2E = 1.44269504088896340736;

template <typename S>
struct Problem {
  std::vector<Rows<S>> queries, keys;  // by image; images are numbered over all layers
  int64_t channels, key_offset;
  double temperature;
  S eps;

  // What a similarity is multiplied by to be an exponent of e, and of 2.
  S scale() const { return static_cast<S>(1 / temperature); }
  S scale2() const { return static_cast<S>(kLog2E / temperature); }
};

// Cuts the rows of all layers into images.
template <typename S>
std::vector<Rows<S>> images_of(at::TensorList layers, int64_t groups) {
  std::vector<Rows<S>> images;
  int64_t first = 0, first_padded = 0;
  for (const at::Tensor& rows : layers) {
    const int64_t count = rows.size(0) / groups;
    for (int64_t group = 0; group < groups; group++) {
      images.push_back(
          {rows.const_data_ptr<S>() + group * count * rows.stride(0), rows.stride(0), count, first, first_padded});
      first += count;
      first_padded += padded(count);
    }
  }
  return images;
}

template <typename S>
int64_t count_rows(const std::vector<Rows<S>>& images) {
  return images.back().first + images.back().count;
}

// Rows of a stationary block. 128 use the caches well; few rows in all are cut finer, so that many threads find work.
template <typename S>
int64_t block_rows(const std::vector<Rows<S>>& images) {
  return std::clamp<int64_t>(padded(count_rows(images) / 32), 32, 128);
}

// A row's negatives so far: mass is the sum of 2^((similarity - anchor) * scale) over them. The anchor is the
// positive's similarity, so that the loss of a row that is nearly solved keeps its digits, until a negative exceeds it
// by far.
template <typename S>
struct Negatives {
  S positive;
  S anchor;
  S mass;
};

// An exponent that is far above the anchor's, and leaves room for the sum of very many such powers of two.
constexpr int kFar = 64;

constexpr int64_t kGreatestStride = int64_t{1} << 30;  // oneDNN counts in 32 bits

// What a thread works in, for blocks of `block` rows.
template <typename S>
struct Workspace {
  Workspace(int64_t block, int64_t channels)
      : memory(at::empty({block * (3 * padded(channels) + kTileRows)}, c10::CppTypeToScalarType<S>::value)),
        negatives(block),
        norms(block) {
    const int64_t row_size = padded(channels);
    unit = memory.template mutable_data_ptr<S>();
    positives = unit + block * row_size;
    sums = positives + block * row_size;
    weights = sums + block * row_size;
  }

  at::Tensor memory;
  S* unit;       // [block, padded channels] the stationary rows, normalised
  S* positives;  // [block, padded channels] their positives, normalised
  S* sums;       // [block, padded channels] weighted sums of the streamed unit rows; then gradients
  S* weights;    // [block, kTileRows] similarities, then weights
  std::vector<Negatives<S>> negatives;
  std::vector<S> norms;  // of the raw stationary rows
};

// Where the forward writes; gradient is null if it is not wanted.
template <typename S>
struct Outputs {
  S* loss;
  S* statistics;
  S* gradient;
};

template <typename S>
I2I_INLINE Negatives<S> first_negatives(S positive, S scale, const std::optional<double>& diagonal) {
  if (!diagonal) return {positive, positive, 0};
  const S exponent = (static_cast<S>(*diagonal) - positive) * scale;
  if (exponent > kFar) return {positive, static_cast<S>(*diagonal), 1};
  return {positive, positive, std::exp2(exponent)};
}

// Takes the anchor up to the greatest of these similarities if that exceeds it by far.
template <typename S>
I2I_INLINE void raise_anchor(const S* similarities, int64_t width, S scale, Negatives<S>& row, S* sums,
                             int64_t row_size) {
  Vector<S> greatest = Vector<S>{} + row.anchor;
  for (int64_t j = 0; j < width; j += kLanes<S>) {
    const Vector<S> next = load(similarities + j);
    greatest = next > greatest ? next : greatest;
  }
  const S anchor = greatest_of<S>(greatest);
  if (!((anchor - row.anchor) * scale > kFar)) return;
  const S shrink = std::exp2((row.anchor - anchor) * scale);
  row.mass *= shrink;
  row.anchor = anchor;
  scale_row(sums, row_size, shrink);
}

// Adds to the row's mass the weights 2^((similarity - anchor) * scale); leaves them times the keys' inverse norms.
template <typename S>
I2I_INLINE void weigh_keys(S* similarities, int64_t width, S scale, const S* inverses, Negatives<S>& row) {
  Vector<S> mass{};
  for (int64_t j = 0; j < width; j += kLanes<S>) {
    const Vector<S> weight = exp2_of<S>((load(similarities + j) - row.anchor) * scale);
    store<S>(similarities + j, weight * load(inverses + j));
    mass += weight;
  }
  row.mass += sum_of<S>(mass);
}

// Writes loss and statistics of a row; then its gradient with respect to the raw query, if wanted.
template <typename S>
I2I_INLINE void finish_query(const Problem<S>& problem, const Negatives<S>& row, int64_t index, const S* unit,
                             const S* positive, S norm, S* sums, const Outputs<S>& outputs) {
  const S behind = (row.positive - row.anchor) * problem.scale2();  // 0, or far below it
  const S power = std::exp2(behind), total = row.mass + power, others = row.mass / total;
  const S loss = std::log1p(row.mass + (power - 1)) - behind / static_cast<S>(kLog2E);
  outputs.loss[index] = loss;
  outputs.statistics[2 * index] = row.positive * problem.scale() + loss;
  outputs.statistics[2 * index + 1] = others;
  if (outputs.gradient == nullptr) return;
  const int64_t row_size = padded(problem.channels);
  for (int64_t c = 0; c < row_size; c += kLanes<S>)
    store<S>(sums + c, (load(sums + c) / total - others * load(positive + c)) * problem.scale());
  through_normalisation(sums, unit, row_size, norm, problem.eps);
  std::memcpy(outputs.gradient + index * problem.channels, sums, problem.channels * sizeof(S));
}

// The rows of one tile of keys: similarities, weights, and their sums if the gradient is wanted.
template <typename S>
I2I_INLINE void meet_keys(const Problem<S>& problem, const Streamed<S>& keys, const Block& block, const Block& tile,
                          bool with_gradient, Workspace<S>& work) {
  const int64_t width = padded(tile.count), row_size = padded(problem.channels);
  multiply(block.count, width, problem.channels, work.unit, row_size, keys.tile_columns(tile), width, work.weights,
           kTileRows, false);
  for (int64_t i = 0; i < block.count; i++) {
    S* weights = work.weights + i * kTileRows;
    const int64_t positive = block.first + i + problem.key_offset - tile.first;
    if (positive >= 0 && positive < tile.count) weights[positive] = -std::numeric_limits<S>::infinity();
    std::fill(weights + tile.count, weights + width, -std::numeric_limits<S>::infinity());
    raise_anchor(weights, width, problem.scale2(), work.negatives[i], work.sums + i * row_size, row_size);
    weigh_keys(weights, width, problem.scale2(), keys.tile_inverses(tile), work.negatives[i]);
  }
  if (!with_gradient) return;
  multiply(block.count, problem.channels, tile.count, work.weights, kTileRows, keys.tile_rows(tile),
           keys.images[tile.image].stride, work.sums, row_size, true);
}

template <typename S>
I2I_INLINE void forward_block(const Problem<S>& problem, const Streamed<S>& keys, const Block& block,
                              const std::optional<double>& diagonal, const Outputs<S>& outputs, Workspace<S>& work) {
  const Rows<S>& queries = problem.queries[block.image];
  const int64_t row_size = padded(problem.channels);
  // The norms of the keys are not needed here, and overwritten by those of the queries.
  normalise(problem.keys[block.image], block.first + problem.key_offset, block.count, problem.channels, problem.eps,
            work.positives, work.norms.data());
  normalise(queries, block.first, block.count, problem.channels, problem.eps, work.unit, work.norms.data());
  std::fill(work.sums, work.sums + block.count * row_size, S(0));
  for (int64_t i = 0; i < block.count; i++) {
    const S positive = dot(work.unit + i * row_size, work.positives + i * row_size, row_size);
    work.negatives[i] = first_negatives(positive, problem.scale2(), diagonal);
  }
  for (int64_t first = 0; first < problem.keys[block.image].count; first += kTileRows)
    meet_keys(problem, keys, block, keys.tile(block.image, first), outputs.gradient != nullptr, work);
  for (int64_t i = 0; i < block.count; i++)
    finish_query(problem, work.negatives[i], queries.first + block.first + i, work.unit + i * row_size,
                 work.positives + i * row_size, work.norms[i], work.sums + i * row_size, outputs);
}

// What the key gradient knows of every query row.
template <typename S>
struct QueryFacts {
  const S* statistics;  // [R, 2]
  const S* grad_loss;   // [R]
};

// A key's similarities to a tile of queries become what each adds to the gradient of the unit key, but for 1 / tau.
template <typename S>
I2I_INLINE void weigh_queries(S* similarities, int64_t width, S scale, const S* logs, const S* grads) {
  for (int64_t j = 0; j < width; j += kLanes<S>)
    store<S>(similarities + j,
             exp2_of<S>((load(similarities + j) * scale - load(logs + j)) * static_cast<S>(kLog2E)) * load(grads + j));
}

template <typename S>
I2I_INLINE void meet_queries(const Problem<S>& problem, const Streamed<S>& queries, const Block& block,
                             const Block& tile, const QueryFacts<S>& facts, Workspace<S>& work) {
  const int64_t width = padded(tile.count), row_size = padded(problem.channels);
  const int64_t first = problem.queries[tile.image].first + tile.first;
  multiply(block.count, width, problem.channels, work.unit, row_size, queries.tile_columns(tile), width, work.weights,
           kTileRows, false);
  const S* inverses = queries.tile_inverses(tile);
  S logs[kTileRows] = {}, grads[kTileRows] = {};
  for (int64_t j = 0; j < tile.count; j++) {
    logs[j] = facts.statistics[2 * (first + j)];
    grads[j] = facts.grad_loss[first + j] * inverses[j];
  }
  for (int64_t i = 0; i < block.count; i++) {
    S* weights = work.weights + i * kTileRows;
    weigh_queries(weights, width, problem.scale(), logs, grads);
    const int64_t own = block.first + i - problem.key_offset - tile.first;  // the query whose positive this key is
    if (own >= 0 && own < tile.count) weights[own] = -facts.statistics[2 * (first + own) + 1] * grads[own];
  }
  multiply(block.count, problem.channels, tile.count, work.weights, kTileRows, queries.tile_rows(tile),
           queries.images[tile.image].stride, work.sums, row_size, true);
}

template <typename S>
I2I_INLINE void key_block(const Problem<S>& problem, const Streamed<S>& queries, const Block& block,
                          const QueryFacts<S>& facts, S* gradient, Workspace<S>& work) {
  const Rows<S>& keys = problem.keys[block.image];
  const int64_t row_size = padded(problem.channels);
  normalise(keys, block.first, block.count, problem.channels, problem.eps, work.unit, work.norms.data());
  std::fill(work.sums, work.sums + block.count * row_size, S(0));
  for (int64_t first = 0; first < problem.queries[block.image].count; first += kTileRows)
    meet_queries(problem, queries, block, queries.tile(block.image, first), facts, work);
  for (int64_t i = 0; i < block.count; i++) {
    S* sums = work.sums + i * row_size;
    scale_row(sums, row_size, problem.scale());
    through_normalisation(sums, work.unit + i * row_size, row_size, work.norms[i], problem.eps);
    std::memcpy(gradient + (keys.first + block.first + i) * problem.channels, sums, problem.channels * sizeof(S));
  }
}

// The functions that are compiled for several instruction sets; all that they call is inlined.
#define I2I_DEFINE(S)                                                                                                  \
  I2I_CLONES void pack(const Streamed<S>& streamed, const Block& tile, S* strip) { pack_tile(streamed, tile, strip); } \
  I2I_CLONES void forward(const Problem<S>& problem, const Streamed<S>& keys, const Block& block,                      \
                          const std::optional<double>& diagonal, const Outputs<S>& outputs, Workspace<S>& work) {      \
    forward_block(problem, keys, block, diagonal, outputs, work);                                                      \
  }                                                                                                                    \
  I2I_CLONES void key_gradient(const Problem<S>& problem, const Streamed<S>& queries, const Block& block,              \
                               const QueryFacts<S>& facts, S* gradient, Workspace<S>& work) {                          \
    key_block(problem, queries, block, facts, gradient, work);                                                         \
  }
I2I_DEFINE(float)
I2I_DEFINE(double)
#undef I2I_DEFINE

// Runs f(block, workspace) for all blocks of the stationary rows, in parallel.
template <typename S, typename F>
void for_blocks(const std::vector<Rows<S>>& images, int64_t channels, const F& f) {
  const int64_t block_size = block_rows(images);
  const std::vector<Block> blocks = cut(images, block_size);
  parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    Workspace<S> work(block_size, channels);
    for (int64_t i = begin; i < end; i++) f(blocks[i], work);
  });
}

template <typename S>
Streamed<S> stream(const std::vector<Rows<S>>& images, int64_t channels, S eps) {
  const Streamed<S> streamed(images, channels, eps);
  const std::vector<Block> tiles = cut(images, kTileRows);
  parallel_for(0, static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<S> strip(kLanes<S> * padded(channels));
    for (int64_t i = begin; i < end; i++) pack(streamed, tiles[i], strip.data());
  });
  return streamed;
}

template <typename S>
Problem<S> problem_of(at::TensorList queries, at::TensorList keys, int64_t groups, double temperature,
                      int64_t key_offset, double eps) {
  return {images_of<S>(queries, groups),
          images_of<S>(keys, groups),
          queries[0].size(1),
          key_offset,
          temperature,
          static_cast<S>(eps)};
}

template <typename S>
void run_forward(const Problem<S>& problem, const std::optional<double>& diagonal, const at::Tensor& loss,
                 const at::Tensor& statistics, const at::Tensor& gradient) {
  const Outputs<S> outputs{loss.mutable_data_ptr<S>(), statistics.mutable_data_ptr<S>(),
                           gradient.size(0) > 0 ? gradient.mutable_data_ptr<S>() : nullptr};
  const Streamed<S> keys = stream(problem.keys, problem.channels, problem.eps);
  for_blocks(problem.queries, problem.channels,
             [&](const Block& block, Workspace<S>& work) { forward(problem, keys, block, diagonal, outputs, work); });
}

template <typename S>
void run_key_gradient(const Problem<S>& problem, const at::Tensor& statistics, const at::Tensor& grad_loss,
                      const at::Tensor& gradient) {
  const QueryFacts<S> facts{statistics.const_data_ptr<S>(), grad_loss.const_data_ptr<S>()};
  const Streamed<S> queries = stream(problem.queries, problem.channels, problem.eps);
  for_blocks(problem.keys, problem.channels, [&](const Block& block, Workspace<S>& work) {
    key_gradient(problem, queries, block, facts, gradient.mutable_data_ptr<S>(), work);
  });
}

// The rows in the dtype that is computed in, none on top of another or absurdly far apart: copies of fp16, bf16 and
// expanded rows, and of a single row, which may have any stride.
std::vector<at::Tensor> exact(at::TensorList layers) {
  std::vector<at::Tensor> copies;
  for (const at::Tensor& layer : layers) {
    const at::Tensor rows = layer.to(statistics_dtype(layer));
    copies.push_back(rows.stride(0) < rows.size(1) || rows.stride(0) > kGreatestStride ? rows.contiguous() : rows);
  }
  return copies;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_nce(at::TensorList queries, at::TensorList keys, int64_t groups,
                                                         double temperature, int64_t key_offset, double eps,
                                                         std::optional<double> diagonal, bool with_gradient) {
  check_rows(queries, keys, groups, key_offset);
  const int64_t rows = total_rows(queries);
  const auto options = queries[0].options().dtype(statistics_dtype(queries[0]));
  const at::Tensor loss = at::empty({rows}, options), statistics = at::empty({rows, 2}, options);
  const at::Tensor gradient = at::empty({with_gradient ? rows : 0, queries[0].size(1)}, options);
  const std::vector<at::Tensor> exact_queries = exact(queries), exact_keys = exact(keys);
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    run_forward(problem_of<S>(exact_queries, exact_keys, groups, temperature, key_offset, eps), diagonal, loss,
                statistics, gradient);
  };
  loss.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
  return {loss, statistics, gradient.to(prepared_dtype(queries[0]))};
}

at::Tensor patch_nce_query_gradient(const at::Tensor& gradient, const at::Tensor& grad_loss) {
  TORCH_CHECK_VALUE(gradient.dim() == 2 && gradient.is_floating_point(), "gradient has shape ", gradient.sizes(),
                    " and is ", gradient.scalar_type(), "; it must be [rows, C] and floating point.");
  check_statistics(grad_loss, gradient, {gradient.size(0)}, "grad_loss");
  at::Tensor product = at::empty(gradient.sizes(), gradient.options());
  return at::mul_out(product, gradient, grad_loss.unsqueeze(1));
}

at::Tensor patch_nce_key_gradient(at::TensorList queries, at::TensorList keys, const at::Tensor& statistics,
                                  const at::Tensor& grad_loss, int64_t groups, double temperature, int64_t key_offset,
                                  double eps) {
  check_rows(queries, keys, groups, key_offset);
  const int64_t rows = total_rows(queries);
  check_statistics(statistics, queries[0], {rows, 2}, "statistics");
  check_statistics(grad_loss, queries[0], {rows}, "grad_loss");
  const at::Tensor gradient = at::empty({total_rows(keys), queries[0].size(1)}, statistics.options());
  const std::vector<at::Tensor> exact_queries = exact(queries), exact_keys = exact(keys);
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    run_key_gradient(problem_of<S>(exact_queries, exact_keys, groups, temperature, key_offset, eps),
                     statistics.contiguous(), grad_loss.contiguous(), gradient);
  };
  gradient.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
  return gradient.to(queries[0].scalar_type());
}

}  // namespace cpu
}  // namespace i2i
