// Small kernels with known results, and small kernels that break a rule.
#include "../cuda/device.cuh"
#include "selftest.h"

namespace i2i {
namespace cuda {
namespace {

constexpr int kThreads = 96;

// What selftest kernels take: a and b as each says, out [kThreads] where nothing else stands.
using Kernel = void (*)(const void*, const void*, float*);

__device__ void store_fragment(const float (&c)[4], float* out) {  // [16, 8]
  const int group = threadIdx.x / 4, column = 2 * (threadIdx.x % 4);
  out[group * 8 + column] = c[0];
  out[group * 8 + column + 1] = c[1];
  out[(group + 8) * 8 + column] = c[2];
  out[(group + 8) * 8 + column + 1] = c[3];
}

// The 16-byte rows of a matrix in shared memory.
__device__ unsigned char* copy_rows(unsigned char* shared, const void* matrix, int bytes) {
  for (int at = 16 * threadIdx.x; at < bytes; at += 16 * blockDim.x)
    copy_async16(shared + at, static_cast<const unsigned char*>(matrix) + at, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  return shared;
}

// out [16, 8] = a [16, 16] x b [8, 16] transposed, bf16, both by ldmatrix.
__global__ void bf16_product(const void* a, const void* b, float* out) {
  const unsigned char* rows_a = copy_rows(shared_memory(), a, 512);
  const unsigned char* rows_b = copy_rows(shared_memory() + 512, b, 256);
  const int lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[4];
  load_matrix_x4(fragment_a, rows_a + lane % 16 * 32 + lane / 16 * 16);
  load_matrix_x4(fragment_b, rows_b + lane % 8 * 32 + lane / 8 % 2 * 16);
  float c[4] = {};
  mma_bf16(c, fragment_a, fragment_b[0], fragment_b[1]);
  store_fragment(c, out);
}

// out [16, 8] = a [16, 16] x b [16, 8], bf16, b by ldmatrix with transposition.
__global__ void bf16_product_transposed(const void* a, const void* b, float* out) {
  const unsigned char* rows_a = copy_rows(shared_memory(), a, 512);
  const unsigned char* rows_b = copy_rows(shared_memory() + 512, b, 256);
  const int lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[4];
  load_matrix_x4(fragment_a, rows_a + lane % 16 * 32 + lane / 16 * 16);
  load_matrix_x4_transposed(fragment_b, rows_b + lane % 16 * 16);
  float c[4] = {};
  mma_bf16(c, fragment_a, fragment_b[0], fragment_b[1]);
  store_fragment(c, out);
}

// out [16, 8] = a [16, 8] x b [8, 8], fp32 of which the hardware ignores the low 13 bits.
__global__ void tf32_product(const void* a, const void* b, float* out) {
  const auto* rows_a = static_cast<const uint32_t*>(a);
  const auto* rows_b = static_cast<const uint32_t*>(b);
  const int group = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t fragment_a[4] = {rows_a[group * 8 + t], rows_a[(group + 8) * 8 + t], rows_a[group * 8 + t + 4],
                                  rows_a[(group + 8) * 8 + t + 4]};
  float c[4] = {};
  mma_tf32(c, fragment_a, rows_b[t * 8 + group], rows_b[(t + 4) * 8 + group]);
  store_fragment(c, out);
}

// out [32, 5]: a [32] floats through every shuffle and vote.
__global__ void warp_functions(const void* a, const void*, float* out) {
  const float value = static_cast<const float*>(a)[threadIdx.x];
  float* row = out + threadIdx.x * 5;
  row[0] = __shfl_xor_sync(~0u, value, 5);
  row[1] = __shfl_down_sync(~0u, value, 3);
  row[2] = __shfl_sync(~0u, value, 7);
  row[3] = static_cast<float>(__ballot_sync(~0u, value > 0) & 0xffffu);
  row[4] = static_cast<float>(2 * __any_sync(~0u, value > 0) + __all_sync(~0u, value > 0));
}

// out [5, n]: a [n] floats rounded to tf32, bf16 and fp16, and b's n halves and n bf16; n = kThreads.
__global__ void conversions(const void* a, const void* b, float* out) {
  const float value = static_cast<const float*>(a)[threadIdx.x];
  const auto* bits = static_cast<const uint16_t*>(b);
  const int i = threadIdx.x;
  out[i] = __uint_as_float(round_to_tf32(value));
  out[kThreads + i] = to_float(from_float<Bf16>(value));
  out[2 * kThreads + i] = to_float(from_float<Half>(value));
  out[3 * kThreads + i] = to_float(Half{bits[i]});
  out[4 * kThreads + i] = to_float(Bf16{bits[kThreads + i]});
}

__device__ float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

__device__ void exchange(float* out, bool with_barrier) {
  shared_floats()[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = shared_floats()[blockDim.x - 1 - threadIdx.x];
}

__global__ void exchange_with_barrier(const void*, const void*, float* out) { exchange(out, true); }

__global__ void exchange_without_barrier(const void*, const void*, float* out) { exchange(out, false); }

__global__ void read_before_write(const void*, const void*, float* out) {
  out[threadIdx.x] = shared_floats()[threadIdx.x];
}

// a [4 * kThreads] floats, of which each thread reads the first of its copy.
__device__ void copy_and_read(const void* a, float* out, bool with_wait) {
  copy_async16(shared_floats() + 4 * threadIdx.x, static_cast<const float*>(a) + 4 * threadIdx.x, true);
  copy_async_commit();
  if (with_wait) copy_async_wait<0>();
  out[threadIdx.x] = shared_floats()[4 * threadIdx.x];
}

__global__ void copy_with_wait(const void* a, const void*, float* out) { copy_and_read(a, out, true); }

__global__ void copy_without_wait(const void* a, const void*, float* out) { copy_and_read(a, out, false); }

__global__ void copy_out_of_bounds(const void* a, const void*, float*) {
  copy_async16(shared_floats() + 4 * (threadIdx.x + 1), a, true);
}

__global__ void copy_to_odd_address(const void* a, const void*, float*) { copy_async16(shared_floats() + 1, a, true); }

__global__ void write_out_of_bounds(const void*, const void*, float*) { shared_floats()[4 * kThreads] = 0; }

__global__ void write_output_out_of_bounds(const void*, const void*, float* out) { out[kThreads] = 0; }

__global__ void barrier_not_reached_by_all(const void*, const void*, float*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_barriers_at_once(const void*, const void*, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 0;
    __syncthreads();
  }
}

__global__ void shuffle_not_reached_by_all(const void*, const void*, float* out) {
  if (threadIdx.x % 32 == 0) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}

__global__ void shuffle_from_an_ended_lane(const void*, const void*, float* out) {
  if (threadIdx.x % 32 != 0) out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 0);
}

__global__ void trap(const void*, const void*, float*) { __trap(); }

struct Test {
  const char* name;
  Kernel kernel;
  int threads;
};

constexpr Test kTests[] = {
    {"bf16_product", bf16_product, 32},
    {"bf16_product_transposed", bf16_product_transposed, 32},
    {"tf32_product", tf32_product, 32},
    {"warp_functions", warp_functions, 32},
    {"conversions", conversions, kThreads},
    {"exchange_with_barrier", exchange_with_barrier, kThreads},
    {"exchange_without_barrier", exchange_without_barrier, kThreads},
    {"read_before_write", read_before_write, kThreads},
    {"copy_with_wait", copy_with_wait, kThreads},
    {"copy_without_wait", copy_without_wait, kThreads},
    {"copy_out_of_bounds", copy_out_of_bounds, kThreads},
    {"copy_to_odd_address", copy_to_odd_address, kThreads},
    {"write_out_of_bounds", write_out_of_bounds, kThreads},
    {"write_output_out_of_bounds", write_output_out_of_bounds, kThreads},
    {"barrier_not_reached_by_all", barrier_not_reached_by_all, kThreads},
    {"two_barriers_at_once", two_barriers_at_once, kThreads},
    {"shuffle_not_reached_by_all", shuffle_not_reached_by_all, kThreads},
    {"shuffle_from_an_ended_lane", shuffle_from_an_ended_lane, kThreads},
    {"trap", trap, kThreads},
};

}  // namespace

int launch_selftest(const std::string& name, const void* a, const void* b, float* out) {
  for (const Test& test : kTests)
    if (test.name == name) return launch(test.kernel, dim3(1), dim3(test.threads), 16 * kThreads, nullptr, a, b, out);
  return -1;
}

}  // namespace cuda
}  // namespace i2i
