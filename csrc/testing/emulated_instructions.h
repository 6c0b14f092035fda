// The emulated twins of the instructions in cuda/device.cuh, which includes this file after its types.
#pragma once

#include "emulation.h"

namespace i2i {
namespace cuda {

inline unsigned char* shared_memory() { return emulation::shared_begin(); }

void copy_async16(void* shared, const void* global, bool valid);
void copy_async_commit();
// Waits until at most `pending` of this thread's groups are on their way.
void copy_async_wait_for(int pending);
template <int N>
void copy_async_wait() {
  copy_async_wait_for(N);
}

void load_matrix_x4(uint32_t (&r)[4], const void* row);
void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row);
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

uint32_t round_to_tf32(float value);
float exp2_fast(float value);
float to_float(Bf16 value);
float to_float(Half value);
Bf16 bf16_of(float value);
Half half_of(float value);
uint32_t pack_bf16(float low, float high);

// Fails if the address is no multiple of 16.
void check_aligned(const void* address, const char* what);

template <typename T>
Vector<T> load_vector(const T* source) {
  check_aligned(source, "load_vector");
  Vector<T> vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

template <typename T>
void store_vector(T* target, const Vector<T>& vector) {
  check_aligned(target, "store_vector");
  std::memcpy(target, &vector, sizeof(vector));
}

template <typename T>
Vector<T> load_vector_streaming(const T* source) {
  return load_vector(source);
}

template <typename T>
void store_vector_streaming(T* target, const Vector<T>& vector) {
  store_vector(target, vector);
}

}  // namespace cuda
}  // namespace i2i
