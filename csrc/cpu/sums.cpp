// Sums and gradients on the CPU: cuts the layers into tiles, runs the vector kernels on them in parallel, and adds up
// partial sums in a fixed order.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "numbers.h"
#include "parallel.h"
#include "tiles.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fdk::cpu {
namespace {

// Elements of a tile: enough to hide the cost of scheduling it, few enough for an even load of the threads.
constexpr int64_t kTileElements = 1 << 16;
// Channels of a tile with contiguous pixels: they share the weights, and runs of pixels stay long.
constexpr int64_t kTileChannels = 8;
// Elements below which another thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 14;

struct Isa {
  const char* name;
  TileKernels kernels;
};

// Lists the instruction sets that both this build and this processor have, best first.
std::vector<Isa> usable_isas() {
  std::vector<Isa> usable;
#if defined(FDK_HAVE_AVX512) || defined(FDK_HAVE_AVX2)
  __builtin_cpu_init();
#endif
#if defined(FDK_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    usable.push_back({"avx512", tile_kernels_avx512()});
  }
#endif
#if defined(FDK_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    usable.push_back({"avx2", tile_kernels_avx2()});
  }
#endif
  usable.push_back({"baseline", tile_kernels_baseline()});
  return usable;
}

// Returns the best instruction set, or the one that FDKERNELS_CPU_ISA names, so that one machine can test each.
Isa best_isa() {
  const std::vector<Isa> usable = usable_isas();
  const char* wanted = std::getenv("FDKERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return usable.front();
  for (const Isa& isa : usable) {
    if (std::string(wanted) == isa.name) return isa;
  }
  throw std::runtime_error("FDKERNELS_CPU_ISA must be an instruction set that this build and this processor have, " +
                           std::string("baseline, avx2 or avx512, got ") + wanted);
}

const Isa& isa() {
  static const Isa best = best_isa();
  return best;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

int64_t layer_of_tile(const std::vector<Cut>& cuts, int64_t tile) {
  int64_t l = static_cast<int64_t>(cuts.size()) - 1;
  while (cuts[l].first_tile > tile)
    --l;
  return l;
}

int useful_threads(const Pyramid& pyramid, int num_threads) {
  int64_t elements = 0;
  for (int64_t l = 0; l < pyramid.num_layers; ++l) {
    elements += pyramid.batch * pyramid.layers[l].channels * pixels_of(pyramid.layers[l]);
  }
  return static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, std::max(num_threads, 1)));
}

// Adds up the partial sums [tile][channel][2] of one layer in the order of its tiles.
template <class T>
void second_pass(const Pyramid& pyramid, int64_t l, const Cut& cut, const double* partial, const T* masses, T* sums) {
  const int64_t channels = pyramid.layers[l].channels;
  for (int64_t n = 0; n < pyramid.batch; ++n) {
    T* fg = sums + n * pyramid.total_channels + cut.first_channel;
    T* bg = fg + pyramid.batch * pyramid.total_channels;
    // 0, or NaN where a weight is: the kernels of the sums do not look at bytes that stand for NaN.
    const double start[2] = {0.0 * masses[n * pyramid.num_layers + l],
                             0.0 * masses[(pyramid.batch + n) * pyramid.num_layers + l]};
    for (int64_t first = 0, block = 0; first < channels; first += cut.tile_channels, ++block) {
      const int64_t count = std::min(cut.tile_channels, channels - first);
      const double* part = partial + (n * cut.tiles * cut.blocks + block) * cut.tile_channels * 2;
      for (int64_t c = 0; c < count; ++c) {
        double total[2] = {start[0], start[1]};
        for (int64_t tile = 0; tile < cut.tiles; ++tile) {
          total[0] += part[(tile * cut.blocks * cut.tile_channels + c) * 2];
          total[1] += part[(tile * cut.blocks * cut.tile_channels + c) * 2 + 1];
        }
        fg[first + c] = static_cast<T>(total[0]);
        bg[first + c] = static_cast<T>(total[1]);
      }
    }
  }
}

} // namespace

void sums(const Pyramid& pyramid, void* sums, void* masses, const Losses* losses, int num_threads) {
  const std::vector<Cut> cuts = cut(pyramid, Span::kChannelBlocks);
  const int64_t num_tiles = count_tiles(pyramid, cuts), num_masses = pyramid.num_layers * pyramid.batch;
  // Partial sums [tile][channel][2], with room for the widest tile of the layer.
  std::vector<int64_t> room(cuts.size() + 1, 0);
  for (size_t l = 0; l < cuts.size(); ++l) {
    const int64_t tiles = pyramid.batch * cuts[l].blocks * cuts[l].tiles;
    room[l + 1] = room[l] + tiles * cuts[l].tile_channels * 2;
  }
  const std::unique_ptr<double[]> partial(new double[room.back()]);

  parallel_for(num_tiles + num_masses, useful_threads(pyramid, num_threads), [&](int64_t item) {
    if (item >= num_tiles) {
      const int64_t l = (item - num_tiles) / pyramid.batch, n = (item - num_tiles) % pyramid.batch;
      double mass[2];
      isa().kernels.masses(pyramid.layers[l], n, mass);
      for (int64_t k = 0; k < 2; ++k) {
        write(masses, pyramid.accumulate, (k * pyramid.batch + n) * pyramid.num_layers + l, mass[k]);
      }
      return;
    }
    const int64_t l = layer_of_tile(cuts, item), index = item - cuts[l].first_tile;
    double* out = partial.get() + room[l] + index * cuts[l].tile_channels * 2;
    isa().kernels.sums(pyramid.layers[l], cuts[l].tile(pyramid.layers[l], index), pyramid.accumulate, out);
  });

  for (int64_t l = 0; l < pyramid.num_layers; ++l) {
    with_type(pyramid.accumulate, [&](auto zero) {
      using T = decltype(zero);
      second_pass(pyramid, l, cuts[l], partial.get() + room[l], static_cast<const T*>(masses), static_cast<T*>(sums));
    });
  }
  if (losses != nullptr) cpu::losses(pyramid, sums, masses, *losses);
}

namespace {

// Requests pages of 2 MB. Each page of fresh memory costs a fault, and at 4 KB faults take ten times as long as the
// write. Has no effect on memory that has been touched before.
void advise_huge_pages(const Layer& layer, int64_t batch) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(layer.features);
  const uintptr_t end =
      begin + static_cast<uintptr_t>(batch * layer.channels * pixels_of(layer) * element_size(layer.dtype));
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)layer, (void)batch;
#endif
}

// Runs a gradient kernel on every tile, with the rows g_fg and g_bg [C] of its sample and layer.
template <class Kernel>
void for_each_tile(const Pyramid& pyramid, const void* grad_sums, Span span, int num_threads, Kernel kernel) {
  const std::vector<Cut> cuts = cut(pyramid, span);
  parallel_for(count_tiles(pyramid, cuts), useful_threads(pyramid, num_threads), [&](int64_t item) {
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
    advise_huge_pages(pyramid.layers[l], pyramid.batch);
  for_each_tile(pyramid, grad_sums, Span::kChannelBlocks, num_threads, isa().kernels.gradient);
}

void mask_gradient(const Pyramid& pyramid, const void* grad_sums, int num_threads) {
  for_each_tile(pyramid, grad_sums, Span::kAllChannels, num_threads, isa().kernels.mask_gradient);
}

const char* instruction_set() { return isa().name; }

} // namespace fdk::cpu
