// The arguments of the kernels of a normalisation with its activation, passed by value. The cut into work items depends
// on shapes, alignment and dtypes alone, not on the device.
#pragma once

#include "../sums/access.cuh"

namespace fdk::cuda {

// Two sums of a channel over a tile, in double: they may be those of a large mean.
struct alignas(16) Partial {
  double first, second;
};

// How the values of a group are normalised (N2), and their mean.
template <typename Acc>
struct alignas(16) Affine {
  Acc scale, shift, mean;
};

// The terms of (N5) that come from the statistics: linear * (u - mean) + constant.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) Terms {
  Acc linear, constant;
};

template <typename Acc>
struct NormWork {
  LayerWork layer; // the input, with the gradient that arrives and the weights where there are any; without gaps
  void* out;       // laid out like the input
  int64_t batch, blocks;
  Acc slope; // of the activation below 0
  bool is_relu;
  bool by_sample;            // rows are those of a sample, else of the batch
  const Affine<Acc>* affine; // [N, C] or [C]
  const Terms<Acc>* terms;   // likewise, or null under given statistics
  const Acc* slopes;         // [2, N, C], or null: nothing is added to the gradient that arrives
  Acc* sums;                 // [2, N, C], region sums of the output, or null
  Partial* partials;         // [C, N, tiles]

  __device__ int64_t row(int64_t n, int64_t channel) const { return (by_sample ? n * layer.channels : 0) + channel; }
  __device__ Affine<Acc> affine_of(int64_t n, int64_t channel) const { return affine[row(n, channel)]; }
  __device__ Terms<Acc> terms_of(int64_t n, int64_t channel) const {
    return terms ? terms[row(n, channel)] : Terms<Acc>{0, 0};
  }
  // What the loss adds to the gradient that arrives, for weights of 1.
  __device__ Weights<Acc> slopes_of(int64_t n, int64_t channel) const {
    if (!slopes) return {0, 0};
    const Acc* g = slopes + n * layer.channels + channel;
    return {*g, g[batch * layer.channels]};
  }
  __device__ void put(int64_t n, uint32_t tile, int64_t channel, double first, double second) const {
    partials[(channel * batch + n) * layer.tiles + tile] = {first, second};
  }
  // Writes region sums of a tile; those of one tile are final.
  __device__ void put_region_sums(int64_t n, uint32_t tile, int64_t channel, Acc fg, Acc bg) const {
    if (layer.tiles > 1) return put(n, tile, channel, fg, bg);
    sums[n * layer.channels + channel] = fg;
    sums[(batch + n) * layer.channels + channel] = bg;
  }
};
static_assert(sizeof(NormWork<double>) <= 4096, "the descriptor fits into the kernel parameters");

// The activation, and whether it comes first. The activation `none` has slope 1.
template <typename Acc, bool kFirst>
struct NormFormula {
  Acc slope;
  bool is_relu;

  __device__ explicit NormFormula(const NormWork<Acc>& work) : slope(work.slope), is_relu(work.is_relu) {}

  __device__ Acc below(Acc value) const { return is_relu ? Acc(0) : slope * value; }
  // NaN passes, as in torch.
  __device__ Acc activated(Acc t) const { return t < 0 ? below(t) : t; }
  __device__ Acc gated(Acc t, Acc gradient) const {
    const bool passes = is_relu ? !(t <= 0) : t > 0;
    return passes ? gradient : below(gradient);
  }

  // What is normalised.
  __device__ Acc normalised(Acc x) const { return kFirst ? activated(x) : x; }
  // In one rounding, so that backward finds the sign that forward has seen.
  __device__ Acc affine(Acc x, const Affine<Acc>& by) const {
    return static_cast<Acc>(fma(normalised(x), by.scale, by.shift));
  }
  __device__ Acc output(Acc x, const Affine<Acc>& by) const {
    const Acc z = affine(x, by);
    return kFirst ? z : activated(z);
  }
  // The gradient of z.
  __device__ Acc affine_gradient(Acc x, const Affine<Acc>& by, Acc gradient) const {
    return kFirst ? gradient : gated(affine(x, by), gradient);
  }
  __device__ Acc input_gradient(Acc x, Acc h, const Affine<Acc>& by, const Terms<Acc>& terms) const {
    const Acc gradient = by.scale * h + (terms.linear * (normalised(x) - by.mean) + terms.constant);
    return kFirst ? gated(x, gradient) : gradient;
  }
};

// Scratch memory of a call: partial results of the tiles, and rows of parameters.
template <typename Acc>
struct NormScratch {
  int64_t partials, rows; // how many

  explicit NormScratch(const NormAct& call, uint32_t tiles)
      : partials(call.layer.channels * call.batch * tiles),
        rows((call.instance ? call.batch : 1) * call.layer.channels) {}

  int64_t affine_offset() const { return partials * static_cast<int64_t>(sizeof(Partial)); }
  int64_t terms_offset() const { return affine_offset() + rows * static_cast<int64_t>(sizeof(Affine<Acc>)); }
  int64_t bytes() const { return terms_offset() + rows * static_cast<int64_t>(sizeof(Terms<Acc>)); }
};

// Describes the map, which has no gaps, and how to access its elements.
inline LayerWork describe_map(const NormAct& call) {
  const Layer& layer = call.layer;
  LayerWork work = {};
  work.features = layer.features;
  work.upstream = layer.upstream;
  work.fg = layer.fg;
  work.bg = layer.bg;
  work.dtype = layer.dtype;
  work.mask_dtype = layer.mask_dtype;
  work.channels = static_cast<int32_t>(layer.channels);
  work.pixels = pixels_of(layer);
  work.size1 = 1;
  work.size2 = work.pixels;
  work.along_channels = layer.channels > 1 && (layer.stride_c == 1 || work.pixels == 1);
  work.stride_n = layer.channels * work.pixels;
  work.stride_c = work.along_channels ? 1 : work.pixels;
  work.stride[2] = work.along_channels ? layer.channels : 1;
  if (call.accumulate == DType::kFloat64) return work; // no vector accesses for float64 sums, which are rare
  const int64_t vector = 16 / element_size(work.dtype);
  work.vector = (work.along_channels ? layer.channels : work.pixels) % vector == 0 && is_multiple(work.features, 16) &&
                is_multiple(work.upstream, 16) && is_multiple(call.out, 16);
  if (!work.along_channels) { // the weights are accessed by vectors, too
    const int64_t bytes = std::min<int64_t>(16, vector * element_size(work.mask_dtype));
    work.vector = work.vector && is_multiple(work.fg, bytes) && is_multiple(work.bg, bytes);
  }
  return work;
}

// Describes the map of a call and its cut, which is the same for all kernels of the call.
template <typename Acc>
NormWork<Acc> make_norm_work(const NormAct& call) {
  NormWork<Acc> work = {};
  work.layer = describe_map(call);
  LayerWork& layer = work.layer;
  if (layer.along_channels) {
    cut_along_channels<Acc>(layer, Kernel::kSums, call.batch, layer.vector ? 16 / element_size(layer.dtype) : 1);
  } else {
    layer.groups = ceil_div(layer.channels, kSlots);
    layer.tile_pixels = shorten(kMaxTilePixels, kMinTilePixels, kManyWarps, [&](int length) {
      return call.batch * layer.groups * ceil_div<int64_t>(layer.pixels, length);
    });
  }
  layer.tiles = static_cast<uint32_t>(ceil_div<int64_t>(layer.pixels, layer.tile_pixels));
  const int64_t items = call.batch * layer.tiles * layer.groups;
  work.blocks = layer.along_channels ? items : ceil_div<int64_t>(items, kWarps);
  // The index of a warp must fit into 32 bits.
  if (work.blocks > UINT32_MAX / kWarps) {
    throw std::runtime_error("a normalisation would need " + std::to_string(work.blocks) +
                             " blocks, more than a launch can have; split the batch.");
  }
  work.batch = call.batch;
  work.out = call.out;
  work.slope = call.activation == Activation::kLeakyRelu ? static_cast<Acc>(call.slope) : Acc(1);
  work.is_relu = call.activation == Activation::kRelu;
  work.by_sample = call.instance;
  return work;
}

} // namespace fdk::cuda
