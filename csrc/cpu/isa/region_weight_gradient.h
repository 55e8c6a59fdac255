// The gradients of the weights (C4) on a tile.
#pragma once

#include "region_blocks.h"

namespace fdk::cpu {
namespace {

// Adds one channel of a block of pixels to the gradient of the weight of one region.
template <bool kMoments, class T>
inline void add_channel(const T* x, int64_t count, double g, double h, double pivot, double* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double centred = static_cast<double>(x[i]) - pivot;
    out[i] += (kMoments ? g + h * centred : g) * centred;
  }
}

// One form for all layouts, since soft masks with gradients are rare: channels are added up one by one, in double.
template <bool kMoments, class T>
void region_weight_gradient_of_tile(const RegionTile& t, const void* grad_sums) {
  constexpr int64_t kPixels = 256, kRegions = 8;
  BlockWeights<T> weights;
  double sums[kRegions][kPixels];
  T buffer[kPixels];
  const RegionLayer& layer = t.layer;
  const int64_t R = t.regions.num_regions, pixels = pixels_of(layer), block = block_pixels(R, kPixels);
  const Rows rows(layer.size, layer.features.stride);
  const RowsOfLayer<T> g(grad_sums, t), pivots(t.regions.pivots, t);
  for (int64_t p = t.tile.pixel_begin, count; p < t.tile.pixel_end; p += count) {
    count = min(block, t.tile.pixel_end - p);
    weights.load_block(t, p, count, static_cast<T*>(t.room), block + kPadding);
    for (int64_t first = 0; first < R; first += kRegions) {
      const int64_t group = min(kRegions, R - first);
      for (int64_t k = 0; k < group; ++k)
        std::memset(sums[k], 0, sizeof(double) * count);
      for (int64_t c = 0; c < layer.channels; ++c) {
        const T* x = load_pixels(channel_of(layer.features, t, c), layer.dtype, rows, p, count, buffer);
        for (int64_t k = 0; k < group; ++k) {
          const double h = kMoments ? g[R + first + k][c] : 0, pivot = kMoments ? pivots[first + k][c] : 0;
          add_channel<kMoments>(x, count, g[first + k][c], h, pivot, sums[k]);
        }
      }
      for (int64_t k = 0; k < group; ++k) {
        T* out = static_cast<T*>(layer.grad_weights) + (t.tile.n * R + first + k) * pixels + p;
        for (int64_t i = 0; i < count; ++i)
          out[i] = weights.has_ignored && !weights.used[i] ? T(0) : static_cast<T>(sums[k][i]);
      }
    }
  }
}

void region_weight_gradient_of_tile(const RegionTile& t, const void* grad_sums) {
  if (t.regions.accumulate == DType::kFloat64) {
    return t.regions.pivots != nullptr ? region_weight_gradient_of_tile<true, double>(t, grad_sums)
                                       : region_weight_gradient_of_tile<false, double>(t, grad_sums);
  }
  t.regions.pivots != nullptr ? region_weight_gradient_of_tile<true, float>(t, grad_sums)
                              : region_weight_gradient_of_tile<false, float>(t, grad_sums);
}

} // namespace
} // namespace fdk::cpu
