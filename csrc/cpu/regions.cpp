// Sums and gradients over any number of regions on the CPU, in tiles like those of sums.cpp.
#include <algorithm>
#include <memory>
#include <vector>

#include "numbers.h"
#include "parallel.h"
#include "tiles.h"
#include "work.h"

namespace fdk::cpu {
namespace {

// Channels of a tile with contiguous pixels: enough to pay for the conversion of the weights that they share.
constexpr int64_t kTileChannels = 32;
// Pixels of a tile for each region, so that partial sums take a hundredth of the features' memory.
constexpr int64_t kPixelsPerRegion = 256;

// How one layer is cut into tiles, by shape and layout alone. Tiles of the same pixels follow each other, so that their
// weights stay in the cache.
struct Cut {
  int64_t tile_channels, tile_pixels;
  int64_t blocks, tiles;   // channel blocks and pixel tiles of a sample
  int64_t first_tile;      // of this layer, in the call
  int64_t first_channel;   // of this layer, in the sums
  int64_t first_partial;   // of this layer, in the partial sums
  int64_t partial_of_tile; // doubles: sums [rows][tile_channels], masses [R]

  Tile tile(const RegionLayer& layer, int64_t index) const {
    const int64_t block = index % blocks, tile = index / blocks % tiles, n = index / (blocks * tiles);
    return {n, block * tile_channels, std::min((block + 1) * tile_channels, layer.channels), tile * tile_pixels,
            std::min((tile + 1) * tile_pixels, pixels_of(layer))};
  }
};

struct Cuts {
  std::vector<Cut> of_layer;
  int64_t tiles, partial; // of all layers

  int64_t layer_of(int64_t tile) const {
    int64_t l = static_cast<int64_t>(of_layer.size()) - 1;
    while (of_layer[l].first_tile > tile)
      --l;
    return l;
  }
};

enum class Span { kChannelBlocks, kAllChannels };

// Cuts the layers into tiles; `map` is what the kernel reads or writes.
Cuts cut(const Regions& regions, Map RegionLayer::* map, Span span) {
  Cuts cuts{{}, 0, 0};
  int64_t first_channel = 0;
  for (int64_t l = 0; l < regions.num_layers; ++l) {
    const RegionLayer& layer = regions.layers[l];
    const int64_t channels = std::max<int64_t>(layer.channels, 1), pixels = std::max<int64_t>(pixels_of(layer), 1);
    Cut c{};
    if (span == Span::kAllChannels) {
      c.tile_channels = channels;
    } else if (channels_are_inner(layer, layer.*map)) {
      c.tile_channels = std::min(channels, kRegionTileChannels);
    } else {
      const int64_t wanted = kTileElements / pixels / kTileChannels * kTileChannels;
      c.tile_channels = std::min({channels, std::max(kTileChannels, wanted), kRegionTileChannels});
    }
    const int64_t least = span == Span::kAllChannels ? kMaxBlock : kPixelsPerRegion * regions.num_regions;
    c.tile_pixels = std::min(pixels, std::max(kTileElements / c.tile_channels, least));
    c.blocks = ceil_div(channels, c.tile_channels);
    c.tiles = ceil_div(pixels, c.tile_pixels);
    c.first_tile = cuts.tiles;
    c.first_channel = first_channel;
    c.first_partial = cuts.partial;
    c.partial_of_tile = rows_of(regions) * c.tile_channels + regions.num_regions;
    const int64_t tiles = regions.batch * c.blocks * c.tiles;
    cuts.tiles += tiles;
    cuts.partial += tiles * c.partial_of_tile;
    first_channel += layer.channels;
    cuts.of_layer.push_back(c);
  }
  return cuts;
}

// Memory of this thread for kernels to compute in, aligned to a cache line. It is kept: fresh pages would take as long
// as a tile.
void* room_of_thread(int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  thread_local std::vector<unsigned char> room;
  if (static_cast<int64_t>(room.size()) < bytes + kCacheLine) room.resize(bytes + kCacheLine);
  const uintptr_t address = reinterpret_cast<uintptr_t>(room.data());
  return reinterpret_cast<void*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
}

// Calls body(tile, cut, index of the tile in its layer) for every tile.
template <class Body>
void for_each_tile(const Regions& regions, const Cuts& cuts, int num_threads, const Body& body) {
  const int threads = useful_threads(elements_of(regions) * regions.num_regions, num_threads);
  parallel_for(cuts.tiles, threads, [&](int64_t item) {
    const int64_t l = cuts.layer_of(item);
    const Cut& cut = cuts.of_layer[l];
    const int64_t index = item - cut.first_tile;
    const RegionLayer& layer = regions.layers[l];
    body(RegionTile{regions, layer, cut.first_channel, cut.tile(layer, index), room_of_thread(room_bytes(regions))},
         cut, index);
  });
}

// Adds up the partial sums of sample n of layer l in the order of its tiles.
template <class T>
void second_pass(const Regions& regions, const Cut& cut, int64_t l, int64_t n, const double* partial, T* sums,
                 T* masses) {
  const int64_t channels = regions.layers[l].channels, batch = regions.batch;
  const double* of_sample = partial + cut.first_partial + n * cut.tiles * cut.blocks * cut.partial_of_tile;
  std::vector<double> totals(cut.tile_channels);
  for (int64_t block = 0; block < cut.blocks; ++block) {
    const int64_t first = block * cut.tile_channels, count = std::min(cut.tile_channels, channels - first);
    for (int64_t row = 0; row < rows_of(regions); ++row) {
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t tile = 0; tile < cut.tiles; ++tile) {
        const double* part = of_sample + (tile * cut.blocks + block) * cut.partial_of_tile + row * count;
        for (int64_t c = 0; c < count; ++c)
          totals[c] += part[c];
      }
      T* out = sums + (row * batch + n) * regions.total_channels + cut.first_channel + first;
      for (int64_t c = 0; c < count; ++c)
        out[c] = static_cast<T>(totals[c]);
    }
  }
  for (int64_t k = 0; k < regions.num_regions; ++k) {
    double total = 0;
    for (int64_t tile = 0; tile < cut.tiles; ++tile)
      total += of_sample[(tile * cut.blocks + 1) * cut.partial_of_tile - regions.num_regions + k];
    masses[(k * batch + n) * regions.num_layers + l] = static_cast<T>(total);
  }
}

} // namespace

void region_sums(const Regions& regions, void* sums, void* masses, int num_threads) {
  const Cuts cuts = cut(regions, &RegionLayer::features, Span::kChannelBlocks);
  const std::unique_ptr<double[]> partial(new double[cuts.partial]);
  for_each_tile(regions, cuts, num_threads, [&](const RegionTile& tile, const Cut& cut, int64_t index) {
    double* of_tile = partial.get() + cut.first_partial + index * cut.partial_of_tile;
    region_kernels().sums(tile, of_tile, of_tile + cut.partial_of_tile - regions.num_regions);
  });
  with_type(regions.accumulate, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t l = 0; l < regions.num_layers; ++l) {
      for (int64_t n = 0; n < regions.batch; ++n)
        second_pass(regions, cuts.of_layer[l], l, n, partial.get(), static_cast<T*>(sums), static_cast<T*>(masses));
    }
  });
}

void region_gradient(const Regions& regions, const void* grad_sums, int num_threads) {
  for (int64_t l = 0; l < regions.num_layers; ++l) {
    const RegionLayer& layer = regions.layers[l];
    advise_huge_pages(layer.gradient.values, elements_of(regions, l) * element_size(layer.dtype));
  }
  const Cuts cuts = cut(regions, &RegionLayer::gradient, Span::kChannelBlocks);
  for_each_tile(regions, cuts, num_threads,
                [&](const RegionTile& tile, const Cut&, int64_t) { region_kernels().gradient(tile, grad_sums); });
}

void region_weight_gradient(const Regions& regions, const void* grad_sums, int num_threads) {
  const Cuts cuts = cut(regions, &RegionLayer::features, Span::kAllChannels);
  for_each_tile(regions, cuts, num_threads, [&](const RegionTile& tile, const Cut&, int64_t) {
    region_kernels().weight_gradient(tile, grad_sums);
  });
}

} // namespace fdk::cpu
