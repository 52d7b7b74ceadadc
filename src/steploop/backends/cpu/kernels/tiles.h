// Runs work on tiles of rows, by as many threads as the caller says; which thread runs a tile changes nothing.

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel of the runtime torch uses

struct Tiles {
  void (*work)(void*, long);
  void* context;
  long count, next;
};

static void take_tiles(void* given) {
  Tiles* tiles = (Tiles*)given;
#if defined(__x86_64__)
  unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);  // denormals are zero: they cost a hundred cycles each
#endif
  for (;;) {
    long tile = __atomic_fetch_add(&tiles->next, 1, __ATOMIC_RELAXED);
    if (tile >= tiles->count) break;
    tiles->work(tiles->context, tile);
  }
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(before);
#endif
}

static void* thread_main(void* given) {
  take_tiles(given);
  return 0;
}

static void run_tiles(void (*work)(void*, long), void* context, long count, long threads, Parallel parallel) {
  Tiles tiles = {work, context, count, 0};
  if (threads > count) threads = count;
  if (threads <= 1) return take_tiles(&tiles);
  if (parallel) return parallel(take_tiles, &tiles, (unsigned)threads, 0);
  pthread_t others[64];
  long started = 0;
  if (threads > 64) threads = 64;
  for (; started < threads - 1; ++started)
    if (pthread_create(&others[started], 0, thread_main, &tiles)) break;
  take_tiles(&tiles);
  for (long t = 0; t < started; ++t) pthread_join(others[t], 0);
}
