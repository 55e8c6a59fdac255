// The gradient of the features (R3) on a tile.
#pragma once

#include "gradient_half.h"
#include "gradient_row.h"
#include "runs.h"

namespace fdk::cpu {
namespace {

template <class T, class M, bool kHasBg>
void gradient_by_pixels(const Layer& layer, const Tile& tile, const RawWeights<T, M, kHasBg>& weights, const T* g_fg,
                        const T* g_bg) {
  T out_buffer[kRun], upstream_buffer[kRun];
  const Rows rows(layer.size, layer.stride), upstream_rows(layer.size, layer.upstream_stride);
  const int64_t element = element_size(layer.dtype);
  // One channel after another, so that the writes are one stream.
  for (int64_t c = tile.channel_begin; c < tile.channel_end; ++c) {
    char* channel = static_cast<char*>(layer.features) + (tile.n * layer.stride_n + c * layer.stride_c) * element;
    const char* upstream = static_cast<const char*>(layer.upstream) +
                           (tile.n * layer.upstream_stride_n + c * layer.upstream_stride_c) * element;
    for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
      count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
      const T* added = nullptr;
      if (layer.upstream != nullptr) {
        count = min(count, upstream_rows.rest_of_row(p));
        const char* source = upstream + upstream_rows.offset(p) * element;
        added = load(source, layer.dtype, upstream_rows.stride, count, upstream_buffer);
      }
      char* address = channel + rows.offset(p) * element;
      T* out = target(address, layer.dtype, rows.stride, out_buffer);
      write_row(weights, p, count, g_fg[c], g_bg[c], added, out);
      store(out, address, layer.dtype, rows.stride, count);
    }
  }
}

template <class T>
void gradient_by_channels(const Layer& layer, const Tile& tile, const T* g_fg, const T* g_bg) {
  Weights<T> weights;
  T out_buffer[kMaxTileChannels], upstream_buffer[kMaxTileChannels];
  const Rows rows(layer.size, layer.stride), upstream_rows(layer.size, layer.upstream_stride);
  const int64_t element = element_size(layer.dtype), channels = tile.channel_end - tile.channel_begin;
  g_fg += tile.channel_begin;
  g_bg += tile.channel_begin;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    char* start = static_cast<char*>(layer.features) +
                  (tile.n * layer.stride_n + tile.channel_begin * layer.stride_c + rows.offset(p)) * element;
    for (int64_t i = 0; i < count; ++i) {
      char* address = start + i * rows.stride * element;
      T* out = target(address, layer.dtype, 1, out_buffer);
      const bool valid = layer.bg == nullptr || is_valid(weights.fg[i], weights.bg[i]);
      const T w = weights.fg[i], u = weights.bg[i];
      if (valid) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c)
          out[c] = g_fg[c] * w + g_bg[c] * u;
      } else {
        for (int64_t c = 0; c < channels; ++c)
          out[c] = T(0);
      }
      if (layer.upstream != nullptr) {
        const char* source = static_cast<const char*>(layer.upstream) +
                             (tile.n * layer.upstream_stride_n + tile.channel_begin * layer.upstream_stride_c +
                              upstream_rows.offset(p + i)) *
                                 element;
        const T* added = load(source, layer.dtype, layer.upstream_stride_c, channels, upstream_buffer);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c)
          out[c] += added[c];
      }
      store(out, address, layer.dtype, 1, channels);
    }
  }
}

template <class T>
void gradient_of_tile(const Layer& layer, const Tile& tile, const void* g_fg, const void* g_bg) {
  const T *fg = static_cast<const T*>(g_fg), *bg = static_cast<const T*>(g_bg);
  const bool inner = channels_are_inner(layer);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (element_size(layer.dtype) == 2 && layer.upstream == nullptr &&
        (inner || Rows(layer.size, layer.stride).stride == 1))
      return gradient_half(layer, tile, fg, bg);
  }
  if (inner) return gradient_by_channels<T>(layer, tile, fg, bg);
  with_weights<T>(layer, tile.n, [&](const auto& weights) { gradient_by_pixels(layer, tile, weights, fg, bg); });
}

void gradient_of_tile(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg) {
  accumulate == DType::kFloat64 ? gradient_of_tile<double>(layer, tile, g_fg, g_bg)
                                : gradient_of_tile<float>(layer, tile, g_fg, g_bg);
}

} // namespace
} // namespace fdk::cpu
