// The gradient of the features (C3) on a tile.
#pragma once

#include "region_blocks.h"

namespace fdk::cpu {
namespace {

// What the gradient of a layer and sample is made of: rows of grad_sums for the sums and for the moments, and pivots.
template <class T>
struct Slopes {
  RowsOfLayer<T> g, pivots;
  int64_t num_regions;

  Slopes(const RegionTile& t, const void* grad_sums)
      : g(grad_sums, t), pivots(t.regions.pivots, t), num_regions(t.regions.num_regions) {}
  const T* h(int64_t k) const { return g[num_regions + k]; }
};

// ---------------------------------------------------------------- pixels along the vector

// Writes (C3) for a block of pixels of channels c to c + kChannels - 1, plus `added`, if not null; x are their
// features, under moments.
template <int kChannels, bool kMoments, class T>
void write_rows(const Slopes<T>& slopes, int64_t c, const T* weights, int64_t step, int64_t count, const T* const* x,
                const T* const* added, T* const* out) {
  using V = Vector<T>;
  constexpr int kVectors = 4;
  const int64_t R = slopes.num_regions;
  int64_t i = 0;
  for (; i + kVectors * kLanes<T> <= count; i += kVectors * kLanes<T>) {
    V sum[kChannels][kVectors], features[kChannels][kVectors];
    for (int a = 0; a < kChannels; ++a) {
      for (int v = 0; v < kVectors; ++v) {
        sum[a][v] = V{};
        if constexpr (kMoments) features[a][v] = load_vector(x[a] + i + v * kLanes<T>);
      }
    }
    for (int64_t k = 0; k < R; ++k) {
      V w[kVectors];
      for (int v = 0; v < kVectors; ++v)
        w[v] = load_vector(weights + k * step + i + v * kLanes<T>);
      for (int a = 0; a < kChannels; ++a) {
        const T g = slopes.g[k][c + a];
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (kMoments) {
            const T twice_h = 2 * slopes.h(k)[c + a];
            sum[a][v] += w[v] * (g + twice_h * (features[a][v] - slopes.pivots[k][c + a]));
          } else {
            sum[a][v] += g * w[v];
          }
        }
      }
    }
    for (int a = 0; a < kChannels; ++a) {
      for (int v = 0; v < kVectors; ++v) {
        if (added != nullptr) sum[a][v] += load_vector(added[a] + i + v * kLanes<T>);
        store_vector(out[a] + i + v * kLanes<T>, sum[a][v]);
      }
    }
  }
  for (; i < count; ++i) {
    for (int a = 0; a < kChannels; ++a) {
      T sum = 0;
      for (int64_t k = 0; k < R; ++k) {
        T slope = slopes.g[k][c + a];
        if constexpr (kMoments) slope += 2 * slopes.h(k)[c + a] * (x[a][i] - slopes.pivots[k][c + a]);
        sum += weights[k * step + i] * slope;
      }
      out[a][i] = added != nullptr ? sum + added[a][i] : sum;
    }
  }
}

// Stores a block of pixels of one channel, unless it was computed in place.
template <class T>
FDK_NOINLINE void store_pixels(const T* values, char* channel, DType dtype, const Rows& rows, int64_t p,
                               int64_t count) {
  for (int64_t done = 0, run; done < count; done += run) {
    run = min(rows.rest_of_row(p + done), count - done);
    store(values + done, channel + rows.offset(p + done) * element_size(dtype), dtype, rows.stride, run);
  }
}

template <bool kMoments, class T>
void region_gradient_by_pixels(const RegionTile& t, const void* grad_sums) {
  constexpr int kChannels = kMoments ? kChannelGroup / 2 : kChannelGroup;
  constexpr int64_t kRow = kMaxBlock + kPadding;
  BlockWeights<T> weights;
  const RegionLayer& layer = t.layer;
  const int64_t R = t.regions.num_regions, block = block_pixels(R, kMaxBlock);
  T* weights_buffer = static_cast<T*>(t.room);
  T* out_buffer = weights_buffer + room_elements(t.regions);
  T* buffer = out_buffer + kChannels * kRow;
  T* upstream_buffer = buffer + kChannels * kRow;
  const bool has_upstream = layer.upstream.values != nullptr;
  const Rows rows(layer.size, layer.gradient.stride), feature_rows(layer.size, layer.features.stride),
      upstream_rows(layer.size, layer.upstream.stride);
  const Slopes<T> slopes(t, grad_sums);
  for (int64_t p = t.tile.pixel_begin, count; p < t.tile.pixel_end; p += count) {
    count = min(block, t.tile.pixel_end - p);
    weights.load_block(t, p, count, weights_buffer, block + kPadding);
    const bool in_place = layer.dtype == Is<T>::kDType && rows.stride == 1 && rows.rest_of_row(p) >= count;
    for (int64_t c = t.tile.channel_begin, taken; c < t.tile.channel_end; c += taken) {
      taken = c + kChannels <= t.tile.channel_end ? kChannels : 1;
      const T *x[kChannels] = {}, *added[kChannels] = {};
      T* out[kChannels];
      for (int64_t a = 0; a < taken; ++a) {
        char* address = channel_of(layer.gradient, t, c + a) + rows.offset(p) * element_size(layer.dtype);
        out[a] = in_place ? reinterpret_cast<T*>(address) : out_buffer + a * kRow;
        const auto read = [&](const Map& map, const Rows& of_map, T* room) {
          return load_pixels(channel_of(map, t, c + a), layer.dtype, of_map, p, count, room + a * kRow);
        };
        if constexpr (kMoments) x[a] = read(layer.features, feature_rows, buffer);
        if (has_upstream) added[a] = read(layer.upstream, upstream_rows, upstream_buffer);
      }
      const T* const* to_add = has_upstream ? added : nullptr;
      taken == kChannels
          ? write_rows<kChannels, kMoments>(slopes, c, weights.values, weights.step, count, x, to_add, out)
          : write_rows<1, kMoments>(slopes, c, weights.values, weights.step, count, x, to_add, out);
      for (int64_t a = 0; a < taken; ++a) {
        if (weights.has_ignored) select_used<T>(out[a], weights.used, added[a], count, out[a]);
        if (!in_place) store_pixels(out[a], channel_of(layer.gradient, t, c + a), layer.dtype, rows, p, count);
      }
    }
  }
}

// ---------------------------------------------------------------- channels along the vector

// Where pixels lie one after another, their channels contiguous.
template <class T>
struct Pixels {
  T* first;
  int64_t step;
  T* operator[](int64_t i) const { return first + i * step; }
  Pixels from(int64_t channel) const { return {first == nullptr ? nullptr : first + channel, step}; }
  Pixels after(int64_t pixels) const { return from(pixels * step); }
};

// Writes (C3) for kPixels pixels of kVectors vectors of channels from c on.
template <int kPixels, int kVectors, bool kMoments, class T>
inline void write_pixels(const Slopes<T>& slopes, int64_t c, const T* weights, int64_t step, Pixels<const T> x,
                         Pixels<const T> added, Pixels<T> out) {
  using V = Vector<T>;
  V sum[kPixels][kVectors], features[kPixels][kVectors];
  for (int i = 0; i < kPixels; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = V{};
      if constexpr (kMoments) features[i][v] = load_vector(x[i] + v * kLanes<T>);
    }
  }
  for (int64_t k = 0; k < slopes.num_regions; ++k) {
    for (int v = 0; v < kVectors; ++v) {
      const V g = load_vector(slopes.g[k] + c + v * kLanes<T>);
      V h = V{}, pivot = V{};
      if constexpr (kMoments) {
        h = T(2) * load_vector(slopes.h(k) + c + v * kLanes<T>);
        pivot = load_vector(slopes.pivots[k] + c + v * kLanes<T>);
      }
      for (int i = 0; i < kPixels; ++i) {
        const T w = weights[k * step + i];
        if constexpr (kMoments) {
          sum[i][v] += w * (g + h * (features[i][v] - pivot));
        } else {
          sum[i][v] += w * g;
        }
      }
    }
  }
  for (int i = 0; i < kPixels; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      if (added.first != nullptr) sum[i][v] += load_vector(added[i] + v * kLanes<T>);
      store_vector(out[i] + v * kLanes<T>, sum[i][v]);
    }
  }
}

// Writes (C3) for kPixels pixels of the `width` channels from c on.
template <int kPixels, bool kMoments, class T>
inline void write_channels(const Slopes<T>& slopes, int64_t c, int64_t width, const T* weights, int64_t step,
                           Pixels<const T> x, Pixels<const T> added, Pixels<T> out) {
  constexpr int kVectors = 2;
  int64_t at = 0;
  for (; at + kVectors * kLanes<T> <= width; at += kVectors * kLanes<T>) {
    write_pixels<kPixels, kVectors, kMoments>(slopes, c + at, weights, step, x.from(at), added.from(at), out.from(at));
  }
  for (; at < width && width >= kLanes<T>; at += kLanes<T>) {
    if (at + kLanes<T> > width) at = width - kLanes<T>; // the last vector overlaps the one before
    write_pixels<kPixels, 1, kMoments>(slopes, c + at, weights, step, x.from(at), added.from(at), out.from(at));
  }
  for (; at < width; ++at) { // fewer channels than a vector has
    for (int i = 0; i < kPixels; ++i) {
      T sum = 0;
      for (int64_t k = 0; k < slopes.num_regions; ++k) {
        T slope = slopes.g[k][c + at];
        if constexpr (kMoments) slope += 2 * slopes.h(k)[c + at] * (x[i][at] - slopes.pivots[k][c + at]);
        sum += weights[k * step + i] * slope;
      }
      out[i][at] = added.first != nullptr ? sum + added[i][at] : sum;
    }
  }
}

template <bool kMoments, class T>
void region_gradient_by_channels(const RegionTile& t, const void* grad_sums) {
  constexpr int kPixels = kMoments ? kChannelGroup : 2 * kChannelGroup;
  BlockWeights<T> weights;
  const RegionLayer& layer = t.layer;
  T* weights_buffer = static_cast<T*>(t.room);
  T* out_buffer = weights_buffer + room_elements(t.regions);
  T* buffer = out_buffer + room_elements(t.regions);
  T* upstream_buffer = buffer + room_elements(t.regions);
  const Rows rows(layer.size, layer.gradient.stride), feature_rows(layer.size, layer.features.stride),
      upstream_rows(layer.size, layer.upstream.stride);
  const int64_t R = t.regions.num_regions, c = t.tile.channel_begin, width = t.tile.channel_end - c;
  const int64_t block = block_by_channels(R, width), element = element_size(layer.dtype);
  const Slopes<T> slopes(t, grad_sums);
  const bool in_place = layer.dtype == Is<T>::kDType;
  // A run of pixels of a map that is read, converted into `room` unless it may stay in place.
  const auto read = [&](const Map& map, const Rows& of_map, int64_t p, int64_t count, T* room) {
    const char* first = channel_of(map, t, c) + of_map.offset(p) * element;
    if (in_place && map.stride_c == 1) return Pixels<const T>{reinterpret_cast<const T*>(first), of_map.stride};
    for (int64_t i = 0; i < count; ++i) {
      T* row = room + i * width;
      const T* source = load(first + i * of_map.stride * element, layer.dtype, map.stride_c, width, row);
      if (source != row) std::memcpy(row, source, sizeof(T) * width);
    }
    return Pixels<const T>{room, width};
  };
  for (int64_t p = t.tile.pixel_begin, count; p < t.tile.pixel_end; p += count) {
    count = min(min(block, t.tile.pixel_end - p), rows.rest_of_row(p));
    if constexpr (kMoments) count = min(count, feature_rows.rest_of_row(p));
    if (layer.upstream.values != nullptr) count = min(count, upstream_rows.rest_of_row(p));
    weights.load_block(t, p, count, weights_buffer, block + kPadding);
    char* start = channel_of(layer.gradient, t, c) + rows.offset(p) * element;
    Pixels<T> out{out_buffer, width};
    if (in_place) out = {reinterpret_cast<T*>(start), rows.stride};
    Pixels<const T> x{nullptr, 0}, added{nullptr, 0};
    if constexpr (kMoments) x = read(layer.features, feature_rows, p, count, buffer);
    if (layer.upstream.values != nullptr) added = read(layer.upstream, upstream_rows, p, count, upstream_buffer);
    const auto write = [&](auto write_some, int64_t i) {
      write_some(slopes, c, width, weights.values + i, weights.step, x.after(i), added.after(i), out.after(i));
    };
    int64_t i = 0;
    for (; i + kPixels <= count; i += kPixels)
      write(write_channels<kPixels, kMoments, T>, i);
    for (; i < count; ++i)
      write(write_channels<1, kMoments, T>, i);
    for (i = 0; weights.has_ignored && i < count; ++i) {
      if (weights.used[i]) continue;
      if (added.first != nullptr) {
        std::memcpy(out[i], added[i], sizeof(T) * width);
      } else {
        std::memset(out[i], 0, sizeof(T) * width);
      }
    }
    for (i = 0; !in_place && i < count; ++i)
      store(out[i], start + i * rows.stride * element, layer.dtype, 1, width);
  }
}

template <bool kMoments, class T>
void region_gradient_of_tile(const RegionTile& t, const void* grad_sums) {
  channels_are_inner(t.layer, t.layer.gradient) ? region_gradient_by_channels<kMoments, T>(t, grad_sums)
                                                : region_gradient_by_pixels<kMoments, T>(t, grad_sums);
}

void region_gradient_of_tile(const RegionTile& t, const void* grad_sums) {
  if (t.regions.accumulate == DType::kFloat64) {
    return t.regions.pivots != nullptr ? region_gradient_of_tile<true, double>(t, grad_sums)
                                       : region_gradient_of_tile<false, double>(t, grad_sums);
  }
  t.regions.pivots != nullptr ? region_gradient_of_tile<true, float>(t, grad_sums)
                              : region_gradient_of_tile<false, float>(t, grad_sums);
}

} // namespace
} // namespace fdk::cpu
