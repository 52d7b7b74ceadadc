// A GPU made of a CPU, for kernels/machine.h of the backend "cuda": every lane is a fiber that runs until it has to wait,
// or, with -DTHREADS, a thread of the system, so that a checker of races sees it.
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
typedef uint8_t u8;
typedef int64_t i64;

#define INLINE static inline
#define INLINE_MEMBER inline
#define ALWAYS
#define APART

#ifndef LANES
#define LANES 4
#endif
constexpr int WARP = LANES, MOST = 128;  // lanes of a warp; threads of all blocks

struct Fiber {
  ucontext_t context;
  long thread, block;
  long met_lanes, met_block;  // how often
  bool done;
};

#ifdef THREADS
// Two barriers in turn: for the checker a thread that leaves one late knows what those did that have come to it again.
struct Meeting {
  pthread_barrier_t barriers[2];
  void begin(long size) {
    for (auto& b : barriers) pthread_barrier_init(&b, 0, size);
  }
  void end() {
    for (auto& b : barriers) pthread_barrier_destroy(&b);
  }
};
static void meet(Meeting& m, long& met) { pthread_barrier_wait(&m.barriers[met++ % 2]); }
#else
struct Meeting {
  long size, here, phase;
  void begin(long all) { size = all, here = phase = 0; }
  void end() {}
};
#endif

struct Device {
  long blocks, threads;  // of a block
  Fiber fibers[MOST];
  Meeting warps[MOST], together[MOST];
  double slots[MOST];
  unsigned parts[MOST][6];  // of products on tensor cores: a, then b
  char* memories[MOST];  // of the blocks
  void (*work)(void*);
  void* given;
  ucontext_t home;
  unsigned order;
};
static thread_local Device* device;
static thread_local Fiber* here;

#ifndef THREADS
// Another fiber goes on, drawn by chance: what is right only in one order does not stay so.
static void yield() {
  const long all = device->blocks * device->threads;
  Fiber* const from = here;
  device->order = device->order * 1664525u + 1013904223u;
  long next = (device->order >> 8) % all;
  while (device->fibers[next].done) next = (next + 1) % all;
  here = &device->fibers[next];
  if (here != from) swapcontext(&from->context, &here->context);
}
static void meet(Meeting& m, long&) {
  const long now = m.phase;
  if (++m.here == m.size) m.here = 0, ++m.phase;
  else while (m.phase == now) yield();
}
#else
static void yield() { sched_yield(); }
#endif

INLINE long thread_of_block() { return here->thread; }
INLINE long threads_of_block() { return device->threads; }
INLINE long number_of_block() { return here->block; }
INLINE long number_of_blocks() { return device->blocks; }
INLINE int lane() { return here->thread % WARP; }
INLINE long number_of_thread() { return here->block * device->threads + here->thread; }
INLINE void meet_lanes() { meet(device->warps[number_of_thread() / WARP], here->met_lanes); }
INLINE void meet_block() { meet(device->together[here->block], here->met_block); }
INLINE char* block_memory() { return device->memories[here->block]; }
template <class T> INLINE T from_lane(T x, int other) {
  const long me = number_of_thread();
  memcpy(&device->slots[me], &x, sizeof x);
  meet_lanes();
  T y;
  memcpy(&y, &device->slots[me / WARP * WARP + other], sizeof y);
  meet_lanes();
  return y;
}
INLINE unsigned arrive(unsigned* p) { return __atomic_fetch_add(p, 1u, __ATOMIC_ACQ_REL); }
INLINE void publish(unsigned* p, unsigned x) { __atomic_store_n(p, x, __ATOMIC_RELEASE); }
INLINE unsigned look(unsigned* p) {
  yield();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
INLINE unsigned bits_of(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
INLINE float from_bits(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
INLINE unsigned short bits_of_f16(float x) {
  const _Float16 half = (_Float16)x;
  unsigned short bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}
INLINE float from_f16(unsigned short bits) {
  _Float16 half;
  memcpy(&half, &bits, sizeof half);
  return half;
}
INLINE float of_half(unsigned part, int number, bool brain) {
  const unsigned short bits = part >> 16 * number;
  return brain ? from_bits((unsigned)bits << 16) : from_f16(bits);
}
// As PTX has mma.m16n8k16: which lane holds which part.
template <bool BF16> INLINE void multiply_add(float* d, const unsigned* a, const unsigned* b) {
  const long me = number_of_thread(), warp = me / WARP * WARP;
  for (int i = 0; i < 6; ++i) device->parts[me][i] = i < 4 ? a[i] : b[i - 4];
  meet_lanes();
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned* left = device->parts[warp + row % 8 * 4 + k % 8 / 2];
      const unsigned* right = device->parts[warp + column * 4 + k % 8 / 2];
      d[i] += of_half(left[row / 8 + k / 8 * 2], k % 2, BF16) * of_half(right[4 + k / 8], k % 2, BF16);
    }
  }
  meet_lanes();
}
INLINE void note(i64* p, i64 x) { __atomic_store_n(p, x, __ATOMIC_RELAXED); }
