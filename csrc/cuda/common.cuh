// Shared by all kernels: launches, vector accesses, and sums over lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "layout.h"

namespace fdk::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256; // of a block, in every kernel
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

inline void check(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  cudaGetLastError(); // clears the error, which the next call of other code would report again
  throw std::runtime_error(std::string(action) + " failed: " + cudaGetErrorString(status) + ".");
}

// Makes `device` current for the calling thread, and restores the previous one when it goes out of scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device == previous_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Whether this build has code for compute capability 9.0 or later; without it such a device compiles older PTX.
constexpr bool has_code_for_hopper() {
#ifdef __CUDA_ARCH_LIST__
  constexpr int archs[] = {__CUDA_ARCH_LIST__};
  for (const int arch : archs)
    if (arch >= 900) return true;
#endif
  return false;
}

// Whether the device supports early launches: the kernel starts while the previous one finishes, and must call
// `wait_for_previous_launch` before it accesses memory. CUDA graphs support them from CUDA 12.3 on.
inline bool may_launch_early(int device) {
  int major = 0, driver = 0;
  if constexpr (has_code_for_hopper()) {
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  }
  return major >= 9 && driver >= 12030;
}

__device__ inline void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Stream {
  void* handle;
  bool early; // see may_launch_early
  Stream(void* handle, bool early = false) : handle(handle), early(early) {}
};

// Launches `kernel`; does nothing if `blocks` is 0.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, const Stream& stream,
            Arguments&&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(name) + " would need " + std::to_string(blocks) +
                             " blocks, more than a launch can have; split the batch.");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = stream.early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

template <typename T>
constexpr __host__ __device__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename Acc, typename T>
__device__ Acc widen(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return static_cast<Acc>(value);
  }
}

template <typename T, typename Acc>
__device__ T narrow(Acc value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <typename To, typename From>
__device__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the bits of one are those of the other");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// kCount contiguous elements; one instruction loads or stores up to 16 bytes of them. Small elements stay packed in
// 32-bit words until they are used: unpacking them earlier would wait for the load.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  static constexpr int kPerWord = sizeof(T) < 4 && kCount > 1 ? 4 / sizeof(T) : 1;
  static constexpr int kBits = 8 * sizeof(T);
  static_assert(kCount % kPerWord == 0, "elements fill their words");
  using Word = std::conditional_t<kPerWord == 1, T, uint32_t>;
  Word words[kCount / kPerWord];

  template <typename Acc>
  __device__ Acc get(int i) const {
    if constexpr (kPerWord == 1) {
      return widen<Acc>(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) { // the upper half of a float32
      return bits_as<float>(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else {
      using Bits = std::conditional_t<kBits == 8, uint8_t, uint16_t>;
      return widen<Acc>(bits_as<T>(static_cast<Bits>(words[i / kPerWord] >> (i % kPerWord * kBits))));
    }
  }

  template <typename Acc>
  __device__ void set(int i, Acc value) {
    if constexpr (kPerWord == 1) {
      words[i] = narrow<T>(value);
    } else {
      static_assert(kPerWord == 2, "only elements of 16 bits are written in packs");
      const uint32_t bits = bits_as<uint16_t>(narrow<T>(value));
      words[i / 2] = i % 2 ? (words[i / 2] & 0xffffu) | bits << 16 : (words[i / 2] & 0xffff0000u) | bits;
    }
  }
};

template <typename T>
constexpr int kVector = 16 / sizeof(T); // elements of a 16-byte access

// Loads features, past the L1 cache: a block reads them once, and the cache is left to the weights.
template <int kCount, typename T>
__device__ Pack<T, kCount> load(const T* address) {
  if constexpr (sizeof(T) * kCount == 16) {
    return bits_as<Pack<T, kCount>>(__ldcg(reinterpret_cast<const uint4*>(address)));
  } else {
    return *reinterpret_cast<const Pack<T, kCount>*>(address);
  }
}

// Loads elements that are `stride` apart unless `adjacent`.
template <int kCount, typename T>
__device__ Pack<T, kCount> load(const T* address, int64_t stride, bool adjacent) {
  if constexpr (kCount > 1) {
    if (!adjacent) {
      Pack<T, kCount> pack = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        pack.set(i, widen<float>(address[i * stride]));
      return pack;
    }
  }
  return load<kCount>(address);
}

// Streaming store: not read again here, so it may be evicted first.
template <typename T, int kCount>
__device__ void store(T* address, const Pack<T, kCount>& pack) {
  if constexpr (sizeof(T) * kCount == 16) {
    __stcs(reinterpret_cast<uint4*>(address), bits_as<uint4>(pack));
  } else {
    *reinterpret_cast<Pack<T, kCount>*>(address) = pack;
  }
}

// Sums each of kCount values over the warp; lane l returns the sum of value l / (kWarp / kCount). As long as a lane
// holds several values, it exchanges half of them.
template <int kCount, typename T>
__device__ T warp_sums(T (&values)[kCount]) {
  static_assert((kCount & (kCount - 1)) == 0 && kCount <= kWarp, "kCount is a power of two");
  const int lane = threadIdx.x % kWarp;
  int distance = kWarp / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T kept = upper ? values[i + half] : values[i];
      const T given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
  }
  for (; distance > 0; distance /= 2) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], distance);
  }
  return values[0];
}

// Sums over groups of `lanes` adjacent lanes, a power of two; every lane returns the sum.
template <typename T>
__device__ T lane_sum(T value, int lanes = kWarp) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

} // namespace fdk::cuda
