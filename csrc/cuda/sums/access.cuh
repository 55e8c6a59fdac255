// How the kernels find their work item, access its elements and weights, and write results.
#pragma once

#include "work.cuh"

namespace fdk::cuda {

// Returns the layer whose range of blocks holds `block`: of those that begin with one block the last, as the others
// have none.
template <typename AnyWork>
__device__ int layer_of_block(const AnyWork& work, uint32_t block) {
  int index = work.count - 1;
  while (block < work.layers[index].first_block)
    --index;
  return index;
}

struct Item {
  int64_t n;
  uint32_t tile, group;
};

// Returns the item of a block or warp. Consecutive indices are the groups of a tile if `groups_adjacent`, else the
// tiles of a group.
__device__ inline Item item_of(const LayerWork& layer, uint32_t index, bool groups_adjacent) {
  const uint32_t inner_count = groups_adjacent ? layer.groups : layer.tiles;
  const uint32_t outer_count = groups_adjacent ? layer.tiles : layer.groups;
  const uint32_t outer = index / inner_count;
  const uint32_t inner = index - outer * inner_count;
  const uint32_t n = outer / outer_count;
  const uint32_t middle = outer - n * outer_count;
  return {n, groups_adjacent ? middle : inner, groups_adjacent ? inner : middle};
}

// Returns the offset of a pixel within its channel; `adjacent` promises that the innermost stride is 1.
__device__ inline int64_t pixel_offset(const LayerWork& layer, const int64_t (&stride)[3], int64_t pixel,
                                       bool adjacent = false) {
  const int64_t stride2 = adjacent ? 1 : stride[2];
  if (layer.size2 == layer.pixels) return pixel * stride2;
  const int64_t row = pixel / layer.size2; // a 32-bit division where both numbers fit
  const int64_t slice = row / layer.size1;
  return slice * stride[0] + (row - slice * layer.size1) * stride[1] + (pixel - row * layer.size2) * stride2;
}

// Calls body with a value of the type of the weights.
template <typename Body>
__device__ void with_mask_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kUInt8:
      return body(uint8_t());
    case DType::kFloat32:
      return body(float());
    default:
      return body(double());
  }
}

// How a kernel accesses the elements of a map: so many at once, of which type, and what is contiguous. Each kind has
// kernels of its own. Behind one that decides as it runs, threads of a small map wait for its code most of the time.
template <typename Elements_, bool kAlongChannels_>
struct MapKind {
  using Elements = Elements_; // a Pack
  static constexpr bool kAlongChannels = kAlongChannels_;
};

// Calls body with the kind of a map.
template <typename Acc, typename Body>
void with_kind(const LayerWork& map, Body body) {
  auto with_elements = [&](auto elements) {
    using Elements = decltype(elements);
    if (map.along_channels) return body(MapKind<Elements, true>());
    body(MapKind<Elements, false>());
  };
  auto with_type = [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Acc, float>) {
      if (map.vector) return with_elements(Pack<T, kVector<T>>());
    }
    with_elements(Pack<T, 1>());
  };
  switch (map.dtype) {
    case DType::kBFloat16:
      return with_type(__nv_bfloat16());
    case DType::kFloat16:
      return with_type(__half());
    case DType::kFloat64:
      if constexpr (std::is_same_v<Acc, double>) with_type(double());
      return;
    default:
      return with_type(float());
  }
}

// Calls body(kind, work) for each kind among the layers, with a work that has blocks for the layers of this kind alone.
template <typename Acc, typename Body>
void for_each_kind(const Work& work, Body body) {
  auto is_like = [](const LayerWork& a, const LayerWork& b) {
    return a.dtype == b.dtype && a.vector == b.vector && a.along_channels == b.along_channels;
  };
  for (int32_t index = 0; index < work.count; ++index) {
    const LayerWork* const layers = work.layers;
    if (std::any_of(layers, layers + index, [&](const LayerWork& layer) { return is_like(layer, layers[index]); }))
      continue;
    Work of_kind = work;
    of_kind.blocks = 0;
    for (int32_t other = 0; other < work.count; ++other) {
      of_kind.layers[other].first_block = static_cast<uint32_t>(of_kind.blocks);
      if (is_like(layers[other], layers[index])) of_kind.blocks += layers[other].blocks;
    }
    with_kind<Acc>(layers[index], [&](auto kind) { body(kind, of_kind); });
  }
}

// A stored weight as a number. Of bytes, which are 0 or 1, any other stands for NaN.
template <typename Acc, typename M>
__device__ Acc as_weight(M stored) {
  if constexpr (std::is_same_v<M, uint8_t>) {
    if (stored > 1) return static_cast<Acc>(NAN);
  }
  return static_cast<Acc>(stored);
}

// Loads the weights of one pixel. Where the background is stored, both are 0 exactly for ignored pixels.
template <typename Acc>
__device__ Weights<Acc> weights_at(const LayerWork& layer, int64_t pixel) {
  Weights<Acc> weights;
  with_mask_type(layer.mask_dtype, [&](auto element) {
    using M = decltype(element);
    weights.fg = as_weight<Acc>(static_cast<const M*>(layer.fg)[pixel]);
    weights.bg = layer.bg ? as_weight<Acc>(static_cast<const M*>(layer.bg)[pixel]) : 1 - weights.fg;
  });
  return weights;
}

template <typename Acc>
__device__ Acc factor_of(const Work& work, int index, const SumGradients<Acc>& grad_sums) {
  return grad_sums.factor ? grad_sums.factor[(work.first_layer + index) * grad_sums.factor_stride] : Acc(1);
}

// Writes a final sum or mass; `slot` is a channel, or the number of channels for the mass.
template <typename Acc, typename AnyWork>
__device__ void put_total(const AnyWork& work, int index, int64_t n, int slot, int region, Acc total,
                          const Outputs<Acc>& out) {
  const auto& layer = work.layers[index];
  const int64_t row = region * work.batch + n;
  if (slot < layer.channels) {
    out.sums[row * work.total_channels + layer.channel_start + slot] = total;
  } else {
    out.masses[row * work.num_layers + work.first_layer + index] = total;
  }
}

// Writes a partial sum, or the final one if the layer has one tile.
template <typename Acc>
__device__ void put_partial(const Work& work, int index, const Item& item, int slot, int region, Acc partial,
                            const Outputs<Acc>& out) {
  const LayerWork& layer = work.layers[index];
  if (layer.tiles == 1) return put_total(work, index, item.n, slot, region, partial, out);
  const int64_t output = (item.n * (layer.channels + 1) + slot) * 2 + region;
  out.partials[layer.partial_start + output * layer.tiles + item.tile] = partial;
}

// Writes the gradients (R4) of the weights of one pixel.
template <typename Acc>
__device__ void put_mask_gradient(const LayerWork& layer, int64_t pixel, Acc fg, Acc bg) {
  const Weights<Acc> weights = layer.bg ? weights_at<Acc>(layer, pixel) : Weights<Acc>{1, 1};
  const bool is_ignored = weights.fg == 0 && weights.bg == 0;
  static_cast<Acc*>(layer.grad_fg)[pixel] = is_ignored ? Acc(0) : fg;
  if (layer.grad_bg) static_cast<Acc*>(layer.grad_bg)[pixel] = is_ignored ? Acc(0) : bg;
}

// Returns the coefficients of channel c in (R4). Without stored background weights the foreground weight enters both
// sums.
template <typename Acc>
__device__ Weights<Acc> mask_coefficients(const Work& work, const LayerWork& layer, int64_t n, int c,
                                          const Acc* grad_sums) {
  const Acc* g = grad_sums + n * work.total_channels + layer.channel_start + c;
  const Acc bg = g[work.batch * work.total_channels];
  return layer.bg ? Weights<Acc>{*g, bg} : Weights<Acc>{*g - bg, 0};
}

} // namespace fdk::cuda
