// Runs CUDA C++ on the CPU, so that kernels can be tested where there is no GPU: g++ -x c++ -I<this folder> kernels.cu.
// Stands in for the CUDA runtime as far as csrc/cuda uses it. Blocks run one after the other; the threads of a block
// are fibers that take turns at barriers and shuffles. What is undefined on a GPU makes the launch fail: a shuffle that
// a lane never reaches, a barrier at which threads wait for ever, a cached access off its alignment; and so does a block
// that waits for one that starts after it, which a GPU need not run at the same time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef _FORTIFY_SOURCE
#error "Compile with -U_FORTIFY_SOURCE: the fortified longjmp refuses to go from one stack to another."
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static // one block runs at a time; what the last one left there is the next one's garbage

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_emulation {

constexpr unsigned kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kMaxThreads = 1024;            // of a block
constexpr size_t kMaxParameterBytes = 4096;       // of a kernel
constexpr size_t kStackBytes = size_t{256} << 10; // of a fiber; pages that nobody touches cost nothing

// The threads of the running block.
class Block {
 public:
  // Runs `body` once for each thread; returns why that failed, or null.
  const char* run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    count_ = threads;
    failure_ = nullptr;
    while (fibers_.size() < threads)
      add_fiber();
    for (unsigned i = 0; i < threads; ++i)
      fibers_[i]->state = State::kReady;
    backwards_ = blockIdx.x % 2 != 0;
    do {
      run_warps();
    } while (release(0, count_, State::kAtBarrier));
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers_[i]->state != State::kDone && !failure_) {
        failure_ = "a barrier or shuffle is not reached by every thread that it needs";
      }
    }
    if (failure_) fibers_.clear(); // some of them would go on in the middle of this kernel
    return failure_;
  }

  void sync_threads() { yield(State::kAtBarrier); }

  template <typename T>
  T shuffle(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves up to 64 bits");
    if (mask != kAllLanes) fail("a shuffle among part of the lanes is not emulated");
    Fiber& fiber = *fibers_[current_];
    fiber.turn ^= 1; // other lanes may still have to read the value of the last shuffle
    const int turn = fiber.turn;
    std::memcpy(&fiber.published[turn], &value, sizeof(T));
    yield(State::kAtShuffle);
    std::memcpy(&value, &fibers_[current_ / kLanes * kLanes + source % kLanes]->published[turn], sizeof(T));
    return value;
  }

  // Makes the launch fail; the calling thread never goes on.
  void fail(const char* sentence) {
    failure_ = sentence;
    yield(State::kFailed);
  }

 private:
  enum class State { kReady, kAtBarrier, kAtShuffle, kDone, kFailed };

  struct Fiber {
    ucontext_t start;
    jmp_buf resume; // swapcontext would make a system call each time
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    State state = State::kDone;
    uint64_t published[2];
    int turn = 0;
  };

  void add_fiber() {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this); // makecontext hands on ints only
    makecontext(&fiber.start, reinterpret_cast<void (*)()>(&Block::enter), 2, static_cast<unsigned>(self),
                static_cast<unsigned>(self >> 32));
  }

  static void enter(unsigned low, unsigned high) {
    auto* self = reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | low);
    while (true) { // once for each block
      (*self->body_)();
      self->yield(State::kDone);
    }
  }

  void yield(State state) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = state;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
  }

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return; // the fiber has yielded
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  // Each warp goes as far as it can before the next one starts, in turn from the first to the last and back: a missing
  // barrier is seen if one of the two orders shows it.
  void run_warps() {
    backwards_ = !backwards_;
    const unsigned warps = (count_ + kLanes - 1) / kLanes;
    for (unsigned turn = 0; turn < warps; ++turn) {
      const unsigned first = (backwards_ ? warps - 1 - turn : turn) * kLanes;
      const unsigned end = std::min(first + kLanes, count_);
      do {
        run_lanes(first, end);
      } while (release(first, end, State::kAtShuffle));
    }
  }

  void run_lanes(unsigned first, unsigned end) {
    for (unsigned turn = first; turn < end; ++turn) {
      const unsigned i = backwards_ ? first + end - 1 - turn : turn;
      if (fibers_[i]->state != State::kReady) continue;
      current_ = i;
      threadIdx = {i, 0, 0};
      resume(*fibers_[i]);
    }
  }

  // Lets threads go on once all of them wait. A barrier does not wait for threads that are done; a shuffle does.
  bool release(unsigned first, unsigned end, State waiting) {
    bool any = false;
    for (unsigned i = first; i < end; ++i) {
      const State state = fibers_[i]->state;
      if (state == waiting) {
        any = true;
      } else if (state != State::kDone || waiting == State::kAtShuffle) {
        return false;
      }
    }
    for (unsigned i = first; i < end; ++i) {
      if (fibers_[i]->state == waiting) fibers_[i]->state = State::kReady;
    }
    return any;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
  const char* failure_ = nullptr;
  unsigned count_ = 0, current_ = 0;
  bool backwards_ = false;
};

inline Block block;
inline const char* last_failure = nullptr;
inline int order = 0; // of blocks: 0 as they are numbered, -1 backwards, else the seed of a shuffle
inline int launches = 0;

inline std::vector<unsigned> ordered_blocks(unsigned count) {
  std::vector<unsigned> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (order < 0) std::reverse(blocks.begin(), blocks.end());
  if (order > 0) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(order));
  return blocks;
}

template <typename T>
void check_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) block.fail("a vector access is off its alignment");
}

} // namespace cuda_emulation

// For the tests, which find them in the module.
extern "C" {
__attribute__((visibility("default"), used)) inline void cuda_emulation_set_order(int order) {
  cuda_emulation::order = order;
}
__attribute__((visibility("default"), used)) inline int cuda_emulation_take_launches() {
  return std::exchange(cuda_emulation::launches, 0);
}
}

inline void __threadfence() {}

// Called in a loop that waits for another block.
inline void __nanosleep(unsigned) { cuda_emulation::block.fail("a block waits for one that has not run"); }

inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }

inline void __syncthreads() { cuda_emulation::block.sync_threads(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_emulation::block.shuffle(mask, value, static_cast<unsigned>(source));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return cuda_emulation::block.shuffle(mask, value, threadIdx.x ^ static_cast<unsigned>(distance));
}

template <typename T>
T __ldcg(const T* address) {
  cuda_emulation::check_alignment(address);
  return *address;
}

template <typename T>
T __ldca(const T* address) {
  return __ldcg(address);
}

template <typename T>
void __stcs(T* address, const T& value) {
  cuda_emulation::check_alignment(address);
  *address = value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed; // has no effect: launches never overlap
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_emulation::last_failure;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= cuda_emulation::kMaxParameterBytes, "too large for a launch");
  const std::tuple<std::decay_t<Parameters>...> values(arguments...);
  const std::function<void()> body = [&] { std::apply(kernel, values); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  cuda_emulation::last_failure =
      blockDim.x <= cuda_emulation::kMaxThreads ? nullptr : "the block has more threads than a GPU allows";
  ++cuda_emulation::launches;
  for (const unsigned i : cuda_emulation::ordered_blocks(gridDim.x)) {
    if (cuda_emulation::last_failure) break;
    blockIdx = {i, 0, 0};
    cuda_emulation::last_failure = cuda_emulation::block.run(blockDim.x, body);
  }
  return cuda_emulation::last_failure ? cudaErrorLaunchFailure : cudaSuccess;
}
