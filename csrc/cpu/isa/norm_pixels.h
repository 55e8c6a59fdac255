// Normalisation and activation with contiguous channels: a tile is some pixels of a sample. Moments (N1), output (N2),
// sums (N4) and gradient (N5).
#pragma once

#include "norm_formula.h"

namespace fdk::cpu {
namespace {

// Elements that are computed at a time: some channels of a pixel, or all channels of several pixels.
constexpr int64_t kBlock = 512;

// The channels [first, first + count) of a tile, and how many pixels of them are one run in memory.
struct ChannelRun {
  int64_t first, count, pixels, pitch;
};

template <class Body>
inline void for_each_channel_run(const NormTile& tile, const Body& body) {
  const Layer& layer = tile.call.layer;
  const int64_t pitch = Rows(layer.size, layer.stride).stride;
  for (int64_t c = 0; c < layer.channels; c += kBlock) {
    const int64_t count = min(kBlock, layer.channels - c);
    body(ChannelRun{c, count, pitch == count ? kBlock / count : 1, pitch});
  }
}

// Calls body with offset in bytes, first pixel and number of pixels of each block of a run.
template <class Body>
inline void for_each_block(const NormTile& tile, const ChannelRun& run, const Body& body) {
  const Tile& t = tile.tile;
  for (int64_t pixel = t.pixel_begin; pixel < t.pixel_end; pixel += run.pixels)
    body(offset_of(tile.call.layer, t.n, run.first, pixel, run.pitch), pixel, min(run.pixels, t.pixel_end - pixel));
}

// A number for each element of a block: those of the channels, once for each pixel.
template <class T>
struct Block {
  T values[kBlock];

  void clear() {
    for (int64_t i = 0; i < kBlock; ++i)
      values[i] = 0;
  }
  void repeat(const T* of_channels, const ChannelRun& run) {
    for (int64_t i = 0, c = 0; i < run.pixels * run.count; ++i, c = c + 1 == run.count ? 0 : c + 1)
      values[i] = of_channels[c];
  }
  void repeat(const NormRows& rows, int64_t index, const ChannelRun& run) {
    repeat(row<T>(rows, index) + run.first, run);
  }
  // The sum of a channel over the pixels.
  double total(int64_t channel, const ChannelRun& run) const {
    double sum = 0;
    for (int64_t pixel = 0; pixel < run.pixels; ++pixel)
      sum += values[pixel * run.count + channel];
    return sum;
  }
  T& operator[](int64_t i) { return values[i]; }
};

template <class T, class F>
void moments_of_pixels(const NormTile& tile, F formula, double* out) {
  const Layer& layer = tile.call.layer;
  const double pixels = static_cast<double>(tile.tile.pixel_end - tile.tile.pixel_begin);
  T buffer[kBlock];
  Block<T> origin, sum, square;
  for_each_channel_run(tile, [&](const ChannelRun& run) {
    sum.clear();
    square.clear();
    const int64_t begin = offset_of(layer, tile.tile.n, run.first, tile.tile.pixel_begin, run.pitch);
    origin.repeat(load<T>(at(layer.features, begin), layer.dtype, 1, run.count, buffer), run);
    for (int64_t i = 0; i < run.pixels * run.count; ++i)
      origin[i] = formula.normalised(origin[i]);
    for_each_block(tile, run, [&](int64_t offset, int64_t, int64_t block) {
      const int64_t count = block * run.count;
      const T* x = load<T>(at(layer.features, offset), layer.dtype, 1, count, buffer);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const T deviation = formula.normalised(x[i]) - origin[i];
        sum[i] += deviation;
        square[i] += deviation * deviation;
      }
    });
    for (int64_t c = 0; c < run.count; ++c) {
      const double total = sum.total(c, run);
      out[run.first + c] = origin[c] + total / pixels;
      out[layer.channels + run.first + c] = square.total(c, run) - total * (total / pixels);
    }
  });
}

template <class T, class F>
void forward_of_pixels(const NormTile& tile, const NormRows& rows, F formula) {
  const Layer& layer = tile.call.layer;
  T x_buffer[kBlock], y_buffer[kBlock];
  Block<T> scale, shift;
  for_each_channel_run(tile, [&](const ChannelRun& run) {
    scale.repeat(rows, kScale, run);
    shift.repeat(rows, kShift, run);
    for_each_block(tile, run, [&](int64_t offset, int64_t, int64_t block) {
      const int64_t count = block * run.count;
      const T* x = load<T>(at(layer.features, offset), layer.dtype, 1, count, x_buffer);
      void* out = at(tile.call.out, offset);
      T* y = target<T>(out, layer.dtype, 1, y_buffer);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        y[i] = formula.output(x[i], scale[i], shift[i]);
      store(y, out, layer.dtype, 1, count);
    });
  });
}

// What the slopes add to the gradients of the channels, for g_fg and g_bg of the channels of a run.
template <class T>
class Slopes {
 public:
  Slopes(const NormTile& tile, const NormRows& rows, const ChannelRun& run) : tile_(tile), run_(run) {
    if (rows.values == nullptr) return;
    fg_ = row<T>(rows, 0) + run.first;
    bg_ = row<T>(rows, 1) + run.first;
  }

  // The gradient that arrives at a block of pixels, with what is added.
  const T* arriving(int64_t offset, int64_t pixel, int64_t block, T* buffer) {
    const Layer& layer = tile_.call.layer;
    const T* gradient = load<T>(at(layer.upstream, offset), layer.dtype, 1, block * run_.count, buffer);
    if (fg_ == nullptr) return gradient;
    if (pixel + block > end_) load_weights_from(pixel);
    for (int64_t p = 0; p < block; ++p) {
      const T w_fg = weights_.fg[pixel + p - begin_], w_bg = weights_.bg[pixel + p - begin_];
      const int64_t start = p * run_.count;
#pragma omp simd
      for (int64_t c = 0; c < run_.count; ++c)
        buffer[start + c] = gradient[start + c] + (fg_[c] * w_fg + bg_[c] * w_bg);
    }
    return buffer;
  }

 private:
  // Loads the weights of many blocks: those of one pixel at a time would take as long as few channels.
  void load_weights_from(int64_t pixel) {
    begin_ = pixel;
    end_ = min(pixel + kRun, tile_.tile.pixel_end);
    weights_.load_run(tile_.call.layer, tile_.tile.n, begin_, end_ - begin_);
  }

  const NormTile& tile_;
  const ChannelRun& run_;
  const T *fg_ = nullptr, *bg_ = nullptr;
  Weights<T> weights_;
  int64_t begin_ = 0, end_ = 0; // of the pixels whose weights are loaded
};

template <class T, class F>
void reduce_pixels(const NormTile& tile, const NormRows& rows, const NormRows& slopes, F formula, double* out) {
  const Layer& layer = tile.call.layer;
  T x_buffer[kBlock], g_buffer[kBlock];
  Block<T> scale, shift, mean, sum, product;
  for_each_channel_run(tile, [&](const ChannelRun& run) {
    Slopes<T> added(tile, slopes, run);
    scale.repeat(rows, kScale, run);
    shift.repeat(rows, kShift, run);
    mean.repeat(rows, kMean, run);
    sum.clear();
    product.clear();
    for_each_block(tile, run, [&](int64_t offset, int64_t pixel, int64_t block) {
      const int64_t count = block * run.count;
      const T* x = load<T>(at(layer.features, offset), layer.dtype, 1, count, x_buffer);
      const T* g = added.arriving(offset, pixel, block, g_buffer);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const T h = formula.affine_gradient(x[i], scale[i], shift[i], g[i]);
        sum[i] += h;
        product[i] += h * (formula.normalised(x[i]) - mean[i]);
      }
    });
    for (int64_t c = 0; c < run.count; ++c) {
      out[run.first + c] = sum.total(c, run);
      out[layer.channels + run.first + c] = product.total(c, run) * row<T>(rows, kInverse)[run.first + c];
    }
  });
}

template <class T, class F>
void gradient_of_pixels(const NormTile& tile, const NormRows& rows, const NormRows& slopes, F formula) {
  const Layer& layer = tile.call.layer;
  T x_buffer[kBlock], g_buffer[kBlock], out_buffer[kBlock];
  Block<T> scale, shift, mean, a, b, k;
  for_each_channel_run(tile, [&](const ChannelRun& run) {
    Slopes<T> added(tile, slopes, run);
    scale.repeat(rows, kScale, run);
    shift.repeat(rows, kShift, run);
    mean.repeat(rows, kMean, run);
    a.repeat(rows, kA, run);
    b.repeat(rows, kB, run);
    k.repeat(rows, kC, run);
    for_each_block(tile, run, [&](int64_t offset, int64_t pixel, int64_t block) {
      const int64_t count = block * run.count;
      const T* x = load<T>(at(layer.features, offset), layer.dtype, 1, count, x_buffer);
      const T* g = added.arriving(offset, pixel, block, g_buffer);
      void* address = at(tile.call.out, offset);
      T* out = target<T>(address, layer.dtype, 1, out_buffer);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        out[i] = formula.input_gradient(x[i], formula.affine_gradient(x[i], scale[i], shift[i], g[i]), mean[i], a[i],
                                        b[i], k[i]);
      store(out, address, layer.dtype, 1, count);
    });
  });
}

} // namespace
} // namespace fdk::cpu
