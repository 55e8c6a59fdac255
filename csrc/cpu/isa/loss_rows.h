// The loops of the losses over the channels of a sample, in double.
#pragma once

#include "../loss_rows.h"

namespace fdk::cpu {
namespace {

template <class T>
void divide_row(const T* sums, double divisor, int64_t count, double* row) {
  const double by = 1 / divisor;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c)
    row[c] = static_cast<double>(sums[c]) * by;
}

template <class T>
void divide_sums(const T* fg, const T* bg, const Divisors& by, int64_t count, double* f, double* b) {
  divide_row(fg, by.fg, count, f);
  if (!by.is_masked) return divide_row(bg, by.bg, count, b);
  const double fg_mass = by.fg_mass, by_bg = 1 / by.bg;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c)
    b[c] = (fg_mass - static_cast<double>(fg[c])) * by_bg;
}

void divide_sums_of(DType accumulate, const void* fg, const void* bg, const Divisors& by, int64_t count, double* f,
                    double* b) {
  accumulate == DType::kFloat64
      ? divide_sums(static_cast<const double*>(fg), static_cast<const double*>(bg), by, count, f, b)
      : divide_sums(static_cast<const float*>(fg), static_cast<const float*>(bg), by, count, f, b);
}

double squared_distance(const double* f, const double* b, int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < count; ++c)
    total += (f[c] - b[c]) * (f[c] - b[c]);
  return total;
}

void add_distance_gradient(const double* f, const double* b, double q, int64_t count, double* grad_f, double* grad_b) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) {
    const double g = 2 * q * (f[c] - b[c]);
    grad_f[c] += g;
    grad_b[c] -= g;
  }
}

template <class T>
void divide_gradients(const double* grad_f, const double* grad_b, const Divisors& by, int64_t count, T* fg, T* bg) {
  const double by_fg = 1 / by.fg, by_bg = 1 / by.bg;
  if (by.is_masked) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      fg[c] = static_cast<T>(grad_f[c] * by_fg - grad_b[c] * by_bg);
      bg[c] = 0;
    }
    return;
  }
#pragma omp simd
  for (int64_t c = 0; c < count; ++c)
    fg[c] = static_cast<T>(grad_f[c] * by_fg);
#pragma omp simd
  for (int64_t c = 0; c < count; ++c)
    bg[c] = static_cast<T>(grad_b[c] * by_bg);
}

void divide_gradients_of(DType accumulate, const double* grad_f, const double* grad_b, const Divisors& by,
                         int64_t count, void* fg, void* bg) {
  accumulate == DType::kFloat64
      ? divide_gradients(grad_f, grad_b, by, count, static_cast<double*>(fg), static_cast<double*>(bg))
      : divide_gradients(grad_f, grad_b, by, count, static_cast<float*>(fg), static_cast<float*>(bg));
}

} // namespace
} // namespace fdk::cpu
