// CUDA C++ for the host compiler, so that the very kernels run where there is no GPU: every thread of a block is a
// fibre that runs until it waits for others. Blocks run one after the other in random order; which warp runs next, how
// long it stays ahead of the others and the order of its lanes are random too, all from a seed. What CUDA leaves
// undefined is NaN or a sentence: shared memory that was never written, copies that nobody waited for, addresses out of
// bounds, barriers that not all threads reach. An error ends the launch with an exception.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

// Those of the running fibre.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace i2i {
namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// When the copies of copy_async16 land: at once, or only in the wait that must see them.
enum class Landing { kEarly, kLate };

// Everything random from here on follows from the seed.
void set_schedule(uint64_t seed, Landing landing);

// What threads wait at and, unless line is 0, where in the source: to name in errors and to tell two barriers apart.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// A launch's grid, which also remembers where the launch was written.
struct Grid : dim3 {
  Grid(dim3 size, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : dim3(size), site{"launch", file, line} {}
  Grid(unsigned size, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : Grid(dim3(size), file, line) {}
  Site site;
};

// Runs `thread` for every thread of every block.
void run(const Grid& grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Returns when all threads of the block are here.
void block_barrier(Site site);

constexpr int kWarp = 32;

// What each lane brought to a collective; null for lanes that have ended.
using Operands = void* const (&)[kWarp];

// Waits until all live lanes of the warp have brought their operand; one of them then performs the collective for all.
void warp_collective(Site site, void* operand, void (*perform)(Operands));

// This fibre's number in its block, and the launch's shared memory.
int thread_number();
unsigned char* shared_begin();
size_t shared_size();

// Of the asynchronous copies: when they land, and that a new block has none.
void set_landing(Landing when);
void forget_copies(int threads);

// What memory holds that nobody has written: NaN in every floating dtype.
constexpr unsigned char kPoison = 0xff;
bool is_poison(const unsigned char* bytes, size_t count);

// Ends the launch with this sentence.
[[noreturn]] void fail(const std::string& sentence);

void check_mask(unsigned mask);

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic<T>::value, "shuffles move numbers");
  struct Operand {
    T value, result;
    int source;
  };
  check_mask(mask);
  Operand operand{value, value, source};
  warp_collective(site, &operand, [](Operands operands) {
    for (void* lane : operands) {
      if (lane == nullptr) continue;
      auto* mine = static_cast<Operand*>(lane);
      const auto* other = static_cast<const Operand*>(operands[mine->source]);
      if (other == nullptr) fail("a shuffle reads from a lane that has ended");
      mine->result = other->value;
    }
  });
  return operand.result;
}

unsigned ballot(unsigned mask, bool predicate, Site site);

}  // namespace emulation

namespace cuda {

// Launches the kernel; always 0, errors are exceptions.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), emulation::Grid grid, dim3 block, size_t shared_bytes, cudaStream_t,
           Arguments... arguments) {
  emulation::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
  return 0;
}

}  // namespace cuda
}  // namespace i2i

#define I2I_HERE(what) \
  i2i::emulation::Site { what, file, line }
#define I2I_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(I2I_CALLER) { i2i::emulation::block_barrier(I2I_HERE("__syncthreads")); }

inline void __syncwarp(unsigned mask = ~0u, I2I_CALLER) { i2i::emulation::ballot(mask, true, I2I_HERE("__syncwarp")); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, I2I_CALLER) {
  const int lane = i2i::emulation::thread_number() % i2i::emulation::kWarp;
  return i2i::emulation::shuffle(mask, value, lane ^ lane_mask, I2I_HERE("__shfl_xor_sync"));
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, I2I_CALLER) {
  const int lane = i2i::emulation::thread_number() % i2i::emulation::kWarp;
  const int source = lane + static_cast<int>(delta);
  return i2i::emulation::shuffle(mask, value, source < i2i::emulation::kWarp ? source : lane,
                                 I2I_HERE("__shfl_down_sync"));
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, I2I_CALLER) {
  return i2i::emulation::shuffle(mask, value, source & (i2i::emulation::kWarp - 1), I2I_HERE("__shfl_sync"));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, I2I_CALLER) {
  return i2i::emulation::ballot(mask, predicate != 0, I2I_HERE("__ballot_sync"));
}

inline int __any_sync(unsigned mask, int predicate, I2I_CALLER) {
  return i2i::emulation::ballot(mask, predicate != 0, I2I_HERE("__any_sync")) != 0;
}

inline int __all_sync(unsigned mask, int predicate, I2I_CALLER) {
  return i2i::emulation::ballot(mask, predicate == 0, I2I_HERE("__all_sync")) == 0;
}

#undef I2I_CALLER
#undef I2I_HERE

// Fibres switch only where they wait, so that plain code is atomic; blocks run one after the other.
inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address = old + value;
  return old;
}

inline int atomicMax(int* address, int value) {
  const int old = *address;
  *address = std::max(old, value);
  return old;
}

inline void __threadfence() {}

[[noreturn]] inline void __trap() { i2i::emulation::fail("__trap"); }

inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline double rsqrt(double value) { return 1 / std::sqrt(value); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

using std::max;
using std::min;
