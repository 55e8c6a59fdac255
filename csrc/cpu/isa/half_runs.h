// Numbers of 16 bits: conversion of runs to and from float.
#pragma once

#include "vectors.h"

namespace fdk::cpu {
namespace {

inline void load_float16(const uint16_t* source, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; ++i)
    out[i] = float16_to_float(source[i]);
}

inline void store_float16(const float* source, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < count; ++i)
    out[i] = float_to_float16(source[i]);
}

// Rounds as float_to_bfloat16 does. AVX512_BF16 would flush subnormal numbers to zero.
#if defined(FDK_ISA_AVX512)
inline __m256i to_bfloat16(const float* source) {
  constexpr __mmask16 kAll = 0xFFFF;
  const __m512i bits = _mm512_loadu_si512(source);
  const __m512i high = _mm512_maskz_srli_epi32(kAll, bits, 16);
  const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), even);
  const __m512 value = _mm512_castsi512_ps(bits);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_maskz_srli_epi32(kAll, sum, 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  return _mm512_maskz_cvtepi32_epi16(kAll, _mm512_mask_mov_epi32(rounded, nan, quiet));
}
#elif defined(FDK_ISA_AVX2)
inline __m256i eight_to_bfloat16(const float* source) {
  const __m256 value = _mm256_loadu_ps(source);
  const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), even);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
}
inline __m256i to_bfloat16(const float* source) {
  const __m256i packed = _mm256_packus_epi32(eight_to_bfloat16(source), eight_to_bfloat16(source + 8));
  return _mm256_permute4x64_epi64(packed, 0xD8); // packus interleaves halves of 128 bits
}
#endif

inline void store_bfloat16(const float* source, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(FDK_ISA_AVX512) || defined(FDK_ISA_AVX2)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), to_bfloat16(source + i));
#endif
  for (; i < count; ++i)
    out[i] = float_to_bfloat16(source[i]);
}

} // namespace
} // namespace fdk::cpu
