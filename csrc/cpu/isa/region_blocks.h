// Blocks of pixels: the weights of all regions, and the features of a channel.
#pragma once

#include "runs.h"

namespace fdk::cpu {
namespace {

// Regions and channels that are added up side by side, by the number of vector registers; with second moments, which
// take three registers for each, half as many channels.
constexpr int kRegionGroup = 4;
#if defined(FDK_ISA_AVX512)
constexpr int kChannelGroup = 4;
#else
constexpr int kChannelGroup = 2;
#endif

// Rows [C] of a layer and sample in a tensor [rows, N, total_channels], such as sums, their gradients and pivots.
template <class T>
struct RowsOfLayer {
  const T* first;
  int64_t step;

  RowsOfLayer(const void* tensor, const RegionTile& tile)
      : first(tensor == nullptr
                  ? nullptr
                  : static_cast<const T*>(tensor) + tile.tile.n * tile.regions.total_channels + tile.first_channel),
        step(tile.regions.batch * tile.regions.total_channels) {}
  const T* operator[](int64_t row) const { return first + row * step; }
};

// With contiguous channels, features of a block are read again for each group of channels and must stay in the cache.
constexpr int64_t kMaxBlockByChannels = 256;

// Pixels of a block of which so many rows fit into the room of a tile.
inline int64_t block_pixels(int64_t rows, int64_t most) {
  const int64_t wanted = kBlockElements / rows / kMinBlock * kMinBlock;
  return wanted < kMinBlock ? kMinBlock : min(wanted, most);
}

inline int64_t block_by_channels(int64_t num_regions, int64_t channels) {
  return min(block_pixels(num_regions, kMaxBlockByChannels), block_pixels(channels, kMaxBlockByChannels));
}

// The weights of a block of pixels.
template <class T>
struct BlockWeights {
  T* values; // [R][step]
  int64_t step;
  uint8_t used[kMaxBlock]; // whether a pixel has a weight that is not 0, if `has_ignored`
  bool has_ignored;

  // Converts or copies the weights to `buffer` [R][row], a row for each region.
  FDK_NOINLINE void load_block(const RegionTile& t, int64_t p, int64_t count, T* buffer, int64_t row) {
    const RegionLayer& layer = t.layer;
    const int64_t R = t.regions.num_regions, pixels = pixels_of(layer), element = element_size(layer.weight_dtype);
    const char* start = static_cast<const char*>(layer.weights) + (t.tile.n * R * pixels + p) * element;
    values = buffer;
    step = row;
    for (int64_t k = 0; k < R; ++k) {
      T* out = buffer + k * step;
      const T* source = load(start + k * pixels * element, layer.weight_dtype, 1, count, out);
      if (source != out) std::memcpy(out, source, sizeof(T) * count);
    }
    has_ignored = t.regions.selects && find_ignored(R, count);
  }

 private:
  bool find_ignored(int64_t R, int64_t count) {
    std::memset(used, 0, count);
    for (int64_t k = 0; k < R; ++k) {
      const T* w = values + k * step;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        used[i] |= w[i] != T(0);
    }
    uint8_t all = 1;
#pragma omp simd reduction(& : all)
    for (int64_t i = 0; i < count; ++i)
      all &= used[i];
    return all == 0;
  }
};

// Returns a block of pixels of one channel, which begins at `channel`, as contiguous T: in place where they are, else
// in `buffer`.
template <class T>
FDK_NOINLINE const T* load_pixels(const char* channel, DType dtype, const Rows& rows, int64_t p, int64_t count,
                                  T* buffer) {
  const int64_t element = element_size(dtype);
  if (rows.rest_of_row(p) >= count) return load(channel + rows.offset(p) * element, dtype, rows.stride, count, buffer);
  for (int64_t done = 0, run; done < count; done += run) {
    run = min(rows.rest_of_row(p + done), count - done);
    const T* source = load(channel + rows.offset(p + done) * element, dtype, rows.stride, run, buffer + done);
    if (source != buffer + done) std::memcpy(buffer + done, source, sizeof(T) * run);
  }
  return buffer;
}

// Replaces ignored pixels by those of `others`, or by 0 if it is null, in `out`.
template <class T>
FDK_NOINLINE const T* select_used(const T* values, const uint8_t* used, const T* others, int64_t count, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = used[i] ? values[i] : others != nullptr ? others[i] : T(0);
  return out;
}

// The address of channel c of a map, for the sample of a tile.
inline char* channel_of(const Map& map, const RegionTile& t, int64_t c) {
  return static_cast<char*>(map.values) + (t.tile.n * map.stride_n + c * map.stride_c) * element_size(t.layer.dtype);
}

} // namespace
} // namespace fdk::cpu
