// Runs work on tiles of rows. Either every tile has a thread of its own, or a team of threads goes through the tiles
// together, sharing the columns of products and the rows of the rest: for few rows, or weights that are larger than
// the cache of one core. Neither changes a bit of the results.

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel of the runtime torch uses

INLINE void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits until ready() is true: at first without leaving the core, then letting others run.
template <class F> INLINE void spin(F ready) {
  for (long i = 0; !ready(); ++i) i < 4096 ? relax() : (void)sched_yield();
}

struct Barrier {
  alignas(64) long count = 0;
  alignas(64) long phase = 0;

  void wait(long size) {
    long now = __atomic_load_n(&phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&count, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&count, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
    } else {
      spin([&] { return __atomic_load_n(&phase, __ATOMIC_ACQUIRE) != now; });
    }
  }
};

// One of `size` threads that work on a tile together; `memory` is theirs (null: the tile takes its own).
struct Member {
  long me, size;
  Barrier* barrier;
  char* memory;

  void wait() const {
    if (size > 1) barrier->wait(size);
  }
  // Memory for the temporaries of a tile.
  char* take(long bytes) const { return memory ? memory : (char*)aligned_alloc(64, bytes); }
  void give_back(char* taken) const {
    if (!memory) free(taken);
  }
  long share(long n, long of = 0) const { return n * (me + of) / size; }  // where its part of n begins
};

// A step: its number, the rows of a tile that run, and the first of them among all packed rows and among those here.
struct Where {
  long p, n, at, here;
};

INLINE void nearer(const void* from, long bytes) {
  for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

typedef void (*Work)(void*, long, const Member&);

// Whether denormal numbers count as zero is the caller's choice (torch.set_flush_denormal), and a setting of each thread:
// all that work on a call take the caller's, and put back their own.
#if defined(__x86_64__)
typedef unsigned FloatBits;
constexpr FloatBits kFlush = 0x8040;  // results, and what is read
INLINE FloatBits float_bits() { return __builtin_ia32_stmxcsr(); }
INLINE void set_float_bits(FloatBits bits) { __builtin_ia32_ldmxcsr(bits); }
#elif defined(__aarch64__)
typedef uint64_t FloatBits;
constexpr FloatBits kFlush = 1 << 24;
INLINE FloatBits float_bits() {
  FloatBits bits;
  __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
INLINE void set_float_bits(FloatBits bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits)); }
#else
typedef unsigned FloatBits;
constexpr FloatBits kFlush = 0;
INLINE FloatBits float_bits() { return 0; }
INLINE void set_float_bits(FloatBits) {}
#endif

struct Denormals {
  const FloatBits before = float_bits();
  const bool other;
  explicit Denormals(FloatBits callers) : other((before ^ callers) & kFlush) {
    if (other) set_float_bits((before & ~kFlush) | (callers & kFlush));
  }
  ~Denormals() {
    if (other) set_float_bits((float_bits() & ~kFlush) | (before & kFlush));
  }
};

struct Tiles {
  Work work;
  void* context;
  long count, next;
  char* memory;       // of a team
  FloatBits mode;     // of the caller
  long wanted, came, size;
  Barrier barrier;
};

static void take_tiles(void* given) {
  Tiles* tiles = (Tiles*)given;
  Denormals mode(tiles->mode);
  for (;;) {
    long tile = __atomic_fetch_add(&tiles->next, 1, __ATOMIC_RELAXED);
    if (tile >= tiles->count) break;
    tiles->work(tiles->context, tile, Member{0, 1, 0, 0});
  }
}

// The team is whoever came in time: a runtime may give fewer threads than were asked for, or wake one up late.
static void join_team(void* given) {
  Tiles* tiles = (Tiles*)given;
  const long closed = 1 << 30;
  long me = __atomic_fetch_add(&tiles->came, 1, __ATOMIC_ACQ_REL);
  if (me >= closed) return;
  if (me == 0) {
    for (long i = 0; i < 20000 && __atomic_load_n(&tiles->came, __ATOMIC_ACQUIRE) < tiles->wanted; ++i) relax();
    long size = __atomic_exchange_n(&tiles->came, closed, __ATOMIC_ACQ_REL);
    __atomic_store_n(&tiles->size, size, __ATOMIC_RELEASE);
  } else {
    spin([&] { return __atomic_load_n(&tiles->size, __ATOMIC_ACQUIRE) != 0; });
  }
  Denormals mode(tiles->mode);
  const Member member = {me, tiles->size, &tiles->barrier, tiles->memory};
  for (long tile = 0; tile < tiles->count; ++tile) tiles->work(tiles->context, tile, member);
}

struct Start {
  void (*go)(void*);
  void* tiles;
};

static void* thread_main(void* given) {
  Start* start = (Start*)given;
  start->go(start->tiles);
  return 0;
}

// memory: for a team of `threads`, or null for one thread to each tile.
static void run_tiles(Work work, void* context, long count, long threads, char* memory, Parallel parallel) {
  Tiles tiles = {work, context, count, 0, memory, float_bits(), threads, 0, 0, {}};
  if (!memory && threads > count) threads = count;
  if (threads > 64) tiles.wanted = threads = 64;
  if (threads <= 1) return take_tiles(&tiles);
  Start start = {memory ? join_team : take_tiles, &tiles};
  if (parallel) return parallel(start.go, &tiles, (unsigned)threads, 0);
  pthread_t others[64];
  long started = 0;
  for (; started < threads - 1; ++started)
    if (pthread_create(&others[started], 0, thread_main, &start)) break;
  start.go(&tiles);
  for (long t = 0; t < started; ++t) pthread_join(others[t], 0);
}
