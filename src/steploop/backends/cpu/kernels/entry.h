// Runs a loop for one call, all tiles of it.

extern "C" __attribute__((visibility("default"))) void steploop_run(void** pointers, const i64* numbers, Parallel parallel) {
  Call call;
  call.take(pointers, numbers);
  call.each_weight([&](auto& weight, bool early) {
    // One row at a time reads a weight once, best as it is where its columns are contiguous.
    const bool as_it_is = !early && call.batch == 1 && weight.down == 1;
    weight.prepare(call.pack && !as_it_is, call.threads, parallel);
  });
  const long tiles = (call.batch + call.tile_rows - 1) / call.tile_rows;
  const Scratch scratch(call, call.tile_rows, call.threads);
  char* const memory = call.team ? (char*)aligned_alloc(64, scratch.bytes) : 0;
  run_tiles(run_tile, &call, tiles, call.threads, memory, parallel);
  free(memory);
  call.each_weight([](auto& weight, bool) { free(weight.packed); });
}
