// The gradient (R3) on a run of pixels of one channel.
#pragma once

#include "runs.h"

namespace fdk::cpu {
namespace {

// Writes a run of one channel; `added` is the upstream gradient, or null.
template <class T, class M, bool kHasBg>
inline void write_row(const RawWeights<T, M, kHasBg>& weights, int64_t p, int64_t count, T g_fg, T g_bg, const T* added,
                      T* out) {
  using V = Vector<T>;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const V w = weights.fg_vector(p + i), u = weights.bg_vector(p + i, w);
    V value = select_valid<kHasBg>(w, u, g_fg * w + g_bg * u);
    if (added != nullptr) value += load_vector(added + i);
    store_vector(out + i, value);
  }
  for (; i < count; ++i) {
    const T w = weights.fg_at(p + i), u = weights.bg_at(p + i);
    const T value = !kHasBg || is_valid(w, u) ? g_fg * w + g_bg * u : T(0);
    out[i] = added != nullptr ? value + added[i] : value;
  }
}

} // namespace
} // namespace fdk::cpu
