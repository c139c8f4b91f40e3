// Runs CUDA kernels on the CPU: one fiber a CUDA thread, the blocks one after another.
//
// A warp runs until all its threads wait or have returned, then the next warp does. Threads run in
// ascending order, or in descending order with SAT_EMULATION_ORDER=reversed: a read that needs a
// missing barrier sees the write of a thread in one order and not in the other. Dynamic shared
// memory is filled with NaN before every block, and is exactly as large as the launch asked for.
//
// Under ThreadSanitizer every CUDA thread is a thread of its own to the sanitizer: a switch orders
// nothing, only barriers do. Under AddressSanitizer the stacks of the fibers are announced to it.
//
// SAT_EMULATION_SKIP=FILE:LINE leaves out the barrier on that line of the source, for tests.
//
// Fibers switch by a few lines of x86-64 assembly; elsewhere, or with -DSAT_EMULATION_UCONTEXT, by
// ucontext, which is ten times slower.
//
// Of inline PTX there are the two instructions of tensor cores that our kernels use. Not emulated:
// more than one block at a time, shuffles of a part of a warp, textures.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__x86_64__) && !defined(SAT_EMULATION_UCONTEXT)
#define EMULATION_ASSEMBLY 1
#else
#define EMULATION_ASSEMBLY 0
#include <ucontext.h>
#endif

// The scheduler: what it does to its own tables is no business of the sanitizers.
#define EMULATION_INTERNAL __attribute__((no_sanitize("thread", "address")))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024;
constexpr size_t kPage = 1 << 16;  // a multiple of the page size of every machine
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 8 * kPage;
#else
constexpr size_t kStackBytes = kPage;
#endif

// ---- Stack switches -----------------------------------------------------------------------------

#if EMULATION_ASSEMBLY

struct Context {
  void *stack_pointer = nullptr;
};

// Saves what a callee must keep and its stack pointer, takes those of another context.
__attribute__((naked, noinline)) inline void switch_stack(void **, void *) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tretq");
}

EMULATION_INTERNAL inline void switch_context(Context &from, Context &to) {
  switch_stack(&from.stack_pointer, to.stack_pointer);
}

EMULATION_INTERNAL inline void prepare(Context &context, char *stack, void (*entry)()) {
  // Six registers, the address that switch_stack returns to, and the one that `entry` never uses.
  void **top = reinterpret_cast<void **>(stack + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void *>(entry);
  context.stack_pointer = top;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_context(Context &from, Context &to) { swapcontext(&from.state, &to.state); }

inline void prepare(Context &context, char *stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStackBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

// ---- The threads of a block ---------------------------------------------------------------------

enum Wait { kRuns, kAtWarpBarrier, kAtBlockBarrier, kReturned };

struct Thread {
  Context context;
  Wait wait = kReturned;
  uint3 index = {};
  char *stack = nullptr;
  void *fake_stack = nullptr;  // AddressSanitizer's
  void *fiber = nullptr;       // ThreadSanitizer's
  unsigned warp_waits = 0, block_waits = 0;
  uint32_t exchanged[2] = {};    // what the thread hands over in a shuffle, by turns
  uint32_t operands[2][6] = {};  // and to tensor cores
};

inline Thread threads[kMaxThreads];
inline unsigned num_threads, running;
inline const char *skipped = "";  // FILE:LINE
inline Context scheduler;
inline void *scheduler_fiber, *scheduler_fake_stack;
inline const void *scheduler_stack;
inline size_t scheduler_stack_bytes;
inline void (*body)(const void *);
inline const void *body_arguments;
inline char *shared_memory;
// ThreadSanitizer's clocks. Barriers use two by turns: a thread that leaves one barrier must not
// learn of what another thread did on its way to the next.
inline char block_clocks[2], warp_clocks[kMaxThreads / kWarpSize][2], start_clock, end_clock;

[[noreturn]] inline void fail(const char *message) {
  std::fprintf(stderr, "CUDA emulation: %s\n", message);
  std::abort();
}

EMULATION_INTERNAL inline void release(char *clock) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(clock);
#else
  (void)clock;
#endif
}

EMULATION_INTERNAL inline void acquire(char *clock) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(clock);
#else
  (void)clock;
#endif
}

EMULATION_INTERNAL inline void resume(unsigned number) {
  Thread &thread = threads[number];
  running = number;
  threadIdx = thread.index;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(thread.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStackBytes);
#endif
  switch_context(scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Back to the scheduler, until it resumes this thread.
EMULATION_INTERNAL inline void suspend(Wait wait) {
  Thread &thread = threads[running];
  thread.wait = wait;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(wait == kReturned ? nullptr : &thread.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  switch_context(thread.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
#endif
}

EMULATION_INTERNAL inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  acquire(&start_clock);
  body(body_arguments);
  release(&end_clock);
  suspend(kReturned);
}

// Whether the barrier at a place of the source is left out.
inline bool is_skipped(const char *file, int line) {
  if (!*skipped) return false;
  char place[256];
  const char *name = std::strrchr(file, '/');
  std::snprintf(place, sizeof(place), "%s:%d", name ? name + 1 : file, line);
  return std::strcmp(place, skipped) == 0;
}

EMULATION_INTERNAL inline void wait_for_block() {
  char *clock = &block_clocks[threads[running].block_waits++ % 2];
  release(clock);
  suspend(kAtBlockBarrier);
  acquire(clock);
}

// Waits for the other threads of the warp. A shuffle orders no memory accesses, __syncwarp does.
EMULATION_INTERNAL inline void wait_for_warp(unsigned mask, bool orders_memory) {
  if (mask != 0xffffffffu) fail("a warp operation of a part of a warp is not emulated");
  char *clock = &warp_clocks[running / kWarpSize][threads[running].warp_waits++ % 2];
  if (orders_memory) release(clock);
  suspend(kAtWarpBarrier);
  if (orders_memory) acquire(clock);
}

// The value that lane `lane` of the warp handed over. Values alternate between two places: nobody
// overwrites one before all have read it, as all have met once more by then.
EMULATION_INTERNAL inline uint32_t exchange(unsigned mask, uint32_t value, unsigned lane) {
  const unsigned turn = threads[running].warp_waits % 2;
  threads[running].exchanged[turn] = value;
  wait_for_warp(mask, false);
  const unsigned source = running / kWarpSize * kWarpSize + lane;
  if (source >= num_threads) fail("a shuffle reads a lane that the block does not have");
  return threads[source].exchanged[turn];
}

// ---- Tensor cores -------------------------------------------------------------------------------

// cvt.rna.tf32.f32: the nearest number of 10 bits after the leading one, ties away from 0.
inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;  // NaN
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

EMULATION_INTERNAL inline float operand(unsigned lane, unsigned turn, int number) {
  const uint32_t bits = threads[running / kWarpSize * kWarpSize + lane].operands[turn][number];
  if (bits & 0x1fffu && bits != 0x7fffffffu) fail("an operand of tensor cores is not in TF32");
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 of the calling warp; the places of the elements
// are those of csrc/cuda/tiles.hpp. Turns as in `exchange`.
EMULATION_INTERNAL inline void multiply_add_tf32(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                 float (&sum)[4]) {
  if (num_threads % kWarpSize) fail("tensor cores need whole warps");
  const unsigned turn = threads[running].warp_waits % 2;
  std::memcpy(threads[running].operands[turn], a, sizeof(a));
  std::memcpy(threads[running].operands[turn] + 4, b, sizeof(b));
  wait_for_warp(0xffffffffu, false);
  const unsigned lane = running % kWarpSize, g = lane / 4, t = lane % 4;
  for (unsigned e = 0; e < 4; ++e)
    for (unsigned k = 0; k < 8; ++k)
      sum[e] += operand(g * 4 + k % 4, turn, e / 2 + k / 4 * 2) *
                operand((t * 2 + e % 2) * 4 + k % 4, turn, 4 + k / 4);
}

// ---- The scheduler ------------------------------------------------------------------------------

// Lets threads [first, last) run if all of them that have not returned wait at `barrier`.
EMULATION_INTERNAL inline bool let_pass(unsigned first, unsigned last, Wait barrier) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    if (threads[i].wait != barrier && threads[i].wait != kReturned) return false;
    any |= threads[i].wait == barrier;
  }
  for (unsigned i = first; i < last; ++i)
    if (threads[i].wait == barrier) threads[i].wait = kRuns;
  return any;
}

// Runs a warp until every thread of it waits for other warps or has returned; true if any ran.
EMULATION_INTERNAL inline bool run_warp(unsigned first, unsigned last, bool reversed) {
  bool ran = false;
  do {
    for (unsigned i = 0; i < last - first; ++i) {
      const unsigned number = reversed ? last - 1 - i : first + i;
      if (threads[number].wait != kRuns) continue;
      ran = true;
      resume(number);
    }
  } while (let_pass(first, last, kAtWarpBarrier));
  return ran;
}

EMULATION_INTERNAL inline bool all_returned() {
  for (unsigned i = 0; i < num_threads; ++i)
    if (threads[i].wait != kReturned) return false;
  return true;
}

EMULATION_INTERNAL inline void run_block(bool reversed) {
  for (unsigned i = 0; i < num_threads; ++i) {
    prepare(threads[i].context, threads[i].stack, entry);
    threads[i].wait = kRuns;
    threads[i].warp_waits = threads[i].block_waits = 0;
  }
  release(&start_clock);
  const unsigned num_warps = (num_threads + kWarpSize - 1) / kWarpSize;
  do {
    bool ran = false;
    for (unsigned i = 0; i < num_warps; ++i) {
      const unsigned first = (reversed ? num_warps - 1 - i : i) * kWarpSize;
      const unsigned last = first + kWarpSize < num_threads ? first + kWarpSize : num_threads;
      ran |= run_warp(first, last, reversed);
    }
    if (!ran) fail("deadlock: some threads wait at a barrier that others never reach");
    let_pass(0, num_threads, kAtBlockBarrier);
  } while (!all_returned());
  acquire(&end_clock);
}

// Stacks with a page without access below each, made once and kept.
inline void make_stacks(unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    if (threads[i].stack) continue;
    void *memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) fail("no memory for stacks");
    threads[i].stack = static_cast<char *>(memory) + kPage;
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*function)(const void *),
                   const void *arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const char *order = std::getenv("SAT_EMULATION_ORDER");
  const char *skip = std::getenv("SAT_EMULATION_SKIP");
  skipped = skip ? skip : "";
  const bool reversed = order && std::strcmp(order, "reversed") == 0;
  gridDim = grid;
  blockDim = block;
  body = function;
  body_arguments = arguments;
  num_threads = block.x * block.y * block.z;
  make_stacks(num_threads);
  for (unsigned i = 0; i < num_threads; ++i)
    threads[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
#if defined(__SANITIZE_THREAD__)
  scheduler_fiber = __tsan_get_current_fiber();
  for (unsigned i = 0; i < num_threads; ++i)
    if (!threads[i].fiber) threads[i].fiber = __tsan_create_fiber(0);
#endif
  shared_memory = static_cast<char *>(std::malloc(shared_bytes));
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        std::memset(shared_memory, 0xff, shared_bytes);
        run_block(reversed);
      }
  std::free(shared_memory);
}

}  // namespace emulation
