// Stands in for CUDA's bfloat16; see cuda_runtime.h beside this.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits; // the upper half of a float
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff}; // the rounding below would carry some NaNs over to another sign or to zero
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t odd = bits >> 16 & 1; // ties go to even
  return {static_cast<uint16_t>((bits + 0x7fff + odd) >> 16)};
}
