// Work that threads share, each with memory of its own.
#pragma once

#include <atomic>
#include <new>

#include "memory.h"

namespace multilora {

// Memory that a thread keeps between calls, because fresh pages cost more than a small operator.
// Returns null where there is no memory left.
inline void* scratch(int64_t bytes) {
  thread_local Memory memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    // Give the old memory back before asking for more.
    size = 0;
    memory.reset();
    memory = allocate(bytes, 4096);
    if (memory) size = ceil_div(bytes, 4096) * 4096;
  }
  return memory.get();
}

// Calls run(task, scratch memory) for all tasks. An exception that left a parallel region would end
// the process.
template <class Run>
void share_out(int64_t tasks, int threads, int64_t bytes, Run run) {
  std::atomic<bool> starved{false};
  auto try_run = [&](int64_t task) {
    void* memory = scratch(bytes);
    if (memory) {
      run(task, memory);
    } else {
      starved = true;
    }
  };
  if (threads == 1) {
    for (int64_t task = 0; task < tasks && !starved; ++task) try_run(task);
  } else {
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) try_run(task);
  }
  if (starved) throw std::bad_alloc();
}

}  // namespace multilora
