// The gradients of the weights (R4) on a tile.
#pragma once

#include "runs.h"

namespace fdk::cpu {
namespace {

// One form for all layouts, since soft masks with gradients are rare: channels are added up one by one, in double.
template <class T>
void mask_gradient_of_tile(const Layer& layer, const Tile& tile, const T* g_fg, const T* g_bg) {
  Weights<T> weights;
  T buffer[kRun];
  double fg[kRun], bg[kRun];
  const Rows rows(layer.size, layer.stride);
  const int64_t element = element_size(layer.dtype);
  const bool two = layer.bg != nullptr;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    for (int64_t i = 0; i < count; ++i)
      fg[i] = bg[i] = 0;
    for (int64_t c = tile.channel_begin; c < tile.channel_end; ++c) {
      const char* address = static_cast<const char*>(layer.features) +
                            (tile.n * layer.stride_n + c * layer.stride_c + rows.offset(p)) * element;
      const T* x = load(address, layer.dtype, rows.stride, count, buffer);
      const double gw = two ? g_fg[c] : static_cast<double>(g_fg[c]) - g_bg[c], gu = g_bg[c];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        fg[i] += gw * x[i];
        bg[i] += gu * x[i];
      }
    }
    T* grad_fg = static_cast<T*>(layer.grad_fg) + tile.n * pixels_of(layer) + p;
    T* grad_bg = two ? static_cast<T*>(layer.grad_bg) + tile.n * pixels_of(layer) + p : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const bool keep = !two || is_valid(weights.fg[i], weights.bg[i]);
      grad_fg[i] = keep ? static_cast<T>(fg[i]) : T(0);
      if (two) grad_bg[i] = keep ? static_cast<T>(bg[i]) : T(0);
    }
  }
}

void mask_gradient_of_tile(const Layer& layer, const Tile& tile, DType accumulate, const void* g_fg, const void* g_bg) {
  if (accumulate == DType::kFloat64) {
    mask_gradient_of_tile(layer, tile, static_cast<const double*>(g_fg), static_cast<const double*>(g_bg));
  } else {
    mask_gradient_of_tile(layer, tile, static_cast<const float*>(g_fg), static_cast<const float*>(g_bg));
  }
}

} // namespace
} // namespace fdk::cpu
