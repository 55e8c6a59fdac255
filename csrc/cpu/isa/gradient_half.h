// The gradient (R3) in 16 bits, accumulated in float and without an upstream gradient. Rounding takes longer than
// writing, so each channel is rounded once for all pixels whose weights are 0 or 1, which most are.
#pragma once

#include "gradient_row.h"
#include "runs.h"

namespace fdk::cpu {
namespace {

// Pixels whose weights are inspected at a time; the forms made of them stay in the L1 cache.
constexpr int64_t kInspected = 2048;

// Computes (R3) by the same expression as everywhere, so that NaN propagates alike.
inline float value_at(float g_fg, float g_bg, float w, float u) { return g_fg * w + g_bg * u; }

// Whether no result can be NaN for weights in [0, 1], so that rounding may skip that case.
inline bool is_finite(float g_fg, float g_bg) {
  return g_fg - g_fg == 0 && g_bg - g_bg == 0 && (g_fg - g_bg) - (g_fg - g_bg) == 0;
}

inline uint16_t half_bits(float value, DType dtype) {
  return dtype == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
}

// Rounds two vectors to bfloat16 as store_bfloat16 does, but without its case of NaN, and interleaves them: each 32-bit
// word holds one element of `even` and, above it, one of `odd`.
inline Vector<uint32_t> round_pair(Vector<float> even, Vector<float> odd) {
  Vector<uint32_t> low, high;
  std::memcpy(&low, &even, sizeof(low));
  std::memcpy(&high, &odd, sizeof(high));
  low += (low >> 16 & 1u) + 0x7FFFu;
  high += (high >> 16 & 1u) + 0x7FFFu;
  return low >> 16 | (high & 0xFFFF0000u);
}

// Copies floats in the order that round_pair takes: of every two vectors the even elements, then the odd ones.
inline void split_pairs(const float* values, int64_t count, float* out) {
  constexpr int64_t kPair = 2 * kLanes<float>;
  for (int64_t i = 0; i + kPair <= count; i += kPair) {
    for (int64_t k = 0; k < kLanes<float>; ++k) {
      out[i + k] = values[i + 2 * k];
      out[i + kLanes<float> + k] = values[i + 2 * k + 1];
    }
  }
}

// ---------------------------------------------------------------- pixels along the vector

// Selects between the two values of a channel by binary weights; `bg` is read only if the layer stores it. Both values
// are NaN where a byte stands for NaN.
template <bool kHasBg>
inline void choose_row(const uint8_t* fg, const uint8_t* bg, int64_t count, uint16_t in_fg, uint16_t in_bg,
                       uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t w = fg[i] ? 0xFFFFu : 0u;
    const uint16_t u = kHasBg ? (bg[i] ? 0xFFFFu : 0u) : static_cast<uint16_t>(~w);
    out[i] = static_cast<uint16_t>((w & in_fg) | (u & in_bg));
  }
}

// The range of some pixels' weights.
enum class Kind {
  kBinary, // 0 or 1
  kSoft,   // in [0, 1]
  kOther   // anything else, such as NaN
};

// The weights of some pixels, in the forms from which rows of their kind are written.
template <class M, bool kHasBg>
struct InspectedWeights {
  uint8_t fg_bytes[kInspected], bg_bytes[kInspected];
  float fg_split[kInspected], bg_split[kInspected];
  const uint8_t *fg, *bg;

  Kind inspect(const RawWeights<float, M, kHasBg>& weights, int64_t p, int64_t count, bool split) {
    if constexpr (sizeof(M) == 1) {
      fg = weights.fg + p;
      bg = kHasBg ? weights.bg + p : nullptr;
      return Kind::kBinary;
    } else {
      Kind kind = range_of(weights.fg + p, count, fg_bytes);
      if constexpr (kHasBg) kind = max(kind, range_of(weights.bg + p, count, bg_bytes));
      fg = fg_bytes;
      bg = bg_bytes;
      if (kind == Kind::kSoft && split) {
        split_pairs(weights.fg + p, count, fg_split);
        if constexpr (kHasBg) split_pairs(weights.bg + p, count, bg_split);
      }
      return kind;
    }
  }

  static Kind max(Kind a, Kind b) { return a > b ? a : b; }

  static Kind range_of(const float* weights, int64_t count, uint8_t* bytes) {
    int32_t binary = 1, soft = 1;
#pragma omp simd reduction(& : binary, soft)
    for (int64_t i = 0; i < count; ++i) {
      const float w = weights[i];
      binary &= (w == 0.0f) | (w == 1.0f);
      soft &= (w >= 0.0f) & (w <= 1.0f);
      bytes[i] = w != 0.0f;
    }
    return binary ? Kind::kBinary : soft ? Kind::kSoft : Kind::kOther;
  }
};

// Writes bfloat16 for soft weights. Returns the number of pixels written, which leaves out the last few.
template <class M, bool kHasBg>
inline int64_t write_soft_row(const InspectedWeights<M, kHasBg>& inspected, int64_t count, float g_fg, float g_bg,
                              uint16_t* out) {
  using V = Vector<float>;
  constexpr int64_t kPair = 2 * kLanes<float>;
  const auto value = [&](int64_t i) {
    const V w = load_vector(inspected.fg_split + i);
    const V u = kHasBg ? load_vector(inspected.bg_split + i) : 1.0f - w;
    return g_fg * w + g_bg * u;
  };
  int64_t i = 0;
  for (; i + kPair <= count; i += kPair) {
    const Vector<uint32_t> bits = round_pair(value(i), value(i + kLanes<float>));
    std::memcpy(out + i, &bits, sizeof(bits));
  }
  return i;
}

template <class M, bool kHasBg>
void gradient_half_by_pixels(const Layer& layer, const Tile& tile, const RawWeights<float, M, kHasBg>& weights,
                             const float* g_fg, const float* g_bg) {
  InspectedWeights<M, kHasBg> inspected;
  float buffer[kInspected];
  const Rows rows(layer.size, layer.stride);
  const bool split = layer.dtype == DType::kBFloat16;
  uint16_t* sample = static_cast<uint16_t*>(layer.features) + tile.n * layer.stride_n;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kInspected, tile.pixel_end - p), rows.rest_of_row(p));
    const Kind kind = inspected.inspect(weights, p, count, split);
    for (int64_t c = tile.channel_begin; c < tile.channel_end; ++c) {
      uint16_t* out = sample + c * layer.stride_c + rows.offset(p);
      if (kind == Kind::kBinary) {
        const uint16_t in_fg = half_bits(value_at(g_fg[c], g_bg[c], 1, 0), layer.dtype);
        const uint16_t in_bg = half_bits(value_at(g_fg[c], g_bg[c], 0, 1), layer.dtype);
        choose_row<kHasBg>(inspected.fg, inspected.bg, count, in_fg, in_bg, out);
        continue;
      }
      int64_t written = 0;
      if (kind == Kind::kSoft && split && is_finite(g_fg[c], g_bg[c])) {
        written = write_soft_row(inspected, count, g_fg[c], g_bg[c], out);
      }
      write_row(weights, p + written, count - written, g_fg[c], g_bg[c], static_cast<const float*>(nullptr), buffer);
      store(buffer, out + written, layer.dtype, 1, count - written);
    }
  }
}

// ---------------------------------------------------------------- channels along the vector

// Copies a row of a few hundred bytes, for which the call of std::memcpy takes longer than the copy.
inline void copy_row(const uint16_t* source, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + 2 * kLanes<float> <= count; i += 2 * kLanes<float>) {
    Vector<float> bits;
    std::memcpy(&bits, source + i, sizeof(bits));
    std::memcpy(out + i, &bits, sizeof(bits));
  }
  for (; i < count; ++i)
    out[i] = source[i];
}

// Copies one of three rows to each pixel with binary weights, and computes the row of the others.
void gradient_half_by_channels(const Layer& layer, const Tile& tile, const float* g_fg, const float* g_bg) {
  constexpr int64_t kPair = 2 * kLanes<float>;
  Weights<float> weights;
  float values[kMaxTileChannels] = {}, fg_split[kMaxTileChannels], bg_split[kMaxTileChannels];
  alignas(kCacheLine) uint16_t in_fg[kMaxTileChannels], in_bg[kMaxTileChannels];
  alignas(kCacheLine) static const uint16_t zeros[kMaxTileChannels] = {};
  const uint16_t* const choices[] = {zeros, in_fg, in_bg};
  const Rows rows(layer.size, layer.stride);
  const int64_t channels = tile.channel_end - tile.channel_begin;
  g_fg += tile.channel_begin;
  g_bg += tile.channel_begin;
  const auto compute = [&](float w, float u, uint16_t* out) {
    for (int64_t c = 0; c < channels; ++c)
      values[c] = value_at(g_fg[c], g_bg[c], w, u);
    store(values, out, layer.dtype, 1, channels);
  };
  compute(1, 0, in_fg);
  compute(0, 1, in_bg);
  bool round_pairs = layer.dtype == DType::kBFloat16 && channels % kPair == 0;
  for (int64_t c = 0; round_pairs && c < channels; ++c)
    round_pairs = is_finite(g_fg[c], g_bg[c]);
  if (round_pairs) {
    split_pairs(g_fg, channels, fg_split);
    split_pairs(g_bg, channels, bg_split);
  }
  uint16_t* sample =
      static_cast<uint16_t*>(layer.features) + tile.n * layer.stride_n + tile.channel_begin * layer.stride_c;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    uint16_t* out = sample + rows.offset(p);
    for (int64_t i = 0; i < count; ++i, out += rows.stride) {
      const float w = weights.fg[i], u = weights.bg[i];
      // Without branches: at a random mask every second one would be mispredicted.
      const bool is_fg = (w == 1) & (u == 0), is_bg = (w == 0) & (u == 1);
      if (is_fg | is_bg | ((w == 0) & (u == 0))) {
        copy_row(choices[static_cast<int>(is_fg) + 2 * static_cast<int>(is_bg)], channels, out);
      } else if (round_pairs && w >= 0 && w <= 1 && u >= 0 && u <= 1) {
        for (int64_t c = 0; c < channels; c += kPair) {
          const auto value = [&](int64_t k) { return load_vector(fg_split + k) * w + load_vector(bg_split + k) * u; };
          const Vector<uint32_t> bits = round_pair(value(c), value(c + kLanes<float>));
          std::memcpy(out + c, &bits, sizeof(bits));
        }
      } else {
        compute(w, u, out);
      }
    }
  }
}

void gradient_half(const Layer& layer, const Tile& tile, const float* g_fg, const float* g_bg) {
  if (channels_are_inner(layer)) return gradient_half_by_channels(layer, tile, g_fg, g_bg);
  with_weights<float>(layer, tile.n,
                      [&](const auto& weights) { gradient_half_by_pixels(layer, tile, weights, g_fg, g_bg); });
}

} // namespace
} // namespace fdk::cpu
