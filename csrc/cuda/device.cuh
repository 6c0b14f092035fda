// What kernels are written with: the instructions that CUDA C++ has no name for, 16-byte vectors and dtypes. With
// I2I_EMULATED the same names come from testing/emulation.h and the file compiles as plain C++, each thread a fibre.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef I2I_EMULATED
#include "../testing/emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace i2i {
namespace cuda {

struct Bf16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// 16 bytes of T, moved by one instruction.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// The dtype that T is computed and summed in.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

}  // namespace cuda
}  // namespace i2i

#ifdef I2I_EMULATED
#include "../testing/emulated_instructions.h"
#else

namespace i2i {
namespace cuda {

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes to shared memory in the background, zeros if !valid. Both addresses are multiples of 16; `global` is
// not read if !valid.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most N of this thread's groups are on their way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and gets elements
// 2 * (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed on its way.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] x b [16, 8], bf16 with fp32 sums, in the fragment layouts of mma.m16n8k16.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 8] x b [8, 8], tf32 with fp32 sums, in the fragment layouts of mma.m16n8k8. The low 13 bits of
// operands are ignored: round_to_tf32 first.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

// 2 to the power of value, to 2 ulp; 0 where that is below the normal numbers.
__device__ __forceinline__ float exp2_fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ float to_float(Bf16 value) {
  // In words that the compiler cannot see through: else it widens vectors as soon as they are loaded, and spills.
  float result;
  asm("mov.b32 %0, {0, %1};\n" : "=f"(result) : "h"(value.bits));
  return result;
}

__device__ __forceinline__ float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(result) : "h"(value.bits));
  return result;
}

__device__ __forceinline__ Bf16 bf16_of(float value) {
  Bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(result.bits) : "f"(value));
  return result;
}

__device__ __forceinline__ Half half_of(float value) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(result.bits) : "f"(value));
  return result;
}

// Two bf16 in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

template <typename T>
__device__ __forceinline__ Vector<T> vector_of(uint4 bits) {
  Vector<T> vector;
  memcpy(&vector, &bits, sizeof(vector));
  return vector;
}

template <typename T>
__device__ __forceinline__ uint4 bits_of(const Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, sizeof(bits));
  return bits;
}

// Adjacent elements at an address that is a multiple of 16.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* source) {
  return vector_of<T>(*reinterpret_cast<const uint4*>(source));
}

template <typename T>
__device__ __forceinline__ void store_vector(T* target, const Vector<T>& vector) {
  *reinterpret_cast<uint4*>(target) = bits_of(vector);
}

// Streaming: for what is not read again soon, so that it does not push other things out of the cache.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector_streaming(const T* source) {
  return vector_of<T>(__ldcs(reinterpret_cast<const uint4*>(source)));
}

template <typename T>
__device__ __forceinline__ void store_vector_streaming(T* target, const Vector<T>& vector) {
  __stcs(reinterpret_cast<uint4*>(target), bits_of(vector));
}

// Launches the kernel; returns the cudaError, 0 if all is well.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
           Arguments... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  cudaGetLastError();  // told here; the next launch must not find it again
  return error;
}

}  // namespace cuda
}  // namespace i2i

#endif

namespace i2i {
namespace cuda {

__device__ __forceinline__ float to_float(float value) { return value; }

// Rounds to the nearest T, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float value) {
  return bf16_of(value);
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return half_of(value);
}

template <typename T>
__device__ __forceinline__ float to_accumulate(T value) {
  return to_float(value);
}
__device__ __forceinline__ double to_accumulate(double value) { return value; }

template <typename T>
__device__ __forceinline__ T from_accumulate(Accumulate<T> value) {
  return from_float<T>(value);
}
template <>
__device__ __forceinline__ double from_accumulate<double>(double value) {
  return value;
}

}  // namespace cuda
}  // namespace i2i
