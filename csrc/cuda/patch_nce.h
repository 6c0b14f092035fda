// PatchNCE on CUDA devices: the launchers, as launch/patch_nce.cpp sees them. Plain C++ types only; a stream is a
// cudaStream_t, and what is returned a cudaError, 0 if all is well.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace i2i {
namespace cuda {
namespace nce {

// Which instructions multiply, and with that the dtype T of features and gradients: kBf16 takes bf16; kTf32 and kFloat
// take fp32, rounded to tf32 or not; kDouble takes fp64. S is fp64 for kDouble, else fp32.
enum class Math { kBf16, kTf32, kFloat, kDouble };

// The queries or the keys of one layer: [groups * rows, channels] T.
struct Side {
  const void* features;
  int64_t stride;  // elements from row to row
  int64_t first;   // rows of this side in the layers before this one
  int64_t rows;    // of one group
};

struct Layer {
  Side queries, keys;
};

constexpr int kMaxLayers = 16;
constexpr double kLog2E = 1.4426950408889634;

// The layers of one set of launches; a kernel takes them by value.
struct Layers {
  Layer layer[kMaxLayers];
  int count;
  int channels;
  int64_t groups;
  int64_t key_offset;
  double inverse_temperature;
  double level_scale;  // inverse_temperature * kLog2E
  double eps;
};

// Bytes of scratch memory that forward() and key_gradient() need.
size_t forward_workspace(const Layers& layers, Math math, bool with_gradient);
size_t key_gradient_workspace(const Layers& layers, Math math);

// What patch_nce returns, for R query rows in all.
struct ForwardOutputs {
  void* loss;        // [R] S
  void* statistics;  // [R, 2] S
  void* gradient;    // [R, channels] T, or null
};

// `extra_class` is the similarity of one more class without a key, -infinity for none.
int forward(const Layers& layers, Math math, double extra_class, const ForwardOutputs& outputs, void* workspace,
            void* stream);

// What the key gradient takes from the forward and from autograd.
struct RowWeights {
  const void* statistics;    // [R, 2] S
  const void* grad_loss;     // [R] S
  int64_t grad_loss_stride;  // 0 for a gradient that all rows share
};

// gradient [all key rows, channels] T.
int key_gradient(const Layers& layers, Math math, const RowWeights& weights, void* gradient, void* workspace,
                 void* stream);

// result = gradient [rows, channels] times grad_loss, row by row. Both tensors are contiguous, at multiples of 16
// bytes.
int query_gradient(Dtype dtype, const void* gradient, const void* grad_loss, int64_t grad_loss_stride, int64_t rows,
                   int64_t channels, void* result, void* stream);

}  // namespace nce
}  // namespace cuda
}  // namespace i2i
