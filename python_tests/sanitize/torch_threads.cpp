// Stands in for libtorch_cpu.so, where csrc/cpu/parallel.cpp looks for the OpenMP runtime: torch's own is not
// instrumented, so that ThreadSanitizer would not know when its threads begin and end.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0; // of the thread within its team
}

extern "C" {

__attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads,
                                                          unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < num_threads; ++i) {
    others.emplace_back([=] {
      number = static_cast<int>(i);
      body(data);
    });
  }
  body(data);
  for (std::thread& thread : others)
    thread.join();
}

__attribute__((visibility("default"))) int omp_get_thread_num() { return number; }

} // extern "C"
