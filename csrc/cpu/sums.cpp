// Sums and gradients on the CPU: cuts the layers into tiles, runs the vector kernels on them in parallel, and adds up
// partial sums in a fixed order.
#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

#include "losses.h"
#include "numbers.h"
#include "parallel.h"
#include "tiles.h"
#include "work.h"

namespace fdk::cpu {
namespace {

// Channels of a tile with contiguous pixels: they share the weights, and runs of pixels stay long.
constexpr int64_t kTileChannels = 8;

// How one layer is cut into tiles. It depends on shape and layout alone, not on the number of threads, so that the same
// input gives the same bits.
struct Cut {
  int64_t tile_channels, tile_pixels;
  int64_t blocks, tiles; // channel blocks and pixel tiles of a sample
  int64_t first_tile;    // of this layer, in the pyramid
  int64_t first_channel; // of this layer, in the sums

  Tile tile(const Layer& layer, int64_t index) const {
    const int64_t block = index % blocks, tile = index / blocks % tiles, n = index / (blocks * tiles);
    return {n, block * tile_channels, std::min((block + 1) * tile_channels, layer.channels), tile * tile_pixels,
            std::min((tile + 1) * tile_pixels, pixels_of(layer))};
  }
  // Whether a tile has all pixels of its channels, so that its sums are those of the layer.
  bool has_whole_rows() const { return tiles == 1; }
  // Where the sums of a tile begin among the partial ones, each with room for the widest.
  int64_t partial_sums(int64_t n, int64_t tile, int64_t block) const {
    return has_whole_rows() ? 0 : ((n * tiles + tile) * blocks + block) * tile_channels * 2;
  }
};

enum class Span { kChannelBlocks, kAllChannels };

// Cuts the layers into tiles, for sums, their second pass and both gradients.
std::vector<Cut> cut(const Pyramid& pyramid, Span span) {
  std::vector<Cut> cuts;
  int64_t first_tile = 0, first_channel = 0;
  for (int64_t l = 0; l < pyramid.num_layers; ++l) {
    const Layer& layer = pyramid.layers[l];
    const int64_t channels = std::max<int64_t>(layer.channels, 1), pixels = std::max<int64_t>(pixels_of(layer), 1);
    Cut c{};
    if (span == Span::kAllChannels) {
      c.tile_channels = channels;
    } else if (channels_are_inner(layer)) {
      c.tile_channels = std::min(channels, kMaxTileChannels);
    } else {
      const int64_t wanted = kTileElements / pixels / kTileChannels * kTileChannels;
      c.tile_channels = std::min({channels, std::max(kTileChannels, wanted), kMaxTileChannels});
    }
    c.tile_pixels = std::min(pixels, std::max<int64_t>(kTileElements / c.tile_channels, 64));
    c.blocks = ceil_div(channels, c.tile_channels);
    c.tiles = ceil_div(pixels, c.tile_pixels);
    c.first_tile = first_tile;
    c.first_channel = first_channel;
    first_tile += pyramid.batch * c.blocks * c.tiles;
    first_channel += layer.channels;
    cuts.push_back(c);
  }
  return cuts;
}

int64_t count_tiles(const Pyramid& pyramid, const std::vector<Cut>& cuts) {
  if (cuts.empty()) return 0;
  return cuts.back().first_tile + pyramid.batch * cuts.back().blocks * cuts.back().tiles;
}

// Counts down what is left to do for each of some results, so that the thread that does the last of it goes on.
class Countdown {
 public:
  explicit Countdown(int64_t results) : left_(results) {}
  void start(int64_t result, int64_t items) { left_[result].store(items, std::memory_order_relaxed); }
  // Whether the item just done was the last of its result; all that the others wrote is seen then.
  bool is_last(int64_t result) { return left_[result].fetch_sub(1, std::memory_order_acq_rel) == 1; }

 private:
  std::vector<std::atomic<int64_t>> left_;
};

// One item of a loop over the samples of all layers: the masses of a sample, or one of its tiles.
struct Item {
  int64_t layer, sample, tile; // -1: the masses

  static int64_t count_of_sample(const Cut& cut) { return 1 + cut.blocks * cut.tiles; }
  static int64_t count(const Pyramid& pyramid, const std::vector<Cut>& cuts) {
    return count_tiles(pyramid, cuts) + pyramid.num_layers * pyramid.batch;
  }
  static Item of(const Pyramid& pyramid, const std::vector<Cut>& cuts, int64_t index) {
    int64_t l = pyramid.num_layers - 1;
    while (cuts[l].first_tile + l * pyramid.batch > index)
      --l;
    const int64_t in_layer = index - cuts[l].first_tile - l * pyramid.batch, of_sample = count_of_sample(cuts[l]);
    return {l, in_layer / of_sample, in_layer % of_sample - 1};
  }
};

int64_t layer_of_tile(const std::vector<Cut>& cuts, int64_t tile) {
  int64_t l = static_cast<int64_t>(cuts.size()) - 1;
  while (cuts[l].first_tile > tile)
    --l;
  return l;
}

// Where the sums of a tile are written among those of all layers, [2, N, ΣC].
template <class T>
T* sums_of(const Pyramid& pyramid, const Cut& cut, int64_t region, int64_t n, T* sums) {
  return sums + (region * pyramid.batch + n) * pyramid.total_channels + cut.first_channel;
}

// Writes the sums of a tile that has whole rows.
template <class T>
void write_sums(const Pyramid& pyramid, const Cut& cut, const Tile& tile, const TileSums& of_tile, T* sums) {
  for (int64_t region = 0; region < 2; ++region) {
    const double* values = region == 0 ? of_tile.fg : of_tile.bg;
    T* out = sums_of(pyramid, cut, region, tile.n, sums) + tile.channel_begin;
#pragma omp simd
    for (int64_t c = 0; c < tile.channel_end - tile.channel_begin; ++c)
      out[c] = static_cast<T>(values[c]);
  }
}

// Sums a tile, to its place among the results where it has whole rows, else among the partial sums of its layer.
void sum_tile(const Pyramid& pyramid, const Item& item, const Cut& cut, double* partial, void* sums) {
  const Layer& layer = pyramid.layers[item.layer];
  const int64_t index = item.sample * cut.blocks * cut.tiles + item.tile;
  const Tile tile = cut.tile(layer, index);
  double of_whole_rows[2 * kMaxTileChannels];
  double* out = cut.has_whole_rows() ? of_whole_rows : partial + cut.partial_sums(0, 0, index);
  const TileSums tile_sums{out, out + tile.channel_end - tile.channel_begin};
  tile_kernels().sums(layer, tile, pyramid.accumulate, tile_sums);
  if (!cut.has_whole_rows()) return;
  with_type(pyramid.accumulate,
            [&](auto zero) { write_sums(pyramid, cut, tile, tile_sums, static_cast<decltype(zero)*>(sums)); });
}

void write_masses(const Pyramid& pyramid, const Item& item, void* masses) {
  double mass[2];
  tile_kernels().masses(pyramid.layers[item.layer], item.sample, mass);
  for (int64_t k = 0; k < 2; ++k) {
    const int64_t row = k * pyramid.batch + item.sample;
    write(masses, pyramid.accumulate, row * pyramid.num_layers + item.layer, mass[k]);
  }
}

// Adds up the partial sums [tile][2][channel] of sample n of one layer in the order of its tiles.
template <class T>
void second_pass(const Pyramid& pyramid, int64_t l, int64_t n, const Cut& cut, const double* partial, const T* masses,
                 T* sums) {
  const int64_t channels = pyramid.layers[l].channels;
  double totals[kMaxTileChannels];
  for (int64_t region = 0; region < 2; ++region) {
    // 0, or NaN where a weight is: the kernels of the sums do not look at bytes that stand for NaN.
    const double start = 0.0 * masses[(region * pyramid.batch + n) * pyramid.num_layers + l];
    T* out = sums_of(pyramid, cut, region, n, sums);
    if (cut.has_whole_rows()) {
      if (start != start) std::fill_n(out, channels, static_cast<T>(start));
      continue;
    }
    for (int64_t first = 0, block = 0; first < channels; first += cut.tile_channels, ++block) {
      const int64_t count = std::min(cut.tile_channels, channels - first);
      std::fill_n(totals, count, start);
      for (int64_t tile = 0; tile < cut.tiles; ++tile) {
        const double* part = partial + cut.partial_sums(n, tile, block) + region * count;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c)
          totals[c] += part[c];
      }
#pragma omp simd
      for (int64_t c = 0; c < count; ++c)
        out[first + c] = static_cast<T>(totals[c]);
    }
  }
}

} // namespace

void sums(const Pyramid& pyramid, void* sums, void* masses, const Losses* losses, int num_threads) {
  const std::vector<Cut> cuts = cut(pyramid, Span::kChannelBlocks);
  std::vector<int64_t> room(cuts.size() + 1, 0); // partial sums before those of each layer
  for (size_t l = 0; l < cuts.size(); ++l)
    room[l + 1] = room[l] + cuts[l].partial_sums(pyramid.batch, 0, 0);
  const std::unique_ptr<double[]> partial(new double[room.back()]);
  std::vector<double> of_layers(cuts.size(), 0);
  const auto write_losses = [&](int64_t l) {
    if (losses != nullptr) of_layers[l] = losses_of_layer(pyramid, l, cuts[l].first_channel, sums, masses, *losses);
  };

  Countdown samples(pyramid.num_layers * pyramid.batch), layers(pyramid.num_layers);
  for (int64_t l = 0; l < pyramid.num_layers; ++l) {
    layers.start(l, pyramid.batch);
    for (int64_t n = 0; n < pyramid.batch; ++n)
      samples.start(l * pyramid.batch + n, Item::count_of_sample(cuts[l]));
  }
  const int threads = useful_threads(elements_of(pyramid), num_threads);
  parallel_for(Item::count(pyramid, cuts), threads, [&](int64_t index) {
    const Item item = Item::of(pyramid, cuts, index);
    const int64_t l = item.layer, n = item.sample;
    double* const partial_of_layer = partial.get() + room[l];
    if (item.tile < 0) {
      write_masses(pyramid, item, masses);
    } else {
      sum_tile(pyramid, item, cuts[l], partial_of_layer, sums);
    }
    if (!samples.is_last(l * pyramid.batch + n)) return;
    with_type(pyramid.accumulate, [&](auto zero) {
      using T = decltype(zero);
      second_pass(pyramid, l, n, cuts[l], partial_of_layer, static_cast<const T*>(masses), static_cast<T*>(sums));
    });
    if (layers.is_last(l)) write_losses(l);
  });
  for (int64_t l = 0; pyramid.batch == 0 && l < pyramid.num_layers; ++l)
    write_losses(l);
  if (losses != nullptr && losses->total != nullptr) {
    write(losses->total, pyramid.accumulate, 0, std::accumulate(of_layers.begin(), of_layers.end(), 0.0));
  }
}

namespace {

// Runs a gradient kernel on every tile, with the rows g_fg and g_bg [C] of its sample and layer.
template <class Kernel>
void for_each_tile(const Pyramid& pyramid, const void* grad_sums, Span span, int num_threads, Kernel kernel) {
  const std::vector<Cut> cuts = cut(pyramid, span);
  parallel_for(count_tiles(pyramid, cuts), useful_threads(elements_of(pyramid), num_threads), [&](int64_t item) {
    const int64_t l = layer_of_tile(cuts, item);
    const Tile tile = cuts[l].tile(pyramid.layers[l], item - cuts[l].first_tile);
    const int64_t element = element_size(pyramid.accumulate);
    const char* fg =
        static_cast<const char*>(grad_sums) + (tile.n * pyramid.total_channels + cuts[l].first_channel) * element;
    const char* bg = fg + pyramid.batch * pyramid.total_channels * element;
    kernel(pyramid.layers[l], tile, pyramid.accumulate, fg, bg);
  });
}

// Multiplies the rows of layer l by factor[l * stride].
template <class T>
std::vector<T> multiply_layers(const Pyramid& pyramid, const T* grad_sums, const T* factor, int64_t stride) {
  std::vector<T> products(2 * pyramid.batch * pyramid.total_channels);
  for (int64_t row = 0, at = 0; row < 2 * pyramid.batch; ++row) {
    for (int64_t l = 0; l < pyramid.num_layers; ++l) {
      for (int64_t c = 0; c < pyramid.layers[l].channels; ++c, ++at)
        products[at] = factor[l * stride] * grad_sums[at];
    }
  }
  return products;
}

} // namespace

void gradient(const Pyramid& pyramid, const void* grad_sums, const void* factor, int64_t factor_stride,
              int num_threads) {
  if (factor != nullptr) {
    return with_type(pyramid.accumulate, [&](auto zero) {
      using T = decltype(zero);
      const auto products =
          multiply_layers(pyramid, static_cast<const T*>(grad_sums), static_cast<const T*>(factor), factor_stride);
      gradient(pyramid, products.data(), nullptr, 0, num_threads);
    });
  }
  for (int64_t l = 0; l < pyramid.num_layers; ++l)
    advise_huge_pages(pyramid.layers[l].features, elements_of(pyramid, l) * element_size(pyramid.layers[l].dtype));
  for_each_tile(pyramid, grad_sums, Span::kChannelBlocks, num_threads, tile_kernels().gradient);
}

void mask_gradient(const Pyramid& pyramid, const void* grad_sums, int num_threads) {
  for_each_tile(pyramid, grad_sums, Span::kAllChannels, num_threads, tile_kernels().mask_gradient);
}

} // namespace fdk::cpu
