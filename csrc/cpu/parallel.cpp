#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fdk::cpu {
namespace {

// The entry point of libgomp; Intel's and LLVM's runtimes export it as well.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Looks up the runtime that libtorch_cpu resolves to. Linking one of our own would add a second pool of threads that
// competes with torch's for the cores.
GompParallel find_gomp_parallel() {
#if defined(__linux__)
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return nullptr;
  return reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

GompParallel gomp_parallel() {
  static const GompParallel found = find_gomp_parallel();
  return found;
}

struct Loop {
  std::atomic<int64_t> next;
  int64_t num_items;
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<bool> has_failed;
  std::exception_ptr failure; // the first; none may leave a thread of the runtime
};

void run(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  try {
    for (int64_t item; (item = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.num_items;)
      loop.body(loop.context, item);
  } catch (...) {
    loop.next.store(loop.num_items, std::memory_order_relaxed);
    if (!loop.has_failed.exchange(true)) loop.failure = std::current_exception();
  }
}

} // namespace

void parallel_for(int64_t num_items, int num_threads, void (*body)(void*, int64_t), void* context) {
  Loop loop{{0}, num_items, body, context, {false}, nullptr};
  const int64_t threads = std::min<int64_t>(num_threads, num_items);
  if (threads > 1 && gomp_parallel() != nullptr) {
    gomp_parallel()(run, &loop, static_cast<unsigned>(threads), 0);
  } else {
    run(&loop);
  }
  if (loop.failure) std::rethrow_exception(loop.failure);
}

const char* thread_runtime() {
  return gomp_parallel() != nullptr ? "the OpenMP runtime of torch"
                                    : "one thread: torch's OpenMP runtime was not found";
}

} // namespace fdk::cpu
