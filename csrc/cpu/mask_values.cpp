// The values of a mask: which are weights, and NaN in place of the others.
#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>

#include "mask_rows.h"
#include "parallel.h"

namespace fdk::cpu {
namespace {

// The values that are weights: [0, 1] to within the tolerance. Exact in float, so that A makes no difference.
template <class A>
struct Bounds {
  A low, high;
  explicit Bounds(const Masks& mask) : low(static_cast<A>(-mask.tolerance)), high(static_cast<A>(1 + mask.tolerance)) {}
  bool hold(A y) const { return (y >= low) & (y <= high); }
};

// Whether all pixels are weights or ignored, to within the tolerance. In integers as wide as the pixels, so that the
// loop vectorises.
template <class S, bool kIgnore>
bool row_is_valid(const Masks& mask, const S* row) {
  if constexpr (std::is_integral<S>::value) {
    const S ignored = static_cast<S>(mask.ignore_number);
    S bad = 0;
    for_each_pixel(row, mask.stride[2], mask.size[2], [&](int64_t, const S& value) {
      const S other_bits = static_cast<S>(value & ~S(1));
      const S counts = static_cast<S>(kIgnore ? -static_cast<S>(value != ignored) : -1); // all bits or none
      bad |= static_cast<S>(other_bits & counts);
    });
    return bad == 0;
  } else {
    using A = typename std::conditional<std::is_same<S, double>::value, double, float>::type;
    using Flag = typename std::conditional<std::is_same<S, double>::value, int64_t, int32_t>::type;
    const Bounds<A> bounds(mask);
    const A ignored = static_cast<A>(mask.ignore_value);
    Flag bad = 0;
    for_each_pixel(row, mask.stride[2], mask.size[2], [&](int64_t, const S& value) {
      const A y = static_cast<A>(value);
      const bool outside = !bounds.hold(y), counts = !kIgnore | (y != ignored);
      bad |= static_cast<Flag>(outside & counts);
    });
    return bad == 0;
  }
}

} // namespace

bool mask_is_valid(const Masks& mask, int num_threads) {
  const int64_t rows = mask.size[0] * mask.size[1];
  const int64_t per_item = std::max<int64_t>(kPixelsPerItem / std::max<int64_t>(mask.size[2], 1), 1);
  const int64_t items = (rows + per_item - 1) / per_item;
  std::atomic<bool> valid{true};
  with_dtype(mask, [&](auto value) {
    using S = decltype(value);
    parallel_for(mask.batch * items, num_threads, [&](int64_t item) {
      const int64_t n = item / items, begin = item % items * per_item;
      for (int64_t row = begin; row < std::min(begin + per_item, rows); ++row) {
        const S* line = row_of<S>(mask, n, row);
        const auto look = mask.has_ignore ? row_is_valid<S, true> : row_is_valid<S, false>;
        if (!look(mask, line)) valid = false;
      }
    });
  });
  return valid;
}

std::vector<double> copy_with_nan(const Masks& mask) {
  const int64_t rows = mask.size[0] * mask.size[1], width = mask.size[2];
  std::vector<double> copy(mask.batch * rows * width);
  const Bounds<double> bounds(mask);
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  with_dtype(mask, [&](auto element) {
    using S = decltype(element);
    for (int64_t row = 0; row < mask.batch * rows; ++row) {
      double* out = copy.data() + row * width;
      for_each_pixel(row_of<S>(mask, row / rows, row % rows), mask.stride[2], width, [&](int64_t i, const S& value) {
        const double y = static_cast<double>(value);
        bool ignored = y == mask.ignore_value;
        if constexpr (std::is_integral<S>::value) ignored = value == static_cast<S>(mask.ignore_number);
        out[i] = mask.has_ignore && ignored ? kNotValid : bounds.hold(y) ? y : kNaN;
      });
    }
  });
  return copy;
}

} // namespace fdk::cpu
