// Calls every CPU kernel on several threads, and from several threads at once, and compares with one thread bit by bit.
// Built with ThreadSanitizer. `threads race` makes a race on purpose: the sanitizer must report it.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/parallel.h"
#include "layout.h"
#include "op.h"

namespace {

using namespace fdk;
using Bytes = std::vector<unsigned char>;

struct Shape {
  int64_t batch, channels, height, width;
};

// A call of each kernel, with memory of its own for what it writes.
class Call {
 public:
  Call(DType dtype, bool channels_last, DType mask_dtype, const std::vector<Shape>& shapes)
      : accumulate_(dtype == DType::kFloat64 ? dtype : DType::kFloat32),
        batch_(shapes[0].batch),
        mask_dtype_(mask_dtype) {
    for (const Shape& shape : shapes) {
      Layer layer{};
      const int64_t pixels = shape.height * shape.width;
      layer.dtype = dtype;
      layer.channels = shape.channels;
      layer.size[0] = 1, layer.size[1] = shape.height, layer.size[2] = shape.width;
      layer.stride_n = shape.channels * pixels;
      layer.stride_c = channels_last ? 1 : pixels;
      layer.stride[2] = channels_last ? shape.channels : 1;
      layer.stride[1] = shape.width * layer.stride[2];
      layer.stride[0] = shape.height * layer.stride[1];
      layer.mask_dtype = mask_dtype == DType::kUInt8 ? DType::kUInt8 : accumulate_;
      layer.upstream_stride_n = layer.stride_n, layer.upstream_stride_c = layer.stride_c;
      std::memcpy(layer.upstream_stride, layer.stride, sizeof(layer.stride));
      layers_.push_back(layer);
      total_channels_ += shape.channels;
    }
    const Layer& first = layers_[0];
    mask_pixels_ = 4 * pixels_of(first);
    mask_ = random_numbers(mask_dtype, batch_ * mask_pixels_, 1);
    for (const Layer& layer : layers_) {
      const int64_t elements = batch_ * layer.channels * pixels_of(layer);
      features_.push_back(random_numbers(dtype, elements, 2));
      upstream_.push_back(random_numbers(dtype, elements, 3));
    }
    grad_sums_ = random_numbers(accumulate_, 2 * kMostRegions * batch_ * total_channels_, 4);
    pivots_ = random_numbers(accumulate_, kMostRegions * batch_ * total_channels_, 7);
    factor_ = random_numbers(accumulate_, static_cast<int64_t>(layers_.size()), 5);
    for (int64_t n = 0; n < batch_; ++n)
      pairing_.push_back((n + 1) % batch_);
  }

  // Everything that the kernels write, one after the other.
  std::vector<Bytes> run(int num_threads) const {
    std::vector<Bytes> written;
    for (const MaskResize resize : {MaskResize::kArea, MaskResize::kMax, MaskResize::kNearest}) {
      for (const bool ignore : {false, true})
        run_masks(resize, ignore, num_threads, written);
    }
    run_sums(num_threads, written);
    run_gradients(num_threads, written);
    // A group of regions and less than one; several groups, with second moments and ignored pixels.
    run_regions(3, false, num_threads, written);
    run_regions(kMostRegions, true, num_threads, written);
    return written;
  }

 private:
  static constexpr int64_t kMostRegions = 9;

  static Bytes random_numbers(DType dtype, int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    Bytes bytes(count * element_size(dtype));
    for (int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(generator() % 1024) / 1024;
      unsigned char* at = bytes.data() + i * element_size(dtype);
      if (dtype == DType::kFloat64) {
        const double wide = value;
        std::memcpy(at, &wide, 8);
      } else if (dtype == DType::kFloat32) {
        std::memcpy(at, &value, 4);
      } else if (dtype == DType::kBFloat16) {
        std::memcpy(at, reinterpret_cast<const unsigned char*>(&value) + 2, 2);
      } else if (dtype == DType::kFloat16) {
        const uint16_t half = static_cast<uint16_t>(0x3400 + generator() % 2048); // 0.25 to 1
        std::memcpy(at, &half, 2);
      } else {
        *at = value > 0.5F;
      }
    }
    return bytes;
  }

  Masks described(MaskResize resize, bool ignore) const {
    const Layer& first = layers_[0];
    Masks masks{};
    masks.mask = mask_.data();
    masks.dtype = mask_dtype_;
    masks.batch = batch_;
    masks.size[0] = 1, masks.size[1] = 2 * first.size[1], masks.size[2] = 2 * first.size[2];
    masks.stride_n = mask_pixels_;
    masks.stride[0] = mask_pixels_, masks.stride[1] = masks.size[2], masks.stride[2] = 1;
    masks.resize = resize;
    masks.has_ignore = ignore;
    masks.accumulate = accumulate_;
    return masks;
  }

  void run_masks(MaskResize resize, bool ignore, int num_threads, std::vector<Bytes>& written) const {
    Masks masks = described(resize, ignore);
    std::vector<MaskSize> sizes;
    std::vector<Bytes> weights;
    for (const Layer& layer : layers_) {
      for (int k = 0; k < 2; ++k)
        weights.emplace_back(batch_ * pixels_of(layer) * element_size(accumulate_));
    }
    // Also the mask's own size, at which it is copied.
    const int64_t own = batch_ * mask_pixels_ * element_size(accumulate_);
    weights.emplace_back(own), weights.emplace_back(own);
    for (size_t l = 0; l <= layers_.size(); ++l) {
      MaskSize size{};
      size.fg = weights[2 * l].data();
      size.bg = ignore ? weights[2 * l + 1].data() : nullptr;
      std::memcpy(size.size, l < layers_.size() ? layers_[l].size : masks.size, sizeof(size.size));
      size.dtype = accumulate_;
      sizes.push_back(size);
    }
    masks.sizes = sizes.data();
    masks.num_sizes = static_cast<int64_t>(sizes.size());
    cpu::masks(masks, num_threads);
    weights.push_back({static_cast<unsigned char>(cpu::mask_is_valid(masks, num_threads))});
    for (Bytes& part : weights)
      written.push_back(std::move(part));
  }

  // The layers over weights of their own size.
  std::vector<Layer> weighted(std::vector<Bytes>& weights) const {
    std::vector<Layer> layers = layers_;
    for (size_t l = 0; l < layers.size(); ++l) {
      weights.push_back(random_numbers(layers[l].mask_dtype, batch_ * pixels_of(layers[l]), 6));
      layers[l].fg = weights.back().data();
      layers[l].features = const_cast<unsigned char*>(features_[l].data());
    }
    return layers;
  }

  Pyramid pyramid(const std::vector<Layer>& layers) const {
    return {layers.data(), static_cast<int64_t>(layers.size()), batch_, total_channels_, accumulate_};
  }

  void run_sums(int num_threads, std::vector<Bytes>& written) const {
    std::vector<Bytes> weights;
    weights.reserve(layers_.size());
    const std::vector<Layer> layers = weighted(weights);
    const int64_t element = element_size(accumulate_), L = static_cast<int64_t>(layers.size());
    for (const Norm norm : {Norm::kVector, Norm::kChannelSum, Norm::kRelative, Norm::kBatch}) {
      Bytes sums(2 * batch_ * total_channels_ * element), masses(2 * batch_ * L * element), losses(L * element),
          slopes(sums.size());
      Losses asked{};
      asked.options = {RegionWeight::kValid, false, norm, 1, 1e-6, Exchange::kShuffle, Reduction::kMean};
      asked.pairing = pairing_.data();
      asked.num_pairs = batch_;
      asked.losses = losses.data();
      asked.slopes = slopes.data();
      cpu::sums(pyramid(layers), sums.data(), masses.data(), &asked, num_threads);
      for (Bytes* part : {&sums, &masses, &losses, &slopes})
        written.push_back(std::move(*part));
    }
  }

  void run_gradients(int num_threads, std::vector<Bytes>& written) const {
    std::vector<Bytes> weights;
    weights.reserve(layers_.size());
    for (const bool with_upstream : {false, true}) {
      weights.clear();
      std::vector<Layer> layers = weighted(weights);
      std::vector<Bytes> grads;
      for (size_t l = 0; l < layers.size(); ++l) {
        grads.emplace_back(features_[l].size());
        layers[l].features = grads[l].data();
        layers[l].upstream = with_upstream ? upstream_[l].data() : nullptr;
      }
      cpu::gradient(pyramid(layers), grad_sums_.data(), with_upstream ? factor_.data() : nullptr, 1, num_threads);
      for (Bytes& grad : grads)
        written.push_back(std::move(grad));
    }
    weights.clear();
    std::vector<Layer> layers = weighted(weights);
    std::vector<Bytes> grads;
    for (Layer& layer : layers) {
      grads.emplace_back(batch_ * pixels_of(layer) * element_size(accumulate_));
      layer.grad_fg = grads.back().data();
    }
    cpu::mask_gradient(pyramid(layers), grad_sums_.data(), num_threads);
    for (Bytes& grad : grads)
      written.push_back(std::move(grad));
  }

  void run_regions(int64_t num_regions, bool with_moments, int num_threads, std::vector<Bytes>& written) const {
    const int64_t element = element_size(accumulate_), L = static_cast<int64_t>(layers_.size());
    std::vector<RegionLayer> layers;
    std::vector<Bytes> weights, grads, grad_weights;
    for (int64_t l = 0; l < L; ++l) {
      const Layer& plain = layers_[l];
      const int64_t count = batch_ * num_regions * pixels_of(plain);
      weights.push_back(random_numbers(plain.mask_dtype, count, 6));
      grads.emplace_back(features_[l].size());
      grad_weights.emplace_back(count * element);
      RegionLayer layer{};
      layer.features = map_of(plain, features_[l]);
      layer.gradient = map_of(plain, grads[l]);
      if (with_moments) layer.upstream = map_of(plain, upstream_[l]);
      layer.dtype = plain.dtype;
      layer.channels = plain.channels;
      std::memcpy(layer.size, plain.size, sizeof(layer.size));
      layer.weights = weights[l].data();
      layer.weight_dtype = plain.mask_dtype;
      layer.grad_weights = grad_weights[l].data();
      layers.push_back(layer);
    }
    const void* pivots = with_moments ? pivots_.data() : nullptr;
    const Regions regions{layers.data(), L, batch_, num_regions, with_moments, pivots, total_channels_, accumulate_};
    const int64_t rows = with_moments ? 2 * num_regions : num_regions;
    Bytes sums(rows * batch_ * total_channels_ * element), masses(num_regions * batch_ * L * element);
    cpu::region_sums(regions, sums.data(), masses.data(), num_threads);
    cpu::region_gradient(regions, grad_sums_.data(), num_threads);
    cpu::region_weight_gradient(regions, grad_sums_.data(), num_threads);
    written.push_back(std::move(sums)), written.push_back(std::move(masses));
    for (std::vector<Bytes>* parts : {&grads, &grad_weights}) {
      for (Bytes& part : *parts)
        written.push_back(std::move(part));
    }
  }

  // Values that lie as the features of a layer do.
  static Map map_of(const Layer& layer, const Bytes& values) {
    Map map{const_cast<unsigned char*>(values.data()), layer.stride_n, layer.stride_c, {}};
    std::memcpy(map.stride, layer.stride, sizeof(map.stride));
    return map;
  }

  std::vector<Layer> layers_;
  DType accumulate_;
  int64_t batch_, total_channels_ = 0, mask_pixels_ = 0;
  DType mask_dtype_;
  Bytes mask_, grad_sums_, pivots_, factor_;
  std::vector<Bytes> features_, upstream_;
  std::vector<int64_t> pairing_;
};

// Two threads write one number; each waits for the other to have begun, which orders nothing.
int make_race() {
  std::printf("%s\n", fdk::cpu::instruction_set()); // throws if this machine lacks the one asked for
  std::atomic<int> begun{0};
  int64_t total = 0;
  fdk::cpu::parallel_for(2, 2, [&](int64_t item) {
    begun.fetch_add(1, std::memory_order_relaxed);
    while (begun.load(std::memory_order_relaxed) < 2)
      std::this_thread::yield();
    total += item;
  });
  return total > 1;
}

} // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "race") return make_race();
  // Past the sizes at which kernels take another thread, tile, run or vector.
  const std::vector<std::vector<Shape>> pyramids = {
      {{2, 37, 48, 50}, {2, 5, 24, 25}, {2, 130, 7, 9}}, {{3, 8, 90, 91}}, {{2, 300, 18, 20}}};
  int calls = 0, different = 0;
  for (const auto& shapes : pyramids) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      for (const bool channels_last : {false, true}) {
        for (const DType mask : {DType::kUInt8, DType::kFloat32}) {
          const Call call(dtype, channels_last, mask, shapes);
          // From several threads first: what is set up at the first call is set up once.
          std::vector<std::vector<Bytes>> results(6);
          std::vector<std::thread> callers;
          for (int i = 0; i < 3; ++i)
            callers.emplace_back([&, i] { results[i] = call.run(2); });
          for (std::thread& caller : callers)
            caller.join();
          results[3] = call.run(1);
          results[4] = call.run(3);
          results[5] = call.run(8);
          calls += 6;
          for (const auto& result : results)
            different += result != results[3];
        }
      }
    }
  }
  std::printf("%s, %s: %d runs of every kernel, %d with other bits\n", fdk::cpu::instruction_set(),
              fdk::cpu::thread_runtime(), calls, different);
  return different != 0;
}
