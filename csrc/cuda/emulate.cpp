// The scheduler behind emulate.h.
#include "emulate.h"

#include <csetjmp>
#include <ucontext.h>

#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace multilora::emulate {
namespace {

constexpr size_t kStack = 256 * 1024;

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  ucontext_t start;
  jmp_buf state;
  uint3 index;
  bool started, finished;
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Slots {
  unsigned char of_lane[32][16];
};

// One launch at a time: kernels keep shared memory in static arrays.
std::mutex launching;
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* body;
std::exception_ptr error;
uint64_t progress;
std::map<uint64_t, Barrier> barriers;
std::map<uint64_t, Slots> slots;
std::map<void*, uint64_t> poisoned;
uint64_t block_number;
std::vector<unsigned char> shared_memory;

void enter() {
  try {
    (*body)();
  } catch (...) {
    if (!error) error = std::current_exception();
  }
  current->finished = true;
  ++progress;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

void run_block(dim3 block) {
  size_t count = size_t(block.x) * block.y * block.z;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < count; ++i) {
    fibers[i]->index = {unsigned(i % block.x), unsigned(i / block.x % block.y),
                        unsigned(i / block.x / block.y)};
    fibers[i]->started = fibers[i]->finished = false;
  }
  barriers.clear();
  slots.clear();
  std::fill(shared_memory.begin(), shared_memory.end(), 0xff);
  ++block_number;
  // A thread that waits may need two rounds to see that it need not any more.
  int idle_rounds = 0;
  for (size_t left = count; left > 0;) {
    uint64_t before = progress;
    left = 0;
    for (size_t i = 0; i < count; ++i) {
      if (!fibers[i]->finished) resume(*fibers[i]);
      left += !fibers[i]->finished;
      if (error) return;
    }
    idle_rounds = progress == before ? idle_rounds + 1 : 0;
    if (idle_rounds > 2) {
      throw std::runtime_error("emulation: " + std::to_string(left) + " of " +
                               std::to_string(count) + " threads wait for ever");
    }
  }
}

}  // namespace

void yield() {
  Fiber* fiber = current;
  if (!_setjmp(fiber->state)) _longjmp(scheduler, 1);
}

void progressed() { ++progress; }

void barrier(uint64_t key, int count) {
  Barrier& here = barriers[key];
  uint64_t generation = here.generation;
  ++progress;
  if (++here.arrived == count) {
    here.arrived = 0;
    ++here.generation;
    return;
  }
  while (here.generation == generation) yield();
}

void exchange(unsigned mask, void* value, size_t size, int source) {
  if (size > 16) throw std::logic_error("emulation: a shuffle of more than 16 bytes");
  if (!(mask >> lane() & 1)) throw std::logic_error("emulation: a mask without its own lane");
  // The upper bits keep it apart from the keys of other barriers.
  uint64_t key = uint64_t(1) << 63 | uint64_t(warp()) << 32 | mask;
  int count = __builtin_popcount(mask);
  Slots& mine = slots[key];
  std::memcpy(mine.of_lane[lane()], value, size);
  barrier(key, count);
  if (mask >> source & 1) std::memcpy(value, mine.of_lane[source], size);
  // Nobody gives the next value before all have read this one.
  barrier(key, count);
}

unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(shared_memory.data()) + 1023) / 1024 * 1024);
}

void fresh(void* array, size_t size) {
  uint64_t& number = poisoned[array];
  if (number == block_number) return;
  number = block_number;
  std::memset(array, 0xff, size);
}

void run(const std::function<void()>& thread, dim3 grid, dim3 block, size_t shared_bytes) {
  std::lock_guard<std::mutex> one(launching);
  body = &thread;
  error = nullptr;
  blockDim = block;
  gridDim = grid;
  shared_memory.resize(shared_bytes + 1024);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        run_block(block);
        if (error) std::rethrow_exception(error);
      }
    }
  }
}

}  // namespace multilora::emulate
