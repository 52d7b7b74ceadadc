// What a GPU is made of, in few words: lanes of a warp, warps of a block, blocks of a grid. All other headers are written
// in these, so that another machine.h runs the same text elsewhere.
typedef unsigned char u8;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long i64;  // as long as a pointer, on all systems but Windows

#define INLINE static __device__ __forceinline__
#define INLINE_MEMBER __device__ __forceinline__
#define ALWAYS
#define APART
#define NAN __int_as_float(0x7fffffff)
#define INFINITY __int_as_float(0x7f800000)

constexpr int WARP = 32;
INLINE int lane() { return threadIdx.x % WARP; }
INLINE long thread_of_block() { return threadIdx.x; }
INLINE long threads_of_block() { return blockDim.x; }
INLINE long number_of_block() { return blockIdx.x; }
INLINE long number_of_blocks() { return gridDim.x; }
INLINE void meet_lanes() { __syncwarp(); }
INLINE void meet_block() { __syncthreads(); }
template <class T> INLINE T from_lane(T x, int other) { return __shfl_sync(~0u, x, other); }

// Memory that the threads of a block share.
INLINE char* block_memory() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

// Numbers that blocks tell each other: what a thread wrote before `arrive` or `publish` is seen after a `look` that
// found it.
INLINE unsigned arrive(unsigned* p) {
  __threadfence();
  return atomicAdd(p, 1u);
}
INLINE void publish(unsigned* p, unsigned x) {
  __threadfence();
  atomicExch(p, x);
}
INLINE unsigned look(unsigned* p) {
  const unsigned x = *(volatile unsigned*)p;
  __threadfence();
  return x;
}
// A float as 16 bits of IEEE's kind, and back.
INLINE unsigned short bits_of_f16(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
INLINE float from_f16(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
INLINE unsigned bits_of(float x) { return __float_as_uint(x); }
INLINE float from_bits(unsigned bits) { return __uint_as_float(bits); }
// d += a b on tensor cores: a (16, 16), b (16, 8), d (16, 8), of which every lane holds a part (PTX: mma.m16n8k16). A register
// of a and b has two numbers of 16 bits.
template <bool BF16> INLINE void multiply_add(float* d, const unsigned* a, const unsigned* b) {
  if constexpr (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
INLINE void note(i64* p, i64 x) { *(volatile i64*)p = x; }
