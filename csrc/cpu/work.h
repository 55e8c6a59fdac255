// How much work the layers of a call are, and fresh memory for what they return.
#pragma once

#include <algorithm>

#include "../layout.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fdk::cpu {

// Elements of a tile: enough to hide the cost of scheduling it, few enough for an even load of the threads.
inline constexpr int64_t kTileElements = 1 << 16;
// Elements, read or written once, below which another thread costs more than it saves.
inline constexpr int64_t kElementsPerThread = 1 << 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of a layer of a Pyramid or of Regions.
template <class Call>
int64_t elements_of(const Call& call, int64_t l) {
  return call.batch * call.layers[l].channels * pixels_of(call.layers[l]);
}

// Elements of all layers.
template <class Call>
int64_t elements_of(const Call& call) {
  int64_t elements = 0;
  for (int64_t l = 0; l < call.num_layers; ++l)
    elements += elements_of(call, l);
  return elements;
}

inline int useful_threads(int64_t elements, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, std::max(num_threads, 1)));
}

// Requests pages of 2 MB. Each page of fresh memory costs a fault, and at 4 KB faults take ten times as long as the
// write. Has no effect on memory that has been touched before.
inline void advise_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

} // namespace fdk::cpu
