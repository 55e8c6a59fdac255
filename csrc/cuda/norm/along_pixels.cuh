// A normalisation with contiguous pixels: a warp takes a tile of pixels of kSlots channels, which share the weights.
#pragma once

#include "../sums/along_pixels.cuh"
#include "work.cuh"

namespace fdk::cuda {

// The tile of a warp.
struct PlaneTile {
  int64_t n, first, offset; // sample and pixel, and where the first plane has that
  uint32_t index;
  int count;             // of pixels
  int channel, channels; // the first one, and how many there are

  template <typename Acc>
  __device__ PlaneTile(const NormWork<Acc>& work, uint32_t warp) {
    const LayerWork& layer = work.layer;
    const Item item = item_of(layer, warp, true);
    n = item.n;
    index = item.tile;
    first = static_cast<int64_t>(item.tile) * layer.tile_pixels;
    count = static_cast<int>(min(static_cast<int64_t>(layer.tile_pixels), layer.pixels - first));
    channel = item.group * kSlots;
    channels = min(kSlots, layer.channels - channel);
    offset = n * layer.stride_n + channel * layer.stride_c + first;
  }
};

// The elements of a lane: kLoads packs of each of the tile's planes, from pixel `base` of the tile on.
template <typename T, int kCount, typename Run>
struct PlanePacks {
  Pack<T, kCount> packs[kSlots][Run::kLoads];

  // Which pixel of the tile a load begins with.
  static __device__ int pixel(int base, int load) {
    return base + (load * kWarp + static_cast<int>(threadIdx.x % kWarp)) * kCount;
  }
  // Outside of the tile the elements are 0.
  __device__ void load(const void* values, const LayerWork& layer, const PlaneTile& tile, int base) {
    const T* planes = static_cast<const T*>(values) + tile.offset;
#pragma unroll
    for (int i = 0; i < Run::kLoads; ++i) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        packs[k][i] = {};
        if (k < tile.channels && pixel(base, i) < tile.count)
          packs[k][i] = cuda::load<kCount>(planes + k * layer.stride_c + pixel(base, i));
      }
    }
  }
  __device__ void store(void* values, const LayerWork& layer, const PlaneTile& tile, int base) const {
    T* planes = static_cast<T*>(values) + tile.offset;
#pragma unroll
    for (int i = 0; i < Run::kLoads; ++i) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        if (k < tile.channels && pixel(base, i) < tile.count)
          cuda::store(planes + k * layer.stride_c + pixel(base, i), packs[k][i]);
      }
    }
  }
};

// Loads the weights of a lane; outside of the tile they are 0.
template <typename Run>
__device__ void load_weights(Run& run, const LayerWork& layer, const PlaneTile& tile, int base) {
  run.load(layer, tile.n, tile.first + base, tile.first + tile.count);
}

// Adds up two sums a slot over the warp, and calls body(slot, first, second) in one lane for each channel.
template <typename Acc, typename Body>
__device__ void with_slot_sums(const PlaneTile& tile, Acc (&sums)[2 * kSlots], Body body) {
  constexpr int kLanesOfSum = kWarp / (2 * kSlots);
  const Acc first = warp_sums(sums);
  const Acc second = __shfl_xor_sync(kAllLanes, first, kLanesOfSum); // of the lanes beside
  const int lane = threadIdx.x % kWarp, slot = lane / (2 * kLanesOfSum);
  if (lane % (2 * kLanesOfSum) == 0 && slot < tile.channels) body(slot, first, second);
}

// Writes mean and sum of squared deviations (N1) of a tile.
template <typename Acc, typename Formula, typename T, int kCount>
__device__ void moments_along_pixels(Pack<T, kCount>, const NormWork<Acc>& work, const Formula& formula,
                                     uint32_t warp) {
  using Run = PixelRun<Acc, T, kCount>;
  const LayerWork& layer = work.layer;
  const PlaneTile tile(work, warp);
  if (tile.n >= work.batch) return;
  // Deviations from one of the values keep the digits that squares of a large mean would lose.
  const T* begin = static_cast<const T*>(layer.features) + tile.offset;
  auto origin_of = [&](int slot) { return formula.normalised(widen<Acc>(begin[slot * layer.stride_c])); };
  Acc origin[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k)
    origin[k] = k < tile.channels ? origin_of(k) : Acc(0);

  Acc sums[2 * kSlots] = {};
  for (int base = 0; base < tile.count; base += Run::kPixels) {
    PlanePacks<T, kCount, Run> x;
    x.load(layer.features, layer, tile, base);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      Acc sum = 0, square = 0; // short sums first: they lose fewer digits
#pragma unroll
      for (int i = 0; i < Run::kLoads; ++i) {
        if (x.pixel(base, i) >= tile.count) continue;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const Acc deviation = formula.normalised(x.packs[k][i].template get<Acc>(j)) - origin[k];
          sum += deviation;
          square += deviation * deviation;
        }
      }
      sums[2 * k] += sum;
      sums[2 * k + 1] += square;
    }
  }
  with_slot_sums(tile, sums, [&](int slot, double sum, double square) {
    const double mean = sum / tile.count;
    work.put(tile.n, tile.index, tile.channel + slot, origin_of(slot) + mean, square - sum * mean);
  });
}

// Writes the output (N2) on a tile, and its region sums.
template <typename Acc, typename Formula, typename T, int kCount>
__device__ void output_along_pixels(Pack<T, kCount>, const NormWork<Acc>& work, const Formula& formula, uint32_t warp) {
  using Run = PixelRun<Acc, T, kCount>;
  const LayerWork& layer = work.layer;
  const PlaneTile tile(work, warp);
  if (tile.n >= work.batch) return;
  Affine<Acc> affine[kSlots] = {};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k < tile.channels) affine[k] = work.affine_of(tile.n, tile.channel + k);
  }

  Acc sums[2 * kSlots] = {};
  for (int base = 0; base < tile.count; base += Run::kPixels) {
    PlanePacks<T, kCount, Run> values;
    values.load(layer.features, layer, tile, base);
    Run run = {};
    if (work.sums) load_weights(run, layer, tile, base);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      Acc fg = 0, bg = 0;
#pragma unroll
      for (int i = 0; i < Run::kLoads * kCount; ++i) {
        auto& pack = values.packs[k][i / kCount];
        pack.set(i % kCount, formula.output(pack.template get<Acc>(i % kCount), affine[k]));
        const Acc stored = pack.template get<Acc>(i % kCount);
        const Acc value = run.is_ignored(i) ? Acc(0) : stored;
        fg += run.fg[i] * value;
        bg += run.bg[i] * value;
      }
      sums[2 * k] += fg;
      sums[2 * k + 1] += bg;
    }
    values.store(work.out, layer, tile, base);
  }
  if (!work.sums) return;
  with_slot_sums(tile, sums, [&](int slot, Acc fg, Acc bg) {
    work.put_region_sums(tile.n, tile.index, tile.channel + slot, fg, bg);
  });
}

// The gradient that arrives at the planes of a tile, with what the loss adds.
template <typename Acc, typename T, int kCount>
struct ArrivingAtPlanes {
  using Run = PixelRun<Acc, T, kCount>;
  Weights<Acc> slopes[kSlots];
  Run run = {}; // weights of 0 where the loss adds nothing
  PlanePacks<T, kCount, Run> packs;

  __device__ ArrivingAtPlanes(const NormWork<Acc>& work, const PlaneTile& tile) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      slopes[k] = k < tile.channels ? work.slopes_of(tile.n, tile.channel + k) : Weights<Acc>{0, 0};
  }
  __device__ void load(const NormWork<Acc>& work, const PlaneTile& tile, int base) {
    packs.load(work.layer.upstream, work.layer, tile, base);
    if (work.slopes) load_weights(run, work.layer, tile, base);
  }
  // At element i of a slot.
  __device__ Acc at(int k, int i) const {
    const Acc added = run.is_ignored(i) ? Acc(0) : slopes[k].fg * run.fg[i] + slopes[k].bg * run.bg[i];
    return packs.packs[k][i / kCount].template get<Acc>(i % kCount) + added;
  }
};

// Writes the sums of h and of h (u - mean), (N4), over a tile.
template <typename Acc, typename Formula, typename T, int kCount>
__device__ void reduce_along_pixels(Pack<T, kCount>, const NormWork<Acc>& work, const Formula& formula, uint32_t warp) {
  using Run = PixelRun<Acc, T, kCount>;
  const LayerWork& layer = work.layer;
  const PlaneTile tile(work, warp);
  if (tile.n >= work.batch) return;
  Affine<Acc> affine[kSlots] = {};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k < tile.channels) affine[k] = work.affine_of(tile.n, tile.channel + k);
  }
  ArrivingAtPlanes<Acc, T, kCount> arriving(work, tile);

  Acc sums[2 * kSlots] = {};
  for (int base = 0; base < tile.count; base += Run::kPixels) {
    PlanePacks<T, kCount, Run> x;
    x.load(layer.features, layer, tile, base);
    arriving.load(work, tile, base);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      Acc sum = 0, product = 0;
#pragma unroll
      for (int i = 0; i < Run::kLoads * kCount; ++i) {
        if (x.pixel(base, i / kCount) >= tile.count) continue;
        const Acc value = x.packs[k][i / kCount].template get<Acc>(i % kCount);
        const Acc h = formula.affine_gradient(value, affine[k], arriving.at(k, i));
        sum += h;
        product += h * (formula.normalised(value) - affine[k].mean);
      }
      sums[2 * k] += sum;
      sums[2 * k + 1] += product;
    }
  }
  with_slot_sums(tile, sums, [&](int slot, double sum, double product) {
    work.put(tile.n, tile.index, tile.channel + slot, sum, product);
  });
}

// Writes the gradient (N5) on a tile.
template <typename Acc, typename Formula, typename T, int kCount>
__device__ void gradient_along_pixels(Pack<T, kCount>, const NormWork<Acc>& work, const Formula& formula,
                                      uint32_t warp) {
  using Run = PixelRun<Acc, T, kCount>;
  const LayerWork& layer = work.layer;
  const PlaneTile tile(work, warp);
  if (tile.n >= work.batch) return;
  Affine<Acc> affine[kSlots] = {};
  Terms<Acc> terms[kSlots] = {};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k >= tile.channels) continue;
    affine[k] = work.affine_of(tile.n, tile.channel + k);
    terms[k] = work.terms_of(tile.n, tile.channel + k);
  }
  ArrivingAtPlanes<Acc, T, kCount> arriving(work, tile);

  for (int base = 0; base < tile.count; base += Run::kPixels) {
    PlanePacks<T, kCount, Run> values;
    values.load(layer.features, layer, tile, base);
    arriving.load(work, tile, base);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
#pragma unroll
      for (int i = 0; i < Run::kLoads * kCount; ++i) {
        auto& pack = values.packs[k][i / kCount];
        const Acc value = pack.template get<Acc>(i % kCount);
        const Acc h = formula.affine_gradient(value, affine[k], arriving.at(k, i));
        pack.set(i % kCount, formula.input_gradient(value, h, affine[k], terms[k]));
      }
    }
    values.store(work.out, layer, tile, base);
  }
}

} // namespace fdk::cuda
