#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fdk::cpu {
namespace {

// The entry points of libgomp; Intel's and LLVM's runtimes export them as well.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_number)() = nullptr;

  bool is_found() const { return parallel != nullptr && thread_number != nullptr; }
};

// Looks up the runtime that libtorch_cpu resolves to. Linking one of our own would add a second pool of threads that
// competes with torch's for the cores.
Runtime find_runtime() {
  Runtime found;
#if defined(__linux__)
  if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(torch, "GOMP_parallel"));
    found.thread_number = reinterpret_cast<decltype(found.thread_number)>(dlsym(torch, "omp_get_thread_num"));
  }
#endif
  return found;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

// Items of one thread, until another has none left and takes from them. On a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Loop {
  std::vector<Share> shares; // of the threads
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<bool> has_failed;
  std::exception_ptr failure; // the first; none may leave a thread of the runtime
};

void run_shares(Loop& loop, size_t own) {
  const size_t threads = loop.shares.size();
  try {
    for (size_t k = 0; k < threads; ++k) {
      Share& share = loop.shares[(own + k) % threads];
      for (int64_t item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        loop.body(loop.context, item);
    }
  } catch (...) {
    for (Share& share : loop.shares)
      share.next.store(share.end, std::memory_order_relaxed);
    if (!loop.has_failed.exchange(true)) loop.failure = std::current_exception();
  }
}

void run(void* loop) { run_shares(*static_cast<Loop*>(loop), static_cast<size_t>(runtime().thread_number())); }

} // namespace

void parallel_for(int64_t num_items, int num_threads, void (*body)(void*, int64_t), void* context) {
  const int64_t threads = runtime().is_found() ? std::clamp<int64_t>(num_items, 1, std::max(num_threads, 1)) : 1;
  Loop loop{std::vector<Share>(threads), body, context, {false}, nullptr};
  for (int64_t t = 0; t < threads; ++t) {
    loop.shares[t].next = num_items * t / threads;
    loop.shares[t].end = num_items * (t + 1) / threads;
  }
  if (threads > 1) {
    runtime().parallel(run, &loop, static_cast<unsigned>(threads), 0);
  } else {
    run_shares(loop, 0);
  }
  if (loop.failure) std::rethrow_exception(loop.failure);
}

const char* thread_runtime() {
  return runtime().is_found() ? "the OpenMP runtime of torch" : "one thread: torch's OpenMP runtime was not found";
}

} // namespace fdk::cpu
