// The gradient (R3) in 16 bits, from sums in float and without an upstream gradient. Rounding costs more here than
// writing, so it is done once for a channel wherever weights are 0 or 1, which are most.
#pragma once

#include "backward_row.h"
#include "runs.h"

namespace fdk::cpu {
namespace {

// Pixels whose weights are looked at together: what is made of them stays in the L1 cache.
constexpr int64_t kLook = 2048;

// g_fg w + g_bg u, in the form in which it is computed everywhere, so that NaN comes out the same.
inline float value_at(float g_fg, float g_bg, float w, float u) { return g_fg * w + g_bg * u; }

// Whether rounding may leave out the case of NaN, given weights in [0, 1].
inline bool is_finite(float g_fg, float g_bg) {
  return g_fg - g_fg == 0 && g_bg - g_bg == 0 && (g_fg - g_bg) - (g_fg - g_bg) == 0;
}

inline uint16_t half_bits(float value, DType dtype) {
  return dtype == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
}

// Two vectors rounded to the nearest even bfloat16, as store_bfloat16 does, but none may be NaN: a number of `even` and
// one of `odd` side by side in 32 bits.
inline Vector<uint32_t> round_pair(Vector<float> even, Vector<float> odd) {
  Vector<uint32_t> low, high;
  std::memcpy(&low, &even, sizeof(low));
  std::memcpy(&high, &odd, sizeof(high));
  low += (low >> 16 & 1u) + 0x7FFFu;
  high += (high >> 16 & 1u) + 0x7FFFu;
  return low >> 16 | (high & 0xFFFF0000u);
}

// Floats in the order in which round_pair takes them: within two vectors the even ones, then the odd ones.
inline void deal_out(const float* values, int64_t count, float* out) {
  constexpr int64_t kPair = 2 * kLanes<float>;
  for (int64_t i = 0; i + kPair <= count; i += kPair) {
    for (int64_t k = 0; k < kLanes<float>; ++k) {
      out[i + k] = values[i + 2 * k];
      out[i + kLanes<float> + k] = values[i + 2 * k + 1];
    }
  }
}

// ---------------------------------------------------------------- pixels along the vector

// The bits of a channel's two values, chosen by bytes of 0 and 1; `bg` is not read where it is implied.
template <bool kHasBg>
inline void choose_row(const uint8_t* fg, const uint8_t* bg, int64_t count, uint16_t in_fg, uint16_t in_bg,
                       uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t w = static_cast<uint16_t>(-fg[i]);
    const uint16_t u = kHasBg ? static_cast<uint16_t>(-bg[i]) : static_cast<uint16_t>(~w);
    out[i] = static_cast<uint16_t>((w & in_fg) | (u & in_bg));
  }
}

// What the weights of some pixels are like.
enum class Kind {
  kBinary, // 0 or 1
  kSoft,   // in [0, 1]
  kOther   // NaN, or beyond what a mask may hold
};

// Some pixels' weights in the forms that their kind is written from.
template <class M, bool kHasBg>
struct LookedAt {
  uint8_t fg_bytes[kLook], bg_bytes[kLook];
  float fg_dealt[kLook], bg_dealt[kLook];
  const uint8_t *fg, *bg;

  Kind look(const RawWeights<float, M, kHasBg>& weights, int64_t p, int64_t count, bool deal) {
    if constexpr (sizeof(M) == 1) {
      fg = weights.fg + p;
      bg = kHasBg ? weights.bg + p : nullptr;
      return Kind::kBinary;
    } else {
      Kind kind = look_at(weights.fg + p, count, fg_bytes);
      if constexpr (kHasBg) kind = max(kind, look_at(weights.bg + p, count, bg_bytes));
      fg = fg_bytes;
      bg = bg_bytes;
      if (kind == Kind::kSoft && deal) {
        deal_out(weights.fg + p, count, fg_dealt);
        if constexpr (kHasBg) deal_out(weights.bg + p, count, bg_dealt);
      }
      return kind;
    }
  }

  static Kind max(Kind a, Kind b) { return a > b ? a : b; }

  static Kind look_at(const float* weights, int64_t count, uint8_t* bytes) {
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

// bfloat16 of soft weights; returns how many pixels were written, all but the last few.
template <class M, bool kHasBg>
inline int64_t write_soft_row(const LookedAt<M, kHasBg>& looked, int64_t count, float g_fg, float g_bg, uint16_t* out) {
  using V = Vector<float>;
  constexpr int64_t kPair = 2 * kLanes<float>;
  const auto value = [&](int64_t i) {
    const V w = load_vector(looked.fg_dealt + i);
    const V u = kHasBg ? load_vector(looked.bg_dealt + i) : 1.0f - w;
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
void backward_half_by_pixels(const Layer& layer, const Tile& tile, const RawWeights<float, M, kHasBg>& weights,
                             const float* g_fg, const float* g_bg) {
  LookedAt<M, kHasBg> looked;
  float buffer[kLook];
  const Rows rows(layer.size, layer.stride);
  const bool deal = layer.dtype == DType::kBFloat16;
  uint16_t* sample = static_cast<uint16_t*>(layer.features) + tile.n * layer.stride_n;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kLook, tile.pixel_end - p), rows.rest_of_row(p));
    const Kind kind = looked.look(weights, p, count, deal);
    for (int64_t c = tile.channel_begin; c < tile.channel_end; ++c) {
      uint16_t* out = sample + c * layer.stride_c + rows.offset(p);
      if (kind == Kind::kBinary) {
        const uint16_t in_fg = half_bits(value_at(g_fg[c], g_bg[c], 1, 0), layer.dtype);
        const uint16_t in_bg = half_bits(value_at(g_fg[c], g_bg[c], 0, 1), layer.dtype);
        choose_row<kHasBg>(looked.fg, looked.bg, count, in_fg, in_bg, out);
        continue;
      }
      int64_t written = 0;
      if (kind == Kind::kSoft && deal && is_finite(g_fg[c], g_bg[c])) {
        written = write_soft_row(looked, count, g_fg[c], g_bg[c], out);
      }
      write_row(weights, p + written, count - written, g_fg[c], g_bg[c], static_cast<const float*>(nullptr), buffer);
      store(buffer, out + written, layer.dtype, 1, count - written);
    }
  }
}

// ---------------------------------------------------------------- channels along the vector

// For rows of some hundred bytes the call of std::memcpy takes longer than the copy.
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

// A pixel is one of three rows, or computed where its weights are soft.
void backward_half_by_channels(const Layer& layer, const Tile& tile, const float* g_fg, const float* g_bg) {
  constexpr int64_t kPair = 2 * kLanes<float>;
  Weights<float> weights;
  float values[kMaxTileChannels] = {}, fg_dealt[kMaxTileChannels], bg_dealt[kMaxTileChannels];
  alignas(kCacheLine) uint16_t in_fg[kMaxTileChannels], in_bg[kMaxTileChannels];
  alignas(kCacheLine) static const uint16_t nothing[kMaxTileChannels] = {};
  const uint16_t* const choices[] = {nothing, in_fg, in_bg};
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
    deal_out(g_fg, channels, fg_dealt);
    deal_out(g_bg, channels, bg_dealt);
  }
  uint16_t* sample =
      static_cast<uint16_t*>(layer.features) + tile.n * layer.stride_n + tile.channel_begin * layer.stride_c;
  for (int64_t p = tile.pixel_begin, count; p < tile.pixel_end; p += count) {
    count = min(min(kRun, tile.pixel_end - p), rows.rest_of_row(p));
    weights.load_run(layer, tile.n, p, count);
    uint16_t* out = sample + rows.offset(p);
    for (int64_t i = 0; i < count; ++i, out += rows.stride) {
      const float w = weights.fg[i], u = weights.bg[i];
      // Without branches: random masks would have each second one mispredicted.
      const bool is_fg = (w == 1) & (u == 0), is_bg = (w == 0) & (u == 1);
      if (is_fg | is_bg | ((w == 0) & (u == 0))) {
        copy_row(choices[static_cast<int>(is_fg) + 2 * static_cast<int>(is_bg)], channels, out);
      } else if (round_pairs && w >= 0 && w <= 1 && u >= 0 && u <= 1) {
        for (int64_t c = 0; c < channels; c += kPair) {
          const auto value = [&](int64_t k) { return load_vector(fg_dealt + k) * w + load_vector(bg_dealt + k) * u; };
          const Vector<uint32_t> bits = round_pair(value(c), value(c + kLanes<float>));
          std::memcpy(out + c, &bits, sizeof(bits));
        }
      } else {
        compute(w, u, out);
      }
    }
  }
}

void backward_half(const Layer& layer, const Tile& tile, const float* g_fg, const float* g_bg) {
  if (channels_are_inner(layer)) return backward_half_by_channels(layer, tile, g_fg, g_bg);
  with_weights<float>(layer, tile.n,
                      [&](const auto& weights) { backward_half_by_pixels(layer, tile, weights, g_fg, g_bg); });
}

} // namespace
} // namespace fdk::cpu
