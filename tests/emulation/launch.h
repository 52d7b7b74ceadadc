// Launches a kernel on the emulated GPU of machine.h.

#ifdef THREADS
struct Begin {
  Device* device;
  Fiber* fiber;
};
static void* run_thread(void* given) {
  Begin* const begin = (Begin*)given;
  device = begin->device, here = begin->fiber;
  device->work(device->given);
  return 0;
}
static void run_all(Device& d) {
  pthread_t threads[MOST];
  Begin begins[MOST];
  for (long t = 0; t < d.blocks * d.threads; ++t) {
    begins[t] = {&d, &d.fibers[t]};
    if (pthread_create(&threads[t], 0, run_thread, &begins[t])) abort();
  }
  for (long t = 0; t < d.blocks * d.threads; ++t) pthread_join(threads[t], 0);
}
#else
constexpr long STACK = 1 << 17;
static void run_fiber() {
  device->work(device->given);
  here->done = true;
  for (long t = 0; t < device->blocks * device->threads; ++t)
    if (!device->fibers[t].done) yield();
  setcontext(&device->home);
}
static void run_all(Device& d) {
  const long all = d.blocks * d.threads;
  char* const stacks = (char*)malloc(all * STACK);
  for (long t = 0; t < all; ++t) {
    ucontext_t& context = d.fibers[t].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + t * STACK, context.uc_stack.ss_size = STACK, context.uc_link = 0;
    makecontext(&context, run_fiber, 0);
  }
  device = &d, here = &d.fibers[0];
  swapcontext(&d.home, &here->context);
  free(stacks);
}
#endif

struct Launch {
  Given given;
  char* memory;
  long bytes;
  Barrier* barrier;
  long together, near_bytes;
};
static void run_launch(void* given) {
  const Launch& l = *(const Launch*)given;
  run_call(l.given, l.memory, l.bytes, l.barrier, l.together, l.near_bytes);
}

extern "C" void steploop_run(const i64* words, char* memory, i64 bytes, Barrier* barrier, i64 together, i64 near_bytes, i64 blocks, i64 warps) {
  Launch launch = {{}, memory, bytes, barrier, together, near_bytes};
  memcpy(launch.given.words, words, sizeof launch.given);
  Device* const d = (Device*)calloc(1, sizeof(Device));
  d->blocks = blocks, d->threads = warps * WARP, d->work = run_launch, d->given = &launch, d->order = 1;
  for (long t = 0; t < blocks * d->threads; ++t) d->fibers[t].thread = t % d->threads, d->fibers[t].block = t / d->threads;
  for (long w = 0; w < blocks * warps; ++w) d->warps[w].begin(WARP);
  for (long b = 0; b < blocks; ++b) d->together[b].begin(d->threads), d->memories[b] = (char*)malloc(near_bytes + 16);
  run_all(*d);
  for (long b = 0; b < blocks; ++b) d->together[b].end(), free(d->memories[b]);
  for (long w = 0; w < blocks * warps; ++w) d->warps[w].end();
  free(d);
}
