// Runs a loop for one call. together: all blocks are one team, which takes one tile after the other; else every block is a
// team of its own and takes every so many-th tile. bytes: the temporaries of a team. near_bytes: the block's own memory.

struct Given {
  i64 words[Call::kPointers + Call::kNumbers];
};

static INLINE_MEMBER void run_call(const Given& given, char* memory, long bytes, Barrier* barrier, long together, long near_bytes) {
  Call call;
  call.take((void* const*)given.words, given.words + Call::kPointers);
  const long warps = threads_of_block() / WARP, warp = thread_of_block() / WARP;
  const long block = number_of_block(), blocks = number_of_blocks();
  const Member team = together ? Member{block * warps + warp, blocks * warps, blocks, barrier, memory}
                               : Member{warp, warps, 1, 0, memory + block * bytes};
  char *room = block_memory(), *const end = room + near_bytes;
  call.each_weight([&](auto& weight, bool early) {
    if (!early) weight.bring_near(team, room, end);
  });  // (the team meets before it multiplies for the first time)
  const long tiles = (call.batch + call.tile_rows - 1) / call.tile_rows;
  for (long tile = together ? 0 : block; tile < tiles; tile += together ? 1 : blocks) run_tile(&call, tile, team);
}
