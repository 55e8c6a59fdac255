// A normalisation with contiguous channels: a block takes a tile of pixels, whose weights it keeps in shared memory,
// and each thread a few channels.
#pragma once

#include "../sums/along_channels.cuh"
#include "work.cuh"

namespace fdk::cuda {

constexpr int kBackwardLoads = kPixelLoads / 2; // of each of two maps

// Bytes for a block's staged weights and, later, its threads' sums, two for each channel.
template <typename Acc>
constexpr int kNormShared =
    std::max<int>(kStagedPixels<Acc> * sizeof(Weights<Acc>),
                  kThreads * 2 * (std::is_same_v<Acc, float> ? kVector<__half> : 1) * sizeof(Acc));

// The tile of a block, and the channels of a thread.
template <int kCount>
struct PixelTile : Place<kCount> {
  int64_t n, first; // sample and pixel
  uint32_t index;
  int count; // of pixels

  __device__ PixelTile(const LayerWork& layer, uint32_t block) : PixelTile(layer, item_of(layer, block, true)) {}

  // Calls body(base) for every `loads` pixels of the thread, which are `rows` apart.
  template <typename Body>
  __device__ void for_each_step(const LayerWork& layer, int loads, Body body) const {
    if (!this->active) return;
    for (int base = this->row; base < count; base += layer.rows * loads)
      body(base);
  }
  // Of the thread's channels.
  __device__ int64_t offset(const LayerWork& layer) const { return n * layer.stride_n + this->channel; }

 private:
  __device__ PixelTile(const LayerWork& layer, const Item& item)
      : Place<kCount>(layer, item.group), n(item.n), index(item.tile) {
    first = static_cast<int64_t>(item.tile) * layer.tile_pixels;
    count = static_cast<int>(min(static_cast<int64_t>(layer.tile_pixels), layer.pixels - first));
  }
};

// Adds up two sums a channel over the rows of a block, and calls body(channel, first, second) in one thread for each.
template <typename Acc, int kCount, typename Body>
__device__ void with_channel_sums(const LayerWork& layer, const PixelTile<kCount>& tile, Acc (&sums)[2 * kCount],
                                  char* shared, Body body) {
  sum_rows(layer, tile.row, sums, reinterpret_cast<Acc*>(shared));
  if (tile.row > 0 || !tile.active) return;
#pragma unroll
  for (int c = 0; c < kCount; ++c)
    body(c, sums[2 * c], sums[2 * c + 1]);
}

// Writes mean and sum of squared deviations (N1) of a tile.
template <typename Acc, typename Formula, typename T, int kCount>
__device__ void moments_along_channels(Pack<T, kCount>, const NormWork<Acc>& work, const Formula& formula,
                                       uint32_t block, char* shared) {
  constexpr int kLoads = kPixelLoads;
  const LayerWork& layer = work.layer;
  const PixelTile<kCount> tile(layer, block);
  const T* x = static_cast<const T*>(layer.features) + tile.offset(layer);
  // Deviations from one of the values keep the digits that squares of a large mean would lose.
  Acc origin[kCount] = {};
  if (tile.active) {
    const Pack<T, kCount> pack = load<kCount>(x + tile.first * layer.stride[2]);
#pragma unroll
    for (int c = 0; c < kCount; ++c)
      origin[c] = formula.normalised(pack.template get<Acc>(c));
  }

  Acc sums[2 * kCount] = {};
  tile.for_each_step(layer, kLoads, [&](int base) {
    PixelRows<T, kCount, kLoads> pixels;
    pixels.load(layer, x, tile.first, base, tile.count);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (base + i * layer.rows >= tile.count) continue;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const Acc deviation = formula.normalised(pixels.packs[i].template get<Acc>(c)) - origin[c];
        sums[2 * c] += deviation;
        sums[2 * c + 1] += deviation * deviation;
      }
    }
  });
  with_channel_sums(layer, tile, sums, shared, [&](int c, double sum, double square) {
    const double mean = sum / tile.count;
    work.put(tile.n, tile.index, tile.channel + c, origin[c] + mean, square - sum * mean);
  });
}

// The affine rows of a thread's channels.
template <typename Acc, int kCount>
struct AffineRows {
  Affine<Acc> values[kCount] = {};

  __device__ AffineRows(const NormWork<Acc>& work, const PixelTile<kCount>& tile) {
    if (!tile.active) return;
#pragma unroll
    for (int c = 0; c < kCount; ++c)
      values[c] = work.affine_of(tile.n, tile.channel + c);
  }
};

// Writes the output (N2) on a tile, and its region sums.
template <typename Acc, typename Formula, typename T, int kCount>
__device__ void output_along_channels(Pack<T, kCount>, const NormWork<Acc>& work, const Formula& formula,
                                      uint32_t block, char* shared) {
  constexpr int kLoads = kPixelLoads;
  const LayerWork& layer = work.layer;
  const PixelTile<kCount> tile(layer, block);
  const T* x = static_cast<const T*>(layer.features) + tile.offset(layer);
  T* out = static_cast<T*>(work.out) + tile.offset(layer);
  auto* weights = reinterpret_cast<Weights<Acc>*>(shared);
  if (work.sums) stage_weights(layer, tile.n * layer.pixels + tile.first, tile.count, kLoads, weights);
  const AffineRows<Acc, kCount> affine(work, tile);

  Acc sums[2 * kCount] = {};
  tile.for_each_step(layer, kLoads, [&](int base) {
    PixelRows<T, kCount, kLoads> pixels;
    pixels.load(layer, x, tile.first, base, tile.count);
    const PixelOffsets<kLoads> to(layer, layer.stride, tile.first + base);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      auto& pack = pixels.packs[i];
#pragma unroll
      for (int c = 0; c < kCount; ++c)
        pack.set(c, formula.output(pack.template get<Acc>(c), affine.values[c]));
      if (base + i * layer.rows < tile.count) store(out + to.values[i], pack);
      if (!work.sums) continue;
      const Weights<Acc> weight = weights[base + i * layer.rows];
      const bool is_ignored = weight.fg == 0 && weight.bg == 0;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const Acc value = is_ignored ? Acc(0) : pack.template get<Acc>(c);
        sums[2 * c] += weight.fg * value;
        sums[2 * c + 1] += weight.bg * value;
      }
    }
  });
  if (!work.sums) return;
  with_channel_sums(layer, tile, sums, shared,
                    [&](int c, Acc fg, Acc bg) { work.put_region_sums(tile.n, tile.index, tile.channel + c, fg, bg); });
}

// The gradient that arrives at the pixels of a thread, with what the loss adds.
template <typename Acc, typename T, int kCount>
struct ArrivingAtPixels {
  Weights<Acc> slopes[kCount] = {};
  const Weights<Acc>* weights; // staged, or null
  Weights<Acc> weight = {0, 0};
  PixelRows<T, kCount, kBackwardLoads> rows;

  // Called by the whole block.
  __device__ ArrivingAtPixels(const NormWork<Acc>& work, const PixelTile<kCount>& tile, char* shared)
      : weights(work.slopes ? reinterpret_cast<Weights<Acc>*>(shared) : nullptr) {
    if (!weights) return;
    stage_weights(work.layer, tile.n * work.layer.pixels + tile.first, tile.count, kBackwardLoads,
                  reinterpret_cast<Weights<Acc>*>(shared));
    if (!tile.active) return;
#pragma unroll
    for (int c = 0; c < kCount; ++c)
      slopes[c] = work.slopes_of(tile.n, tile.channel + c);
  }
  __device__ void load(const NormWork<Acc>& work, const PixelTile<kCount>& tile, int base) {
    const T* gradient = static_cast<const T*>(work.layer.upstream) + tile.offset(work.layer);
    rows.load(work.layer, gradient, tile.first, base, tile.count);
  }
  // Turns to a pixel of the tile.
  __device__ void turn_to(int pixel) {
    if (weights) weight = weights[pixel];
  }
  // At channel c of load i.
  __device__ Acc at(int i, int c) const {
    const bool is_ignored = weight.fg == 0 && weight.bg == 0;
    const Acc added = is_ignored ? Acc(0) : slopes[c].fg * weight.fg + slopes[c].bg * weight.bg;
    return rows.packs[i].template get<Acc>(c) + added;
  }
};

// Writes the sums of h and of h (u - mean), (N4), over a tile.
template <typename Acc, typename Formula, typename T, int kCount>
__device__ void reduce_along_channels(Pack<T, kCount>, const NormWork<Acc>& work, const Formula& formula,
                                      uint32_t block, char* shared) {
  const LayerWork& layer = work.layer;
  const PixelTile<kCount> tile(layer, block);
  const T* x = static_cast<const T*>(layer.features) + tile.offset(layer);
  const AffineRows<Acc, kCount> affine(work, tile);
  ArrivingAtPixels<Acc, T, kCount> arriving(work, tile, shared);

  Acc sums[2 * kCount] = {};
  tile.for_each_step(layer, kBackwardLoads, [&](int base) {
    PixelRows<T, kCount, kBackwardLoads> pixels;
    pixels.load(layer, x, tile.first, base, tile.count);
    arriving.load(work, tile, base);
#pragma unroll
    for (int i = 0; i < kBackwardLoads; ++i) {
      if (base + i * layer.rows >= tile.count) continue;
      arriving.turn_to(base + i * layer.rows);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const Acc value = pixels.packs[i].template get<Acc>(c);
        const Acc h = formula.affine_gradient(value, affine.values[c], arriving.at(i, c));
        sums[2 * c] += h;
        sums[2 * c + 1] += h * (formula.normalised(value) - affine.values[c].mean);
      }
    }
  });
  with_channel_sums(layer, tile, sums, shared, [&](int c, double sum, double product) {
    work.put(tile.n, tile.index, tile.channel + c, sum, product);
  });
}

// Writes the gradient (N5) on a tile.
template <typename Acc, typename Formula, typename T, int kCount>
__device__ void gradient_along_channels(Pack<T, kCount>, const NormWork<Acc>& work, const Formula& formula,
                                        uint32_t block, char* shared) {
  const LayerWork& layer = work.layer;
  const PixelTile<kCount> tile(layer, block);
  const T* x = static_cast<const T*>(layer.features) + tile.offset(layer);
  T* out = static_cast<T*>(work.out) + tile.offset(layer);
  const AffineRows<Acc, kCount> affine(work, tile);
  Terms<Acc> terms[kCount] = {};
  if (tile.active) {
#pragma unroll
    for (int c = 0; c < kCount; ++c)
      terms[c] = work.terms_of(tile.n, tile.channel + c);
  }
  ArrivingAtPixels<Acc, T, kCount> arriving(work, tile, shared);

  tile.for_each_step(layer, kBackwardLoads, [&](int base) {
    PixelRows<T, kCount, kBackwardLoads> pixels;
    pixels.load(layer, x, tile.first, base, tile.count);
    arriving.load(work, tile, base);
    const PixelOffsets<kBackwardLoads> to(layer, layer.stride, tile.first + base);
#pragma unroll
    for (int i = 0; i < kBackwardLoads; ++i) {
      if (base + i * layer.rows >= tile.count) continue;
      arriving.turn_to(base + i * layer.rows);
      auto& pack = pixels.packs[i];
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const Acc value = pack.template get<Acc>(c);
        const Acc h = formula.affine_gradient(value, affine.values[c], arriving.at(i, c));
        pack.set(c, formula.input_gradient(value, h, affine.values[c], terms[c]));
      }
      store(out + to.values[i], pack);
    }
  });
}

} // namespace fdk::cuda
