// Runs loops on the threads of the OpenMP runtime that torch has loaded.
#pragma once

#include <cstdint>

namespace fdk::cpu {

// Runs body(context, item) once for every item in [0, num_items), on at most num_threads threads.
// Each thread begins with items in a row, so that it reads memory in order, and then takes those that others have left.
// What a body throws ends the loop, and is thrown here.
void parallel_for(int64_t num_items, int num_threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int64_t num_items, int num_threads, const Body& body) {
  auto call = [](void* context, int64_t item) { (*static_cast<const Body*>(context))(item); };
  parallel_for(num_items, num_threads, call, const_cast<Body*>(&body));
}

// Names the runtime, or says why there is only one thread.
const char* thread_runtime();

} // namespace fdk::cpu
