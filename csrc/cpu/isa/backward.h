// Backward of region_sums: the gradient of the features (R3) on a tile.
#pragma once

#include "runs.h"

namespace fdk::cpu {
namespace {

// One run of one channel; `added` may be null.
template <class T, class M, bool kHasBg>
inline void write_row(const RawWeights<T, M, kHasBg>& weights, int64_t p, int64_t count, T g_fg, T g_bg, const T* added,
                      T* out) {
  using V = Vector<T>;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const V w = weights.fg_vector(p + i), u = weights.bg_vector(p + i, w);
    V value = select_valid<kHasBg>(w, u, g_fg * w + g_bg * u);
    if (added != nullptr) value += load_vector(added + i);
    store_vector(out + i, value);
  }
  for (; i < count; ++i) {
    const T w = weights.fg_at(p + i), u = weights.bg_at(p + i);
    const T value = !kHasBg || is_valid(w, u) ? g_fg * w + g_bg * u : T(0);
    out[i] = added != nullptr ? value + added[i] : value;
  }
}

// Under a mask of bytes the gradient of a channel has two values, and 0 where no weight is: their bits are chosen,
// which needs no arithmetic and no rounding. What they are is computed as elsewhere, so that NaN comes out the same.
template <class T>
inline T value_at(T g_fg, T g_bg, T w, T u) {
  return g_fg * w + g_bg * u;
}

template <class T>
inline uint16_t half_bits(T value, DType dtype) {
  uint16_t bits;
  store(&value, &bits, dtype, 1, 1);
  return bits;
}

template <bool kHasBg>
inline void choose_row(const uint8_t* fg, const uint8_t* bg, int64_t count, uint16_t in_fg, uint16_t in_bg,
                       uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t w = static_cast<uint16_t>(-fg[i]);
    const uint16_t u = kHasBg ? static_cast<uint16_t>(-bg[i]) : static_cast<uint16_t>(~w);
    out[i] = static_cast<uint16_t>((w & in_fg) | (u & in_bg));
  }
}

template <class T, class M, bool kHasBg>
void backward_by_pixels(const Layer& layer, const Tile& tile, const RawWeights<T, M, kHasBg>& weights, const T* g_fg,
                        const T* g_bg) {
  T out_buffer[kRun], upstream_buffer[kRun];
  const Rows rows(layer.size, layer.stride), upstream_rows(layer.size, layer.upstream_stride);
  const int64_t element = size_of(layer.dtype);
  // Channel by channel, so that what is written is one stream.
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
      if constexpr (sizeof(M) == 1) {
        if (added == nullptr && element == 2 && rows.stride == 1) {
          const uint16_t in_fg = half_bits(value_at(g_fg[c], g_bg[c], T(1), T(0)), layer.dtype);
          const uint16_t in_bg = half_bits(value_at(g_fg[c], g_bg[c], T(0), T(1)), layer.dtype);
          choose_row<kHasBg>(weights.fg + p, kHasBg ? weights.bg + p : nullptr, count, in_fg, in_bg,
                             reinterpret_cast<uint16_t*>(address));
          continue;
        }
      }
      T* out = target(address, layer.dtype, rows.stride, out_buffer);
      write_row(weights, p, count, g_fg[c], g_bg[c], added, out);
      store(out, address, layer.dtype, rows.stride, count);
    }
  }
}

template <class T>
void backward_by_channels(const Layer& layer, const Tile& tile, const T* g_fg, const T* g_bg) {
  Weights<T> weights;
  T out_buffer[kMaxTileChannels], upstream_buffer[kMaxTileChannels];
  const Rows rows(layer.size, layer.stride), upstream_rows(layer.size, layer.upstream_stride);
  const int64_t element = size_of(layer.dtype), channels = tile.channel_end - tile.channel_begin;
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
      const bool there = layer.bg == nullptr || is_valid(weights.fg[i], weights.bg[i]);
      const T w = weights.fg[i], u = weights.bg[i];
      if (there) {
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

// Under a mask of bytes a pixel of channels_last is one of three rows.
template <class T>
void backward_by_chosen_rows(const Layer& layer, const Tile& tile, const T* g_fg, const T* g_bg) {
  T values[kMaxTileChannels] = {};
  alignas(kCacheLine) char in_fg[kMaxTileChannels * sizeof(T)], in_bg[kMaxTileChannels * sizeof(T)];
  alignas(kCacheLine) static const char nothing[kMaxTileChannels * sizeof(double)] = {};
  const Rows rows(layer.size, layer.stride);
  const int64_t element = size_of(layer.dtype), channels = tile.channel_end - tile.channel_begin;
  const int64_t bytes = channels * element;
  for (int64_t c = 0; c < channels; ++c)
    values[c] = value_at(g_fg[tile.channel_begin + c], g_bg[tile.channel_begin + c], T(1), T(0));
  store(values, in_fg, layer.dtype, 1, channels);
  for (int64_t c = 0; c < channels; ++c)
    values[c] = value_at(g_fg[tile.channel_begin + c], g_bg[tile.channel_begin + c], T(0), T(1));
  store(values, in_bg, layer.dtype, 1, channels);
  const uint8_t* fg = static_cast<const uint8_t*>(layer.fg) + tile.n * pixels_of(layer);
  const uint8_t* bg = layer.bg == nullptr ? fg : static_cast<const uint8_t*>(layer.bg) + tile.n * pixels_of(layer);
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(tile.pixel_end - p, rows.rest_of_row(p));
    char* address = static_cast<char*>(layer.features) +
                    (tile.n * layer.stride_n + tile.channel_begin * layer.stride_c + rows.offset(p)) * element;
    for (int64_t i = 0; i < count; ++i) {
      const bool background = layer.bg == nullptr || bg[p + i] != 0;
      const char* row = fg[p + i] != 0 ? in_fg : background ? in_bg : nothing;
      std::memcpy(address + i * rows.stride * element, row, bytes);
    }
  }
}

template <class T>
void backward(const Layer& layer, const Tile& tile, const void* g_fg, const void* g_bg) {
  const T *fg = static_cast<const T*>(g_fg), *bg = static_cast<const T*>(g_bg);
  const bool choose = layer.mask_dtype == DType::kUInt8 && layer.upstream == nullptr;
  if (channels_are_inner(layer) && choose && size_of(layer.dtype) == 2) {
    backward_by_chosen_rows<T>(layer, tile, fg, bg);
  } else if (channels_are_inner(layer)) {
    backward_by_channels<T>(layer, tile, fg, bg);
  } else {
    with_weights<T>(layer, tile.n, [&](const auto& weights) { backward_by_pixels(layer, tile, weights, fg, bg); });
  }
}

void backward_tile(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg) {
  accumulate == DType::kFloat64 ? backward<double>(layer, tile, g_fg, g_bg) : backward<float>(layer, tile, g_fg, g_bg);
}

} // namespace
} // namespace fdk::cpu
