// How the launch files meet the CUDA runtime: through libc10 and integers, without a CUDA header.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "cuda/dtype.h"

namespace i2i {
namespace cuda {

// The current stream of the tensor's device, as a cudaStream_t; null for the CPU tensors of the emulation. The kernel
// is launched on the current device: every op holds a c10::DeviceGuard of its tensors while it launches.
inline void* current_stream(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(tensor.device()).native_handle();
}

// The tensor itself, or a copy where its address is none for vector loads: a slice of a batch of odd-sized images.
inline at::Tensor aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor : tensor.clone();
}

// Raises if a launcher of cuda/ returned something else than cudaSuccess.
inline void check_launch(int error, const char* op) {
  TORCH_CHECK(error == 0, op, ": the CUDA runtime refused the launch with cudaError ", error,
              " (CUDA's documentation of cudaError_t says what it is).");
}

// The floating point dtype of the tensor, in the words of the launchers.
inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBf16;
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    default:
      TORCH_CHECK_VALUE(false, "no kernel computes in ", tensor.scalar_type(), "; use fp16, bf16, fp32 or fp64.");
  }
}

}  // namespace cuda
}  // namespace i2i
