// Normalisation and activation with contiguous pixels: a tile is a plane. Moments (N1), output (N2), sums (N4) and
// gradient (N5).
#pragma once

#include "norm_formula.h"

namespace fdk::cpu {
namespace {

// Calls body with offset in bytes, first pixel and length of each run of a plane.
template <class Body>
inline void for_each_run(const NormTile& tile, const Body& body) {
  const Layer& layer = tile.call.layer;
  const Tile& t = tile.tile;
  for (int64_t pixel = t.pixel_begin; pixel < t.pixel_end; pixel += kRun)
    body(offset_of(layer, t.n, t.channel_begin, pixel, 1), pixel, min(kRun, t.pixel_end - pixel));
}

template <class T, class F>
void moments_of_plane(const NormTile& tile, F formula, double* out) {
  const Layer& layer = tile.call.layer;
  T buffer[kRun];
  const int64_t first = offset_of(layer, tile.tile.n, tile.tile.channel_begin, tile.tile.pixel_begin, 1);
  // Deviations from one of the values keep the digits that squares of a large mean would lose.
  const T origin = formula.normalised(*load<T>(at(layer.features, first), layer.dtype, 1, 1, buffer));
  double sum = 0, square = 0;
  for_each_run(tile, [&](int64_t offset, int64_t, int64_t count) {
    const T* x = load<T>(at(layer.features, offset), layer.dtype, 1, count, buffer);
    T part = 0, part_square = 0;
#pragma omp simd reduction(+ : part, part_square)
    for (int64_t i = 0; i < count; ++i) {
      const T deviation = formula.normalised(x[i]) - origin;
      part += deviation;
      part_square += deviation * deviation;
    }
    sum += part;
    square += part_square;
  });
  const double pixels = static_cast<double>(tile.tile.pixel_end - tile.tile.pixel_begin);
  out[0] = origin + sum / pixels;
  out[1] = square - sum * (sum / pixels);
}

template <class T, class F>
void forward_of_plane(const NormTile& tile, const NormRows& rows, F formula) {
  const Layer& layer = tile.call.layer;
  const int64_t c = tile.tile.channel_begin;
  const T scale = row<T>(rows, kScale)[c], shift = row<T>(rows, kShift)[c];
  T x_buffer[kRun], y_buffer[kRun];
  for_each_run(tile, [&](int64_t offset, int64_t, int64_t count) {
    const T* x = load<T>(at(layer.features, offset), layer.dtype, 1, count, x_buffer);
    void* out = at(tile.call.out, offset);
    T* y = target<T>(out, layer.dtype, 1, y_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      y[i] = formula.output(x[i], scale, shift);
    store(y, out, layer.dtype, 1, count);
  });
}

// The gradient that arrives at a plane, with what the slopes of its channel add.
template <class T>
struct Arriving {
  const NormTile& tile;
  T fg = 0, bg = 0;
  bool adds;
  Weights<T> weights;
  T buffer[kRun];

  Arriving(const NormTile& tile, const NormRows& slopes) : tile(tile), adds(slopes.values != nullptr) {
    if (!adds) return;
    fg = row<T>(slopes, 0)[tile.tile.channel_begin];
    bg = row<T>(slopes, 1)[tile.tile.channel_begin];
  }

  const T* run(int64_t offset, int64_t pixel, int64_t count) {
    const Layer& layer = tile.call.layer;
    const T* gradient = load<T>(at(layer.upstream, offset), layer.dtype, 1, count, buffer);
    if (!adds) return gradient;
    if (layer.bg == nullptr) {
      const int64_t start = (tile.tile.n * pixels_of(layer) + pixel) * element_size(layer.mask_dtype);
      const T* w = load<T>(at(layer.fg, start), layer.mask_dtype, 1, count, weights.fg_buffer);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        buffer[i] = gradient[i] + (fg * w[i] + bg * (T(1) - w[i]));
      return buffer;
    }
    weights.load_run(layer, tile.tile.n, pixel, count);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T added = fg * weights.fg[i] + bg * weights.bg[i];
      buffer[i] = gradient[i] + (is_valid(weights.fg[i], weights.bg[i]) ? added : T(0));
    }
    return buffer;
  }
};

template <class T, class F>
void reduce_plane(const NormTile& tile, const NormRows& rows, const NormRows& slopes, F formula, double* out) {
  const Layer& layer = tile.call.layer;
  const int64_t c = tile.tile.channel_begin;
  const T scale = row<T>(rows, kScale)[c], shift = row<T>(rows, kShift)[c], mean = row<T>(rows, kMean)[c];
  T x_buffer[kRun];
  Arriving<T> arriving(tile, slopes);
  double sum = 0, product = 0;
  for_each_run(tile, [&](int64_t offset, int64_t pixel, int64_t count) {
    const T* x = load<T>(at(layer.features, offset), layer.dtype, 1, count, x_buffer);
    const T* g = arriving.run(offset, pixel, count);
    T part = 0, part_product = 0;
#pragma omp simd reduction(+ : part, part_product)
    for (int64_t i = 0; i < count; ++i) {
      const T h = formula.affine_gradient(x[i], scale, shift, g[i]);
      part += h;
      part_product += h * (formula.normalised(x[i]) - mean);
    }
    sum += part;
    product += part_product;
  });
  out[0] = sum;
  out[1] = product * row<T>(rows, kInverse)[c];
}

template <class T, class F>
void gradient_of_plane(const NormTile& tile, const NormRows& rows, const NormRows& slopes, F formula) {
  const Layer& layer = tile.call.layer;
  const int64_t k = tile.tile.channel_begin;
  const T scale = row<T>(rows, kScale)[k], shift = row<T>(rows, kShift)[k], mean = row<T>(rows, kMean)[k];
  const T a = row<T>(rows, kA)[k], b = row<T>(rows, kB)[k], c = row<T>(rows, kC)[k];
  T x_buffer[kRun], out_buffer[kRun];
  Arriving<T> arriving(tile, slopes);
  for_each_run(tile, [&](int64_t offset, int64_t pixel, int64_t count) {
    const T* x = load<T>(at(layer.features, offset), layer.dtype, 1, count, x_buffer);
    const T* g = arriving.run(offset, pixel, count);
    void* address = at(tile.call.out, offset);
    T* out = target<T>(address, layer.dtype, 1, out_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      out[i] = formula.input_gradient(x[i], formula.affine_gradient(x[i], scale, shift, g[i]), mean, a, b, c);
    store(out, address, layer.dtype, 1, count);
  });
}

} // namespace
} // namespace fdk::cpu
