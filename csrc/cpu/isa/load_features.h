// Vectors of features of any dtype, widened in registers.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace fdk::cpu {
namespace {

#if defined(FDK_ISA_AVX512)
// Zero-masked with every lane on: GCC 12 warns of the undefined value in the unmasked forms.
inline Vector<float> widen(__m256i bits, BFloat16) {
  constexpr __mmask16 kAll = 0xFFFF;
  return (Vector<float>)_mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, bits), 16);
}
inline Vector<float> widen(__m256i bits, Float16) {
  constexpr __mmask16 kAll = 0xFFFF;
  return (Vector<float>)_mm512_maskz_cvtph_ps(kAll, bits);
}
#elif defined(FDK_ISA_AVX2)
inline Vector<float> widen(__m128i bits, BFloat16) {
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
inline Vector<float> widen(__m128i bits, Float16) { return (Vector<float>)_mm256_cvtph_ps(bits); }
#endif

// Loads a vector of features stored as S and widens them to T in registers.
template <class S, class T>
inline Vector<T> load_features(const S* source, T) {
  T lanes[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i)
    lanes[i] = static_cast<T>(source[i]);
  return load_vector(lanes);
}
inline Vector<float> load_features(const float* source, float) { return load_vector(source); }
inline Vector<double> load_features(const double* source, double) { return load_vector(source); }
#if defined(FDK_ISA_AVX512)
inline Vector<float> load_features(const BFloat16* source, float) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)), BFloat16());
}
inline Vector<float> load_features(const Float16* source, float) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)), Float16());
}
#elif defined(FDK_ISA_AVX2)
inline Vector<float> load_features(const BFloat16* source, float) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)), BFloat16());
}
inline Vector<float> load_features(const Float16* source, float) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)), Float16());
}
#elif defined(__SSE2__)
inline Vector<float> load_features(const BFloat16* source, float) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
  return (Vector<float>)_mm_unpacklo_epi16(_mm_setzero_si128(), bits);
}
#elif defined(__GNUC__)
inline Vector<float> load_features(const BFloat16* source, float) {
  typename VectorOf<uint16_t, kLanes<float>>::type halves;
  std::memcpy(&halves, source, sizeof(halves));
  return (Vector<float>)(__builtin_convertvector(halves, Vector<uint32_t>) << 16);
}
#endif

// Loads `count` features, less than a vector of them; the other lanes are 0.
template <class S, class T>
inline Vector<T> load_some_features(const S* source, int64_t count, T) {
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i)
    lanes[i] = static_cast<T>(source[i]);
  return load_vector(lanes);
}
#if defined(FDK_ISA_AVX512)
inline Vector<float> load_some_features(const float* source, int64_t count, float) {
  return (Vector<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), source);
}
inline Vector<float> load_some_features(const BFloat16* source, int64_t count, float) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << count) - 1), source), BFloat16());
}
inline Vector<float> load_some_features(const Float16* source, int64_t count, float) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << count) - 1), source), Float16());
}
inline Vector<double> load_some_features(const double* source, int64_t count, double) {
  return (Vector<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1 << count) - 1), source);
}
#elif defined(FDK_ISA_AVX2)
inline Vector<float> load_some_features(const float* source, int64_t count, float) {
  static const int32_t kLanesOn[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const __m256i on = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanesOn + 8 - count));
  return (Vector<float>)_mm256_maskload_ps(source, on);
}
inline Vector<double> load_some_features(const double* source, int64_t count, double) {
  static const int64_t kLanesOn[8] = {-1, -1, -1, -1};
  const __m256i on = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanesOn + 4 - count));
  return (Vector<double>)_mm256_maskload_pd(source, on);
}
// Up to seven numbers of 16 bits, of which no load leaves any out: four, two and one, from the last to the first.
inline __m128i load_some_halves(const void* source, int64_t count) {
  const auto load = [&](int64_t first, auto bits) {
    std::memcpy(&bits, static_cast<const uint16_t*>(source) + first, sizeof(bits));
    return bits;
  };
  __m128i halves = _mm_setzero_si128();
  if (count & 1) halves = _mm_cvtsi32_si128(load(count - 1, uint16_t()));
  if (count & 2) halves = _mm_or_si128(_mm_slli_si128(halves, 4), _mm_cvtsi32_si128(load(count & 4, int32_t())));
  if (count & 4) halves = _mm_or_si128(_mm_slli_si128(halves, 8), _mm_cvtsi64_si128(load(0, int64_t())));
  return halves;
}
inline Vector<float> load_some_features(const BFloat16* source, int64_t count, float) {
  return widen(load_some_halves(source, count), BFloat16());
}
inline Vector<float> load_some_features(const Float16* source, int64_t count, float) {
  return widen(load_some_halves(source, count), Float16());
}
#endif

// Loads two adjacent vectors of features.
template <class S, class T>
inline void load_pair(const S* source, T, Vector<T>& first, Vector<T>& second) {
  first = load_features(source, T());
  second = load_features(source + kLanes<T>, T());
}
// For bfloat16 they are split into even and odd elements: a bfloat16 is the upper half of a float, so a shift and a
// mask convert the two in each 32-bit word without shuffles.
inline void load_pair(const BFloat16* source, float, Vector<float>& even, Vector<float>& odd) {
  Vector<uint32_t> bits, low, high;
  std::memcpy(&bits, source, sizeof(bits));
  low = bits << 16;
  high = bits & 0xFFFF0000u;
  std::memcpy(&even, &low, sizeof(even));
  std::memcpy(&odd, &high, sizeof(odd));
}

// Whether load_pair puts even and odd elements apart.
template <class S, class T>
constexpr bool kSplitsPairs = std::is_same<S, BFloat16>::value && std::is_same<T, float>::value;

} // namespace
} // namespace fdk::cpu
