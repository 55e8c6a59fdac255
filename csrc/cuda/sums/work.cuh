// The arguments of sums_kernel, gradient_kernel and mask_gradient_kernel: a descriptor of each layer, passed by value,
// with its cut into work items. The cut depends on shapes, strides, alignment and dtypes alone, not on the device.
#pragma once

#include <algorithm>

#include "../common.cuh"

namespace fdk::cuda {

constexpr int kMaxLayers = 16; // of a launch: their descriptors fill the 4 KB of kernel parameters

// With contiguous pixels a warp takes a tile of pixels and a group of channels.
constexpr int kSlots = 4;                   // channels that a lane loads at a time; they share the pixels' weights
constexpr int kScalarBytes = 8;             // of a channel that a lane loads at a time without vector accesses
constexpr int kMaxGradientChannels = kWarp; // of a warp in gradient_kernel; each lane loads the coefficients of one
constexpr int kMinGradientChannels = kSlots;

// With contiguous channels a block takes a tile of pixels, and each thread a few channels.
constexpr int kVectorLanes = 8; // threads along the channels: 128 bytes of a pixel
constexpr int kScalarLanes = 64;
constexpr int kPixelLoads = 4; // loads of a thread at a time, one a pixel
template <typename Acc>        // in sums_kernel, which does nothing but load
constexpr int kSumLoads = std::is_same_v<Acc, float> ? 8 : 4;

// Tiles of sums_kernel are long, to keep partial sums few, but short enough to add up in float32; and shorter where
// there would be too few of them to occupy the multiprocessors.
constexpr int kMaxTilePixels = 4096, kMinTilePixels = 256;  // of a warp, pixels contiguous
constexpr int kMaxThreadPixels = 64, kMinThreadPixels = 16; // of a thread, channels contiguous
constexpr int64_t kManyWarps = 8192;
constexpr int64_t kManyGradientWarps = 16384; // which are short

template <typename Acc>
struct alignas(2 * sizeof(Acc)) Weights {
  Acc fg, bg;
};
template <typename Acc>
constexpr int kStagedPixels = 16384 / sizeof(Weights<Acc>); // whose weights a block holds in shared memory

template <typename Acc>
struct Outputs {
  Acc* sums;          // [2, N, total_channels]
  Acc* masses;        // [2, N, L]
  Acc* partials;      // layer by layer [N, C + 1, 2, tiles]
  uint32_t* counters; // [num_counters], set to 0 by sums_kernel for the next launch, or null
  uint32_t num_counters;
};

// The gradients of the sums, to be multiplied by the factor of their layer unless `factor` is null.
template <typename Acc>
struct SumGradients {
  const Acc* values; // [2, N, total_channels]
  const Acc* factor; // [L]
  int64_t factor_stride;
};

enum class Kernel { kSums, kGradient, kMaskGradient };

struct LayerWork {
  void* features;
  const void* upstream;
  const void* fg;
  const void* bg;
  void* grad_fg;
  void* grad_bg;
  int64_t stride_n, stride_c, stride[3]; // with merged dimensions
  int64_t upstream_stride_n, upstream_stride_c, upstream_stride[3];
  int64_t size1, size2, pixels;
  int64_t channel_start; // of the layer's channels in the sums
  int64_t partial_start; // of the layer's partial sums in the workspace
  DType dtype, mask_dtype;
  uint32_t first_block, blocks;
  uint32_t tiles, groups; // of pixels and of channels
  int32_t channels;
  int32_t tile_pixels;
  int32_t lanes, rows;    // threads along the channels and along the pixels, with contiguous channels
  int32_t group_channels; // channels of a group in gradient_kernel, without contiguous channels
  bool along_channels;    // channels are contiguous, not pixels
  bool vector;            // features are accessed by vectors of 16 bytes
  bool upstream_vector;   // the upstream gradient likewise
};

struct Work {
  LayerWork layers[kMaxLayers];
  int64_t batch, total_channels, num_layers;
  int64_t partials; // of these layers
  int64_t blocks;
  int32_t first_layer, count;
};
static_assert(sizeof(Work) + 5 * sizeof(void*) <= 4096, "the descriptors fit into the kernel parameters");

inline bool is_multiple(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Whether aligned vector accesses of 16 bytes cover a tensor of the layer's shape.
inline bool allows_vectors(const LayerWork& work, int64_t batch, const void* data, int64_t stride_n, int64_t stride_c,
                           const int64_t (&stride)[3]) {
  const int64_t vector = 16 / element_size(work.dtype);
  const int64_t adjacent = work.along_channels ? work.channels : work.size2;
  if (!is_multiple(data, 16) || adjacent % vector != 0 || (work.along_channels ? stride_c : stride[2]) != 1)
    return false;
  auto fits = [&](int64_t size, int64_t step) { return size == 1 || step % vector == 0; };
  const int64_t size0 = work.pixels / std::max<int64_t>(1, work.size1 * work.size2);
  return fits(batch, stride_n) && fits(size0, stride[0]) && fits(work.size1, stride[1]) &&
         (work.along_channels ? fits(work.size2, stride[2]) : fits(work.channels, stride_c));
}

// Halves `length`, down to `shortest`, while the layer has fewer than `many` warps(length).
template <typename Warps>
int shorten(int length, int shortest, int64_t many, Warps warps) {
  while (length > shortest && warps(length) < many)
    length /= 2;
  return length;
}

// Cuts a layer with contiguous channels into tiles of pixels and groups of channels.
template <typename Acc>
void cut_along_channels(LayerWork& work, Kernel kernel, int64_t batch, int64_t vector) {
  const int chunks = work.channels / static_cast<int>(vector);
  if (kernel == Kernel::kMaskGradient) { // a warp takes all channels of a few pixels
    work.lanes = 1;
    while (work.lanes < kWarp && work.lanes < chunks)
      work.lanes *= 2;
    work.rows = kWarp / work.lanes;
    work.tile_pixels = work.rows * kPixelLoads;
    work.groups = 1;
    return;
  }
  work.groups = ceil_div(chunks, vector > 1 ? kVectorLanes : kScalarLanes);
  work.lanes = ceil_div(chunks, static_cast<int>(work.groups));
  work.rows = kThreads / work.lanes;
  const int pixels = shorten(kMaxThreadPixels, kMinThreadPixels, kManyWarps, [&](int length) {
    return batch * work.groups * ceil_div<int64_t>(work.pixels, work.rows * length) * kWarps;
  });
  constexpr int kLoads = kSumLoads<Acc>; // of which a tile holds a whole number
  static_assert(kLoads % kPixelLoads == 0 && kStagedPixels<Acc> >= kThreads * kLoads, "a tile holds some");
  work.tile_pixels = work.rows * (std::min(pixels, kStagedPixels<Acc> / work.rows) / kLoads * kLoads);
}

// Cuts any other layer, whose pixels are contiguous or nothing is.
inline void cut_along_pixels(LayerWork& work, Kernel kernel, int64_t batch, int64_t vector) {
  if (kernel == Kernel::kSums) {
    work.groups = ceil_div(work.channels + 1, kSlots); // with a slot for the masses
    work.tile_pixels = shorten(kMaxTilePixels, kMinTilePixels, kManyWarps, [&](int length) {
      return batch * work.groups * ceil_div<int64_t>(work.pixels, length);
    });
  } else { // the pixels of one load of the warp
    work.groups = 1;
    work.tile_pixels = kWarp * static_cast<int>(vector > 1 ? vector : kScalarBytes / element_size(work.dtype));
    if (kernel != Kernel::kGradient) return;
    const int64_t tiles = batch * ceil_div<int64_t>(work.pixels, work.tile_pixels);
    work.group_channels = shorten(kMaxGradientChannels, kMinGradientChannels, kManyGradientWarps,
                                  [&](int channels) { return tiles * ceil_div(work.channels, channels); });
    work.groups = ceil_div(work.channels, work.group_channels);
  }
}

// Describes a layer and how to access its elements.
inline LayerWork describe_layer(const Layer& layer, int64_t batch, bool wide) {
  LayerWork work = {};
  work.features = layer.features;
  work.upstream = layer.upstream;
  work.fg = layer.fg;
  work.bg = layer.bg;
  work.grad_fg = layer.grad_fg;
  work.grad_bg = layer.grad_bg;
  work.stride_n = layer.stride_n;
  work.stride_c = layer.stride_c;
  work.upstream_stride_n = layer.upstream_stride_n;
  work.upstream_stride_c = layer.upstream_stride_c;
  const MergedPixels merged =
      merge_dimensions(layer.size, layer.stride, layer.upstream != nullptr ? layer.upstream_stride : nullptr);
  std::copy_n(merged.stride, 3, work.stride);
  std::copy_n(merged.upstream_stride, 3, work.upstream_stride);
  work.size1 = merged.size[1];
  work.size2 = merged.size[2];
  work.pixels = pixels_of(layer);
  work.channels = static_cast<int32_t>(layer.channels);
  work.dtype = layer.dtype;
  work.mask_dtype = layer.mask_dtype;

  const bool pixels_adjacent = work.size2 > 1 && work.stride[2] == 1;
  work.along_channels = work.channels > 1 && work.stride_c == 1 && !pixels_adjacent;
  if (wide) return work; // no vector accesses for float64 sums, which are rare
  work.vector = allows_vectors(work, batch, work.features, work.stride_n, work.stride_c, work.stride);
  work.upstream_vector =
      allows_vectors(work, batch, work.upstream, work.upstream_stride_n, work.upstream_stride_c, work.upstream_stride);
  if (!work.along_channels) { // the weights are accessed by vectors, too
    const int64_t bytes = std::min<int64_t>(16, 16 / element_size(work.dtype) * element_size(work.mask_dtype));
    work.vector = work.vector && is_multiple(work.fg, bytes) && is_multiple(work.bg, bytes);
  }
  return work;
}

inline int64_t channels_before(const Pyramid& pyramid, int64_t layer) {
  int64_t channels = 0;
  for (int64_t index = 0; index < layer; ++index)
    channels += pyramid.layers[index].channels;
  return channels;
}

// Describes up to kMaxLayers layers from `first` on. The size of the workspace, the kernels and the second pass all
// follow from it.
inline Work make_work(const Pyramid& pyramid, int64_t first, Kernel kernel) {
  Work result = {};
  result.batch = pyramid.batch;
  result.total_channels = pyramid.total_channels;
  result.num_layers = pyramid.num_layers;
  result.first_layer = static_cast<int32_t>(first);
  result.count = static_cast<int32_t>(std::min<int64_t>(kMaxLayers, pyramid.num_layers - first));
  int64_t channel_start = channels_before(pyramid, first);
  const bool wide = pyramid.accumulate == DType::kFloat64;
  for (int32_t index = 0; index < result.count; ++index) {
    const Layer& layer = pyramid.layers[first + index];
    if (layer.dtype == DType::kFloat64 && !wide) {
      throw std::runtime_error("float64 features need sums of float64, got sums of float32.");
    }
    LayerWork& work = result.layers[index];
    work = describe_layer(layer, pyramid.batch, wide);
    work.channel_start = channel_start;
    channel_start += layer.channels;
    const int64_t vector = work.vector ? 16 / element_size(layer.dtype) : 1;
    if (work.along_channels) {
      (wide ? cut_along_channels<double> : cut_along_channels<float>)(work, kernel, pyramid.batch, vector);
    } else {
      cut_along_pixels(work, kernel, pyramid.batch, vector);
    }
    // Sums of a layer without pixels are written as well: they are 0.
    const int64_t least = kernel == Kernel::kSums ? 1 : 0;
    work.tiles = static_cast<uint32_t>(std::max(least, ceil_div<int64_t>(work.pixels, work.tile_pixels)));

    const bool item_is_warp = work.along_channels == (kernel == Kernel::kMaskGradient);
    const int64_t items = pyramid.batch * work.tiles * work.groups;
    const int64_t blocks = item_is_warp ? ceil_div<int64_t>(items, kWarps) : items;
    work.first_block = static_cast<uint32_t>(result.blocks);
    work.blocks = static_cast<uint32_t>(blocks);
    result.blocks += blocks;

    work.partial_start = result.partials;
    if (kernel == Kernel::kSums && work.tiles > 1) {
      result.partials += 2 * pyramid.batch * (work.channels + 1) * work.tiles;
    }
  }
  // The index of a warp must fit into 32 bits.
  if (result.blocks > UINT32_MAX / kWarps) {
    throw std::runtime_error("a layer would need " + std::to_string(result.blocks) +
                             " blocks, more than a launch can have; split the batch.");
  }
  return result;
}

} // namespace fdk::cuda
