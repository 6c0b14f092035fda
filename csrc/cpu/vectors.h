// Vectors for the CPU kernels, and the means to compile a kernel for several instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Before a function: it is compiled for AVX-512, for AVX2 and for any x86-64, and the dynamic linker takes what the
// machine has. Whatever it calls in its loops must be I2I_INLINE: a plain callee would be compiled for any x86-64 only.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define I2I_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define I2I_CLONES
#endif
#define I2I_INLINE inline __attribute__((always_inline))

// Vectors are passed between functions that are always inlined; how they would be passed otherwise does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace i2i {
namespace cpu {

template <typename T>
struct VectorOf {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T type __attribute__((vector_size(64)));
  typedef Bits bits __attribute__((vector_size(64)));
};

// 64 bytes of T, computed with element by element; the compiler cuts them to the registers of the instruction set.
template <typename T>
using Vector = typename VectorOf<T>::type;

// Elements of a Vector<T>.
template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);

template <typename T>
I2I_INLINE Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// The first `count` elements, then zeros.
template <typename T>
I2I_INLINE Vector<T> load_first(const T* from, int64_t count) {
  if (count == kLanes<T>) return load(from);
  Vector<T> vector{};
  std::memcpy(&vector, from, count * sizeof(T));
  return vector;
}

template <typename T>
I2I_INLINE void store(T* to, const Vector<T>& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// The sum of the elements, halves added to halves.
template <typename T>
I2I_INLINE T sum_of(const Vector<T>& terms) {
  Vector<T> vector = terms;
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) vector[i] += vector[i + width];
  return vector[0];
}

// The greatest element of a vector without NaN.
template <typename T>
I2I_INLINE T greatest_of(const Vector<T>& vector) {
  T greatest = vector[0];
  for (int64_t i = 1; i < kLanes<T>; i++) greatest = vector[i] > greatest ? vector[i] : greatest;
  return greatest;
}

// ln(2)^k / k!, the k-th coefficient of 2^x.
constexpr double exp2_coefficient(int k) { return k == 0 ? 1 : exp2_coefficient(k - 1) * 0.6931471805599453094 / k; }

// 2^exponent to about one unit in the last place; 0 below the normal numbers, NaN for NaN. The result must be finite.
template <typename T>
I2I_INLINE Vector<T> exp2_of(const Vector<T>& exponent) {
  constexpr bool kSingle = sizeof(T) == 4;
  constexpr int kMantissa = kSingle ? 23 : 52, kBias = kSingle ? 127 : 1023, kDegree = kSingle ? 7 : 13;
  // Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits; with the bias, these are an exponent.
  constexpr T kRound = (kSingle ? 0x1.8p23 : 0x1.8p52) + kBias;
  const Vector<T> lowest = Vector<T>{} - kBias;
  const Vector<T> x = exponent < lowest ? lowest : exponent;
  const Vector<T> rounded = x + kRound;
  const Vector<T> fraction = x - (rounded - kRound);
  Vector<T> power = Vector<T>{} + static_cast<T>(exp2_coefficient(kDegree));
#pragma GCC unroll 16
  for (int k = kDegree - 1; k >= 0; k--) power = power * fraction + static_cast<T>(exp2_coefficient(k));
  return power * (Vector<T>)((typename VectorOf<T>::bits)rounded << kMantissa);
}

}  // namespace cpu
}  // namespace i2i
