// Who works on a tile of rows together: the warps of one block, or those of all blocks, which then all run at once.

struct Barrier {
  unsigned count, phase;
};

// One warp of `size`, in a team of `blocks`; `memory` holds the temporaries of the team.
struct Member {
  long me, size, blocks;
  Barrier* barrier;
  char* memory;

  // What every thread of the team wrote before is seen by all after.
  INLINE_MEMBER void wait() const {
    meet_block();
    if (blocks == 1) return;
    if (thread_of_block() == 0) {
      const unsigned now = look(&barrier->phase);
      if (arrive(&barrier->count) == (unsigned)blocks - 1) {
        barrier->count = 0;
        publish(&barrier->phase, now + 1);
      } else {
        while (look(&barrier->phase) == now) {
        }
      }
    }
    meet_block();
  }
  INLINE_MEMBER char* take(long) const { return memory; }
  INLINE_MEMBER void give_back(char*) const {}
  INLINE_MEMBER long share(long n, long of = 0) const { return n * (me + of) / size; }  // where its part of n begins
  INLINE_MEMBER long warp_of_block() const { return me % (threads_of_block() / WARP); }
  // Where the part of its block begins (of = 0) or ends (1).
  INLINE_MEMBER long share_of_block(long n, long of) const {
    const long warps = threads_of_block() / WARP;
    return n * ((me / warps + of) * warps) / size;
  }
};

// A step: its number, the rows of a tile that run, and the first of them among all packed rows and among those here.
struct Where {
  long p, n, at, here;
};

INLINE void nearer(const void*, long) {}
