#include "parallel.h"

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fdk::cpu {
namespace {

// The entry point of libgomp, which Intel's and LLVM's runtimes offer as well.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// A runtime of our own would be a second pool of threads beside torch's, and both would fight for the cores. So
// nothing is linked: the runtime is the one that libtorch_cpu itself resolves to.
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

struct Work {
  std::atomic<int64_t> next;
  int64_t num_items;
  void (*body)(void*, int64_t);
  void* context;
};

void run(void* data) {
  Work& work = *static_cast<Work*>(data);
  for (int64_t item; (item = work.next.fetch_add(1, std::memory_order_relaxed)) < work.num_items;) {
    work.body(work.context, item);
  }
}

} // namespace

void parallel_for(int64_t num_items, int num_threads, void (*body)(void*, int64_t), void* context) {
  Work work{{0}, num_items, body, context};
  const int64_t threads = std::min<int64_t>(num_threads, num_items);
  if (threads > 1 && gomp_parallel() != nullptr) {
    gomp_parallel()(run, &work, static_cast<unsigned>(threads), 0);
  } else {
    run(&work);
  }
}

const char* thread_runtime() {
  return gomp_parallel() != nullptr ? "the OpenMP runtime of torch"
                                    : "one thread: torch's OpenMP runtime was not found";
}

} // namespace fdk::cpu
