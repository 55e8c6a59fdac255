// The sums (C1), (C2) and masses of a tile.
#pragma once

#include "region_blocks.h"

namespace fdk::cpu {
namespace {

// Where a group of channels and regions adds its sums: rows of `width` channels, the moments `moments` further on.
struct PartialSums {
  double* first;
  int64_t width, moments;
};

// What is read after a block, which the passes over it prefetch evenly: each step some lines that lie `spacing` bytes
// apart, `rate` bytes after those of the step before. Without it the memory would rest in all passes but the first.
struct Ahead {
  const char* next;
  int64_t rate, spacing;

  template <int kLines>
  void prefetch_lines() {
    for (int a = 0; a < kLines; ++a)
      prefetch(next + a * spacing);
    next += rate;
  }
};

// ---------------------------------------------------------------- pixels along the vector

// Adds a block of pixels of kChannels channels in kRegions regions.
template <int kChannels, int kRegions, bool kMoments, class T>
inline void add_rows(const T* const* rows, const T* weights, int64_t step, int64_t count, const RowsOfLayer<T>& pivots,
                     int64_t k, int64_t c, Ahead& ahead, PartialSums out) {
  using V = Vector<T>;
  V s[kChannels][kRegions], q[kChannels][kRegions], pivot[kChannels][kRegions];
  for (int a = 0; a < kChannels; ++a) {
    for (int b = 0; b < kRegions; ++b) {
      s[a][b] = q[a][b] = V{};
      if constexpr (kMoments) pivot[a][b] = pivots[k + b][c + a] - V{};
    }
  }
  weights += k * step;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    V x[kChannels];
    ahead.prefetch_lines<kChannels>();
    for (int a = 0; a < kChannels; ++a)
      x[a] = load_vector(rows[a] + i);
    for (int b = 0; b < kRegions; ++b) {
      const V w = load_vector(weights + b * step + i);
      for (int a = 0; a < kChannels; ++a) {
        if constexpr (kMoments) {
          const V centred = x[a] - pivot[a][b], product = w * centred;
          s[a][b] += product;
          q[a][b] += product * centred;
        } else {
          s[a][b] += w * x[a];
        }
      }
    }
  }
  for (int a = 0; a < kChannels; ++a) {
    for (int b = 0; b < kRegions; ++b) {
      T first = total<T>(s[a][b]), second = kMoments ? total<T>(q[a][b]) : T(0);
      const T about = kMoments ? pivots[k + b][c + a] : T(0);
      for (int64_t j = i; j < count; ++j) {
        const T w = weights[b * step + j], centred = rows[a][j] - about, product = w * centred;
        first += product;
        if constexpr (kMoments) second += product * centred;
      }
      double* at = out.first + b * out.width + a;
      at[0] += first;
      if constexpr (kMoments) at[out.moments] += second;
    }
  }
}

// Adds a block of pixels of channels c to c + kChannels - 1 in all regions.
template <int kChannels, bool kMoments, class T>
void add_block(const T* const* rows, const BlockWeights<T>& weights, int64_t count, int64_t num_regions,
               const RowsOfLayer<T>& pivots, int64_t c, Ahead ahead, PartialSums out) {
  int64_t k = 0;
  const auto add = [&](auto add_group) {
    add_group(rows, weights.values, weights.step, count, pivots, k, c, ahead, out);
  };
  for (; k + kRegionGroup <= num_regions; k += kRegionGroup, out.first += kRegionGroup * out.width)
    add(add_rows<kChannels, kRegionGroup, kMoments, T>);
  if (num_regions - k == 3) add(add_rows<kChannels, 3, kMoments, T>);
  if (num_regions - k == 2) add(add_rows<kChannels, 2, kMoments, T>);
  if (num_regions - k == 1) add(add_rows<kChannels, 1, kMoments, T>);
}

template <class T>
inline void add_masses(const T* weights, int64_t step, int64_t num_regions, int64_t count, double* masses) {
  for (int64_t k = 0; k < num_regions; ++k) {
    const T* w = weights + k * step;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i)
      sum += w[i];
    masses[k] += sum;
  }
}

template <bool kMoments, class T>
void region_sums_by_pixels(const RegionTile& t, double* sums, double* masses) {
  constexpr int kChannels = kMoments ? kChannelGroup / 2 : kChannelGroup;
  BlockWeights<T> weights;
  T* weights_buffer = static_cast<T*>(t.room);
  T* buffer = weights_buffer + room_elements(t.regions);
  const Rows rows(t.layer.size, t.layer.features.stride);
  const RowsOfLayer<T> pivots(t.regions.pivots, t);
  const int64_t R = t.regions.num_regions, width = t.tile.channel_end - t.tile.channel_begin;
  const int64_t block = block_pixels(R, kMaxBlock), element = element_size(t.layer.dtype);
  const int64_t passes = (R + kRegionGroup - 1) / kRegionGroup;
  const bool in_place = t.layer.dtype == Is<T>::kDType && rows.stride == 1;
  for (int64_t p = t.tile.pixel_begin, count; p < t.tile.pixel_end; p += count) {
    count = min(block, t.tile.pixel_end - p);
    weights.load_block(t, p, count, weights_buffer, block + kPadding);
    if (t.tile.channel_begin == 0) add_masses(weights.values, weights.step, R, count, masses);
    for (int64_t c = t.tile.channel_begin, taken; c < t.tile.channel_end; c += taken) {
      taken = c + kChannels <= t.tile.channel_end ? kChannels : 1;
      const T* group[kChannels];
      for (int64_t a = 0; a < taken; ++a) {
        T* own = buffer + a * (kMaxBlock + kPadding);
        group[a] = load_pixels(channel_of(t.layer.features, t, c + a), t.layer.dtype, rows, p, count, own);
        if (weights.has_ignored) group[a] = select_used<T>(group[a], weights.used, nullptr, count, own);
      }
      Ahead ahead{reinterpret_cast<const char*>(group[0]), kVectorBytes / passes, 0};
      if (in_place) {
        const bool same_pixels = c + taken < t.tile.channel_end;
        const int64_t next = same_pixels ? c + taken : t.tile.channel_begin;
        ahead.next = channel_of(t.layer.features, t, next) + rows.offset(same_pixels ? p : p + count) * element;
        ahead.spacing = t.layer.features.stride_c * element;
      }
      const PartialSums out{sums + c - t.tile.channel_begin, width, R * width};
      taken == kChannels ? add_block<kChannels, kMoments>(group, weights, count, R, pivots, c, ahead, out)
                         : add_block<1, kMoments>(group, weights, count, R, pivots, c, ahead, out);
    }
  }
}

// ---------------------------------------------------------------- channels along the vector

// Adds a block of pixels, `pixel_step` apart, of kVectors vectors of channels in kRegions regions. Of the sums `valid`
// channels are taken.
template <int kVectors, int kRegions, bool kMoments, class T>
inline void add_pixels(const T* pixels, int64_t pixel_step, const T* weights, int64_t step, int64_t count,
                       const RowsOfLayer<T>& pivots, int64_t k, int64_t c, int64_t valid, Ahead& ahead,
                       PartialSums out) {
  using V = Vector<T>;
  V s[kVectors][kRegions], q[kVectors][kRegions], pivot[kVectors][kRegions];
  for (int a = 0; a < kVectors; ++a) {
    for (int b = 0; b < kRegions; ++b) {
      s[a][b] = q[a][b] = V{};
      if constexpr (kMoments) {
        T lanes[kLanes<T>] = {};
        const int64_t first = a * kLanes<T>;
        std::memcpy(lanes, pivots[k + b] + c + first, sizeof(T) * min(kLanes<T>, valid - first));
        pivot[a][b] = load_vector(lanes);
      }
    }
  }
  weights += k * step;
  ahead.spacing = ahead.rate / kVectors;
  for (int64_t i = 0; i < count; ++i) {
    const T* pixel = pixels + i * pixel_step;
    V x[kVectors];
    ahead.prefetch_lines<kVectors>();
    for (int a = 0; a < kVectors; ++a)
      x[a] = load_vector(pixel + a * kLanes<T>);
    for (int b = 0; b < kRegions; ++b) {
      const T w = weights[b * step + i];
      for (int a = 0; a < kVectors; ++a) {
        if constexpr (kMoments) {
          const V centred = x[a] - pivot[a][b], product = w * centred;
          s[a][b] += product;
          q[a][b] += product * centred;
        } else {
          s[a][b] += w * x[a];
        }
      }
    }
  }
  const auto add = [&](V sum, double* at, int64_t lanes) {
    T values[kLanes<T>];
    std::memcpy(values, &sum, sizeof(values));
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j)
      at[j] += values[j];
  };
  for (int a = 0; a < kVectors; ++a) {
    for (int b = 0; b < kRegions; ++b) {
      double* at = out.first + b * out.width + a * kLanes<T>;
      const int64_t lanes = min(kLanes<T>, valid - a * kLanes<T>);
      add(s[a][b], at, lanes);
      if constexpr (kMoments) add(q[a][b], at + out.moments, lanes);
    }
  }
}

template <int kVectors, bool kMoments, class T>
void add_block_by_channels(const T* pixels, int64_t pixel_step, const T* weights, int64_t step, int64_t count,
                           int64_t num_regions, const RowsOfLayer<T>& pivots, int64_t c, int64_t valid, Ahead& ahead,
                           PartialSums out) {
  int64_t k = 0;
  const auto add = [&](auto add_group) {
    add_group(pixels, pixel_step, weights, step, count, pivots, k, c, valid, ahead, out);
  };
  for (; k + kRegionGroup <= num_regions; k += kRegionGroup, out.first += kRegionGroup * out.width)
    add(add_pixels<kVectors, kRegionGroup, kMoments, T>);
  if (num_regions - k == 3) add(add_pixels<kVectors, 3, kMoments, T>);
  if (num_regions - k == 2) add(add_pixels<kVectors, 2, kMoments, T>);
  if (num_regions - k == 1) add(add_pixels<kVectors, 1, kMoments, T>);
}

// Moves the used pixels of a block to the front: their weights in `weights` [R][step], their features, converted, to
// `out` [pixels][channels]. Returns their number.
template <class T>
int64_t copy_used(const char* first, DType dtype, int64_t pixel_step, int64_t channels, const uint8_t* used,
                  int64_t count, T* weights, int64_t step, int64_t num_regions, T* out) {
  int64_t taken = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (used != nullptr && !used[i]) continue;
    T* row = out + taken * channels;
    const T* source = load(first + i * pixel_step * element_size(dtype), dtype, 1, channels, row);
    if (source != row) std::memcpy(row, source, sizeof(T) * channels);
    for (int64_t k = 0; taken != i && k < num_regions; ++k)
      weights[k * step + taken] = weights[k * step + i];
    ++taken;
  }
  return taken;
}

template <bool kMoments, class T>
void region_sums_by_channels(const RegionTile& t, double* sums, double* masses) {
  constexpr int kVectors = kMoments ? kChannelGroup / 2 : kChannelGroup;
  BlockWeights<T> weights;
  T* weights_buffer = static_cast<T*>(t.room);
  T* buffer = weights_buffer + room_elements(t.regions);
  T last[kMaxBlockByChannels * kLanes<T>]; // channels that do not fill a vector, [pixels][lanes]
  const Rows rows(t.layer.size, t.layer.features.stride);
  const RowsOfLayer<T> pivots(t.regions.pivots, t);
  const int64_t R = t.regions.num_regions, width = t.tile.channel_end - t.tile.channel_begin;
  const int64_t block = block_by_channels(R, width), step = block + kPadding;
  const int64_t vectors = (width + kLanes<T> - 1) / kLanes<T>, full = width / (kVectors * kLanes<T>);
  const int64_t groups = full + (vectors - full * kVectors + 1) / 2;
  const int64_t passes = groups * ((R + kRegionGroup - 1) / kRegionGroup);
  const char* start = channel_of(t.layer.features, t, t.tile.channel_begin);
  for (int64_t p = t.tile.pixel_begin, count; p < t.tile.pixel_end; p += count) {
    count = min(min(block, t.tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_block(t, p, count, weights_buffer, step);
    if (t.tile.channel_begin == 0) add_masses(weights.values, step, R, count, masses);
    const char* first = start + rows.offset(p) * element_size(t.layer.dtype);
    const T* pixels = reinterpret_cast<const T*>(first);
    int64_t pixel_step = rows.stride, taken = count;
    if (weights.has_ignored || t.layer.dtype != Is<T>::kDType) {
      taken = copy_used(first, t.layer.dtype, rows.stride, width, weights.has_ignored ? weights.used : nullptr, count,
                        weights_buffer, step, R, buffer);
      pixels = buffer;
      pixel_step = width;
    }
    int64_t c = 0;
    Ahead ahead{reinterpret_cast<const char*>(pixels), 0, 0};
    if (pixels != buffer) {
      ahead.next += count * pixel_step * static_cast<int64_t>(sizeof(T));
      ahead.rate = width * static_cast<int64_t>(sizeof(T)) / passes;
    }
    const auto add = [&](auto add_channels, const T* from, int64_t from_step, int64_t valid) {
      add_channels(from, from_step, weights_buffer, step, taken, R, pivots, t.tile.channel_begin + c, valid, ahead,
                   PartialSums{sums + c, width, R * width});
    };
    constexpr int64_t kGroup = kVectors * kLanes<T>;
    for (; c + kGroup <= width; c += kGroup)
      add(add_block_by_channels<kVectors, kMoments, T>, pixels + c, pixel_step, kGroup);
    if constexpr (kVectors == 4) {
      if (c + 2 * kLanes<T> <= width) {
        add(add_block_by_channels<2, kMoments, T>, pixels + c, pixel_step, 2 * kLanes<T>);
        c += 2 * kLanes<T>;
      }
    }
    for (; c + kLanes<T> <= width; c += kLanes<T>)
      add(add_block_by_channels<1, kMoments, T>, pixels + c, pixel_step, kLanes<T>);
    if (c < width) {
      for (int64_t i = 0; i < taken; ++i) {
        for (int64_t j = 0; j < kLanes<T>; ++j)
          last[i * kLanes<T> + j] = c + j < width ? pixels[i * pixel_step + c + j] : T(0);
      }
      add(add_block_by_channels<1, kMoments, T>, static_cast<const T*>(last), kLanes<T>, width - c);
    }
  }
}

template <bool kMoments, class T>
void region_sums_of_tile(const RegionTile& t, double* sums, double* masses) {
  std::memset(sums, 0, sizeof(double) * rows_of(t.regions) * (t.tile.channel_end - t.tile.channel_begin));
  std::memset(masses, 0, sizeof(double) * t.regions.num_regions);
  channels_are_inner(t.layer, t.layer.features) ? region_sums_by_channels<kMoments, T>(t, sums, masses)
                                                : region_sums_by_pixels<kMoments, T>(t, sums, masses);
}

void region_sums_of_tile(const RegionTile& t, double* sums, double* masses) {
  if (t.regions.accumulate == DType::kFloat64) {
    return t.regions.pivots != nullptr ? region_sums_of_tile<true, double>(t, sums, masses)
                                       : region_sums_of_tile<false, double>(t, sums, masses);
  }
  t.regions.pivots != nullptr ? region_sums_of_tile<true, float>(t, sums, masses)
                              : region_sums_of_tile<false, float>(t, sums, masses);
}

} // namespace
} // namespace fdk::cpu
