// Vectors of the instruction set for which this translation unit is compiled.
#pragma once

#include <cstdint>
#include <cstring>

#include "../half.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fdk::cpu {
namespace {

#if defined(FDK_ISA_AVX512)
constexpr int64_t kVectorBytes = 64;
#elif defined(FDK_ISA_AVX2)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
constexpr int64_t kCacheLine = 64;
// Prefetch distances: for each of the few streams along pixels, and for the one stream of channels_last.
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kPrefetchBytesByChannels = 4096;

#if defined(__GNUC__)
template <class T, int64_t kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <class T>
using Vector = typename VectorOf<T, kVectorBytes / static_cast<int64_t>(sizeof(T))>::type;
inline void prefetch(const void* address) { __builtin_prefetch(address); }
#define FDK_NOINLINE __attribute__((noinline))
#else
template <class T>
using Vector = T; // one lane, which makes the loops scalar
inline void prefetch(const void*) {}
#define FDK_NOINLINE
#endif

template <class T>
constexpr int64_t kLanes = static_cast<int64_t>(sizeof(Vector<T>) / sizeof(T));

template <class T>
inline Vector<T> load_vector(const T* source) {
  Vector<T> value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

// Loads a vector of weights as T, from T or from the uint8 of a binary mask. A byte beyond 1, which stands for NaN,
// stays a number here: the second pass of the sums sees it in the mass and makes every sum of its sample NaN.
inline Vector<float> load_weights(const float* source, float) { return load_vector(source); }
inline Vector<double> load_weights(const double* source, double) { return load_vector(source); }
template <class T>
inline Vector<T> load_weights(const uint8_t* source, T) {
  T lanes[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i)
    lanes[i] = static_cast<T>(source[i]);
  return load_vector(lanes);
}
// A binary mask with float features is the common case, and compilers vectorise its conversion poorly.
#if defined(FDK_ISA_AVX512)
inline Vector<float> load_weights(const uint8_t* source, float) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  // Zero-masked with every lane on: GCC 12 warns of the undefined value in the unmasked forms.
  constexpr __mmask16 kAll = 0xFFFF;
  return (Vector<float>)_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes));
}
#elif defined(FDK_ISA_AVX2)
inline Vector<float> load_weights(const uint8_t* source, float) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
  return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
#endif

template <class T>
inline void store_vector(T* out, Vector<T> value) {
  std::memcpy(out, &value, sizeof(value));
}

// Adds up the lanes, the upper half onto the lower one.
template <class T>
inline T total(Vector<T> value) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &value, sizeof(value));
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i)
      lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
// Adds up the lanes of each of kCount vectors, onto doubles.
template <int kCount, class T>
inline void add_totals(const Vector<T> (&values)[kCount], double* sums) {
  for (int k = 0; k < kCount; ++k)
    sums[k] += static_cast<double>(total<T>(values[k]));
}

// Compilers send the general forms through memory.
#if defined(FDK_ISA_AVX512)
inline __m256 halves_added(Vector<float> value) {
  const __m512 whole = (__m512)value;
  constexpr __mmask8 kAll = 0xFF; // as in load_weights
  return _mm256_add_ps(_mm512_maskz_extractf32x8_ps(kAll, whole, 0), _mm512_maskz_extractf32x8_ps(kAll, whole, 1));
}
#elif defined(FDK_ISA_AVX2)
inline __m256 halves_added(Vector<float> value) { return (__m256)value; } // one half is all there is
#endif
#if defined(FDK_ISA_AVX512) || defined(FDK_ISA_AVX2)
template <>
inline float total<float>(Vector<float> value) {
  const __m256 half = halves_added(value);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
// Four vectors at once: their lanes are added side by side.
template <>
inline void add_totals<4, float>(const Vector<float> (&values)[4], double* sums) {
  const __m256 pairs = _mm256_hadd_ps(halves_added(values[0]), halves_added(values[1]));
  const __m256 others = _mm256_hadd_ps(halves_added(values[2]), halves_added(values[3]));
  const __m256 both = _mm256_hadd_ps(pairs, others);
  const __m128 totals = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(totals)));
}
#endif

} // namespace
} // namespace fdk::cpu
