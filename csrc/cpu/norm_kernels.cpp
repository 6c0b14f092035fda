// The loops over elements of the norms, compiled for several instruction sets.
#include "cpu/norm_kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>

#include "cpu/vectors.h"

namespace i2i {
namespace cpu {
namespace {

// The sums of a run of one plane are kept in this many columns, which are added up in a fixed order at the end.
constexpr int64_t kColumns = 64;

// A per-channel value of a run of one plane: the same at every column.
template <typename S>
struct Same {
  S value;
  I2I_INLINE S operator[](int64_t) const { return value; }
};

// Adds to sums[k][column] the terms(element, column)[k] of kRows rows from element `first` on.
template <int kRows, typename S, size_t kSums, typename Terms>
I2I_INLINE void add_rows(int64_t first, int64_t stride, int64_t columns, const std::array<S*, kSums>& sums,
                         const Terms& terms) {
#pragma GCC ivdep
  for (int64_t column = 0; column < columns; column++) {
    std::array<S, kSums> total = terms(first + column, column);
#pragma GCC unroll 4
    for (int row = 1; row < kRows; row++) {
      const std::array<S, kSums> more = terms(first + row * stride + column, column);
      for (size_t k = 0; k < kSums; k++) total[k] += more[k];
    }
    for (size_t k = 0; k < kSums; k++) sums[k][column] += total[k];
  }
}

// sums[k][column] = sum of terms(element, column)[k] over `rows` rows of `columns` elements and the `rest` elements
// after them. Four rows at a time, so that the sums are loaded and stored a quarter as often.
template <typename S, size_t kSums, typename Terms>
I2I_INLINE void sum_rows(int64_t rows, int64_t columns, int64_t rest, const std::array<S*, kSums>& sums,
                         const Terms& terms) {
  for (size_t k = 0; k < kSums; k++) std::fill_n(sums[k], columns, S(0));
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) add_rows<4>(row * columns, columns, columns, sums, terms);
  for (; row < rows; row++) add_rows<1>(row * columns, columns, columns, sums, terms);
  add_rows<1>(row * columns, columns, rest, sums, terms);
}

// As sum_rows, over a run of one plane: one value a sum.
template <typename S, size_t kSums, typename Terms>
I2I_INLINE std::array<S, kSums> sum_run(int64_t pixels, const Terms& terms) {
  alignas(64) S columns[kSums][kColumns];
  std::array<S*, kSums> sums;
  for (size_t k = 0; k < kSums; k++) sums[k] = columns[k];
  sum_rows(pixels / kColumns, kColumns, pixels % kColumns, sums, terms);
  std::array<S, kSums> totals;
  for (size_t k = 0; k < kSums; k++) {
#pragma GCC unroll 6
    for (int64_t width = kColumns / 2; width > 0; width /= 2) {
      for (int64_t i = 0; i < width; i++) columns[k][i] += columns[k][i + width];
    }
    totals[k] = columns[k][0];
  }
  return totals;
}

// The factor of act(v) = factor * v. A choice between values, not between computations, is what every instruction set
// vectorises.
template <typename S>
I2I_INLINE S activation_factor(S value, S slope) {
  return value > 0 ? S(1) : slope;
}

// Calls body with per-channel values as `at(pointer)[column]` and, for every row, its first element and its columns: a
// run of one plane is one long row.
template <typename Body>
I2I_INLINE void for_rows(Extent extent, const Body& body) {
  if (extent.channels == 1) {
    body(int64_t(0), extent.pixels, [](const auto* value) { return Same<std::decay_t<decltype(*value)>>{*value}; });
  } else {
    for (int64_t pixel = 0; pixel < extent.pixels; pixel++) {
      body(pixel * extent.channels, extent.channels, [](const auto* values) { return values; });
    }
  }
}

template <typename T, typename S, typename Mean>
struct Deviations {
  const T* x;
  Mean mean;
  I2I_INLINE std::array<S, 2> operator()(int64_t element, int64_t column) const {
    const S deviation = S(x[element]) - mean[column];
    return {deviation, deviation * deviation};
  }
};

// The gradient with respect to the normalised value, and its product with (x - mean).
template <typename T, typename S, typename PerChannel>
struct GradientTerms {
  const T* grad;
  const T* x;
  PerChannel mean, scale, shift;
  S slope;
  I2I_INLINE std::array<S, 2> operator()(int64_t element, int64_t column) const {
    const S deviation = S(x[element]) - mean[column];
    const S value = deviation * scale[column] + shift[column];
    const S d = S(grad[element]) * activation_factor(value, slope);
    return {d, d * deviation};
  }
};

}  // namespace

template <typename T>
I2I_CLONES void shifted_sums(const T* x, Extent extent, Accumulate<T>* shift, Accumulate<T>* sum,
                             Accumulate<T>* squares) {
  using S = Accumulate<T>;
  const auto value = [x](int64_t element, int64_t)
                         __attribute__((always_inline)) { return std::array<S, 1>{S(x[element])}; };
  if (extent.channels == 1) {
    shift[0] = sum_run<S, 1>(extent.pixels, value)[0] / S(extent.pixels);
    const std::array<S, 2> sums = sum_run<S, 2>(extent.pixels, Deviations<T, S, Same<S>>{x, {shift[0]}});
    sum[0] = sums[0];
    squares[0] = sums[1];
  } else {
    sum_rows<S, 1>(extent.pixels, extent.channels, 0, {shift}, value);
    for (int64_t channel = 0; channel < extent.channels; channel++) shift[channel] /= S(extent.pixels);
    sum_rows<S, 2>(extent.pixels, extent.channels, 0, {sum, squares}, Deviations<T, S, const S*>{x, shift});
  }
}

template <typename T>
I2I_CLONES void normalise(const T* x, const T* residual, Extent extent, const Normalisation<Accumulate<T>>& forward,
                          T* y) {
  using S = Accumulate<T>;
  const auto body = [=](int64_t first, int64_t columns, const auto& at) __attribute__((always_inline)) {
    const auto mean = at(forward.mean), scale = at(forward.scale), shift = at(forward.shift);
    if (residual == nullptr) {
#pragma GCC ivdep
      for (int64_t column = 0; column < columns; column++) {
        const S value = (S(x[first + column]) - mean[column]) * scale[column] + shift[column];
        y[first + column] = T(value * activation_factor(value, forward.slope));
      }
    } else {
#pragma GCC ivdep
      for (int64_t column = 0; column < columns; column++) {
        const S value = (S(x[first + column]) - mean[column]) * scale[column] + shift[column];
        y[first + column] = T(value * activation_factor(value, forward.slope) + S(residual[first + column]));
      }
    }
  };
  for_rows(extent, body);
}

template <typename T>
I2I_CLONES void gradient_sums(const T* grad, const T* x, Extent extent, const Normalisation<Accumulate<T>>& forward,
                              Accumulate<T>* sum, Accumulate<T>* products) {
  using S = Accumulate<T>;
  if (extent.channels == 1) {
    const GradientTerms<T, S, Same<S>> terms{grad,         x, {forward.mean[0]}, {forward.scale[0]}, {forward.shift[0]},
                                             forward.slope};
    const std::array<S, 2> sums = sum_run<S, 2>(extent.pixels, terms);
    sum[0] = sums[0];
    products[0] = sums[1];
  } else {
    const GradientTerms<T, S, const S*> terms{grad, x, forward.mean, forward.scale, forward.shift, forward.slope};
    sum_rows<S, 2>(extent.pixels, extent.channels, 0, {sum, products}, terms);
  }
}

template <typename T>
I2I_CLONES void apply_gradient(const T* grad, const T* x, Extent extent, const Normalisation<Accumulate<T>>& forward,
                               const GradientMap<Accumulate<T>>& backward, T* grad_x) {
  using S = Accumulate<T>;
  const auto body = [=](int64_t first, int64_t columns, const auto& at) __attribute__((always_inline)) {
    const GradientTerms<T, S, decltype(at(forward.mean))> terms{
        grad, x, at(forward.mean), at(forward.scale), at(forward.shift), forward.slope};
    const auto scale = at(backward.scale), mean_gradient = at(backward.mean_gradient), slope = at(backward.slope),
               shift = at(backward.shift);
#pragma GCC ivdep
    for (int64_t column = 0; column < columns; column++) {
      const int64_t element = first + column;
      const S d = terms(element, column)[0], deviation = S(x[element]) - terms.mean[column];
      grad_x[element] = T(scale[column] * (d - mean_gradient[column]) + (slope[column] * deviation + shift[column]));
    }
  };
  for_rows(extent, body);
}

#define I2I_INSTANTIATE(T)                                                                                        \
  template void shifted_sums<T>(const T*, Extent, Accumulate<T>*, Accumulate<T>*, Accumulate<T>*);                \
  template void normalise<T>(const T*, const T*, Extent, const Normalisation<Accumulate<T>>&, T*);                \
  template void gradient_sums<T>(const T*, const T*, Extent, const Normalisation<Accumulate<T>>&, Accumulate<T>*, \
                                 Accumulate<T>*);                                                                 \
  template void apply_gradient<T>(const T*, const T*, Extent, const Normalisation<Accumulate<T>>&,                \
                                  const GradientMap<Accumulate<T>>&, T*);
I2I_INSTANTIATE(float)
I2I_INSTANTIATE(double)
I2I_INSTANTIATE(c10::Half)
I2I_INSTANTIATE(c10::BFloat16)
#undef I2I_INSTANTIATE

}  // namespace cpu
}  // namespace i2i
