// Asynchronous copies, matrix fragments and the dtypes, as the PTX ISA defines them.
#include <algorithm>
#include <deque>
#include <vector>

#include "../cuda/device.cuh"

namespace i2i {
namespace emulation {
namespace {

struct Copy {
  void* shared;
  const void* global;  // null for zeros
};

using Group = std::vector<Copy>;

constexpr size_t kCopyBytes = 16;

// Of every thread of the running block.
struct Copies {
  Group open;
  std::deque<Group> closed;
};
std::vector<Copies> copies;
Landing landing = Landing::kEarly;

void land(const Copy& copy) {
  if (copy.global == nullptr)
    std::memset(copy.shared, 0, kCopyBytes);
  else
    std::memcpy(copy.shared, copy.global, kCopyBytes);
}

void check_shared(const void* address, const char* what) {
  cuda::check_aligned(address, what);
  const auto* byte = static_cast<const unsigned char*>(address);
  if (byte < shared_begin() || byte + kCopyBytes > shared_begin() + shared_size())
    fail(std::string(what) + " at byte " + std::to_string(byte - shared_begin()) + " of " +
         std::to_string(shared_size()) + " bytes of shared memory");
}

}  // namespace

void set_landing(Landing when) { landing = when; }

void forget_copies(int threads) { copies.assign(threads, Copies{}); }

}  // namespace emulation

namespace cuda {

using emulation::kWarp;
using emulation::Operands;

void check_aligned(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    emulation::fail(std::string(what) + " at an address that is no multiple of 16");
}

void copy_async16(void* shared, const void* global, bool valid) {
  emulation::check_shared(shared, "copy_async16 to shared memory");
  check_aligned(global, "copy_async16 from global memory");
  const emulation::Copy copy{shared, valid ? global : nullptr};
  if (emulation::landing == emulation::Landing::kEarly) return emulation::land(copy);
  std::memset(shared, emulation::kPoison, emulation::kCopyBytes);  // undefined until the wait
  emulation::copies[emulation::thread_number()].open.push_back(copy);
}

void copy_async_commit() {
  emulation::Copies& mine = emulation::copies[emulation::thread_number()];
  mine.closed.push_back(std::move(mine.open));
  mine.open.clear();
}

void copy_async_wait_for(int pending) {
  std::deque<emulation::Group>& closed = emulation::copies[emulation::thread_number()].closed;
  for (; static_cast<int>(closed.size()) > pending; closed.pop_front())
    for (const emulation::Copy& copy : closed.front()) emulation::land(copy);
}

namespace {

void check_all_live(Operands operands, const char* what) {
  for (const void* lane : operands)
    if (lane == nullptr) emulation::fail(std::string(what) + " in a warp of which lanes have ended");
}

struct MatrixOperand {
  const void* row;
  uint32_t* r;
};

uint16_t half_word(const void* row, int column) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const unsigned char*>(row) + 2 * column, sizeof(bits));
  return bits;
}

// Lane l gets elements (l / 4, 2 * (l % 4)) and the next of each matrix, or of its transpose.
template <bool kTransposed>
void load_matrices(Operands operands) {
  check_all_live(operands, "load_matrix_x4");
  const auto row_of = [&](int lane) { return static_cast<const MatrixOperand*>(operands[lane])->row; };
  for (int lane = 0; lane < kWarp; lane++) {
    emulation::check_shared(row_of(lane), "load_matrix_x4");
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int matrix = 0; matrix < 4; matrix++) {
      const auto at = [&](int i, int j) { return half_word(row_of(8 * matrix + i), j); };
      const uint32_t low = kTransposed ? at(column, row) : at(row, column);
      const uint32_t high = kTransposed ? at(column + 1, row) : at(row, column + 1);
      static_cast<const MatrixOperand*>(operands[lane])->r[matrix] = low | high << 16;
    }
  }
}

struct MmaOperand {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// The sum as tensor cores take it (Fasi et al. 2021): the terms, aligned to the greatest, keep one bit more than fp32
// has; what is beyond that is cut off, and of the sum what fp32 cannot hold.
float truncating_sum(const double* terms, int count) {
  double greatest = 0, plain = 0;
  for (int i = 0; i < count; i++) {
    greatest = std::fmax(greatest, std::fabs(terms[i]));
    plain += terms[i];
  }
  if (!std::isfinite(plain) || greatest == 0) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::ilogb(greatest) - 24);
  double sum = 0;
  for (int i = 0; i < count; i++) sum += std::trunc(terms[i] / unit) * unit;
  const float rounded = static_cast<float>(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafterf(rounded, 0) : rounded;
}

// c [16, 8] += a [16, K] x b [K, 8], with the layouts of the PTX ISA, which are those of mma.m16n8k16 and m16n8k8 for
// registers that hold kPack elements: row g = lane / 4 and column t = lane % 4 of 8 x 4 registers.
template <int kPack, typename Unpack>
void multiply(Operands operands, Unpack unpack) {
  constexpr int kDepth = 8 * kPack;
  float a[16][kDepth], b[kDepth][8], c[16][8];
  const auto c_of = [&](int lane, int e) -> float& { return c[lane / 4 + 8 * (e / 2)][2 * (lane % 4) + e % 2]; };
  for (int lane = 0; lane < kWarp; lane++) {
    const auto* operand = static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; half++) {  // of the depth
      for (int e = 0; e < kPack; e++) {
        const int k = half * 4 * kPack + t * kPack + e;
        a[g][k] = unpack(operand->a[2 * half], e);
        a[g + 8][k] = unpack(operand->a[2 * half + 1], e);
        b[k][g] = unpack(operand->b[half], e);
      }
    }
    for (int e = 0; e < 4; e++) c_of(lane, e) = operand->c[e];
  }
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      double terms[kDepth + 1] = {c[row][column]};
      for (int k = 0; k < kDepth; k++) terms[k + 1] = static_cast<double>(a[row][k]) * b[k][column];
      c[row][column] = truncating_sum(terms, kDepth + 1);
    }
  }
  for (int lane = 0; lane < kWarp; lane++)
    for (int e = 0; e < 4; e++) static_cast<const MmaOperand*>(operands[lane])->c[e] = c_of(lane, e);
}

void multiply_bf16(Operands operands) {
  check_all_live(operands, "mma_bf16");
  multiply<2>(operands, [](uint32_t bits, int e) { return __uint_as_float(e == 0 ? bits << 16 : bits & 0xffff0000u); });
}

void multiply_tf32(Operands operands) {
  check_all_live(operands, "mma_tf32");
  multiply<1>(operands, [](uint32_t bits, int) { return __uint_as_float(bits & 0xffffe000u); });
}

}  // namespace

void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  MatrixOperand operand{row, r};
  emulation::warp_collective({"load_matrix_x4", "", 0}, &operand, load_matrices<false>);
}

void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  MatrixOperand operand{row, r};
  emulation::warp_collective({"load_matrix_x4_transposed", "", 0}, &operand, load_matrices<true>);
}

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperand operand{c, a, {b0, b1}};
  emulation::warp_collective({"mma_bf16", "", 0}, &operand, multiply_bf16);
}

void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperand operand{c, a, {b0, b1}};
  emulation::warp_collective({"mma_tf32", "", 0}, &operand, multiply_tf32);
}

// To the nearest, ties away from zero.
uint32_t round_to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isfinite(value) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

float exp2_fast(float value) {
  const float result = std::exp2(value);
  return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}

float to_float(Bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

Bf16 bf16_of(float value) {
  if (std::isnan(value)) return Bf16{0x7fff};
  const uint32_t bits = __float_as_uint(value);
  return Bf16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

uint32_t pack_bf16(float low, float high) {
  return bf16_of(low).bits | static_cast<uint32_t>(bf16_of(high).bits) << 16;
}

float to_float(Half value) {
  const uint32_t exponent = value.bits >> 10 & 31u, fraction = value.bits & 1023u;
  float magnitude;
  if (exponent == 31)
    magnitude = fraction == 0 ? INFINITY : NAN;
  else if (exponent == 0)
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  else
    magnitude = std::ldexp(static_cast<float>(fraction + 1024u), static_cast<int>(exponent) - 25);
  return std::copysign(magnitude, value.bits & 0x8000u ? -1.0f : 1.0f);
}

Half half_of(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return Half{0x7fff};
  if (magnitude >= 65520.0f) return Half{static_cast<uint16_t>(sign | 0x7c00)};
  // The number of steps of the binade's size (of the subnormals' below them); nearbyint rounds ties to even.
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return Half{static_cast<uint16_t>(sign | (steps + ((exponent + 14) << 10)))};
}

}  // namespace cuda
}  // namespace i2i
