// The kernels of the microbenchmarks. Each is timed from outside; `sink` keeps the compiler from leaving work out.

// How long blocks wait for each other: `rounds` barriers of the whole grid. counter is 0 before.
extern "C" __global__ void grid_barriers(unsigned* counter, int rounds) {
  for (int round = 1; round <= rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter, 1u);
      const unsigned wanted = gridDim.x * unsigned(round);
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < wanted);
    }
    __syncthreads();
  }
}

// How long the threads of a block wait for each other.
extern "C" __global__ void block_barriers(float* sink, int rounds) {
  __shared__ float cell[32];
  float value = threadIdx.x;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) cell[0] = value;
    __syncthreads();
    value += cell[0];
    __syncthreads();
  }
  if (value == -1.0f) sink[0] = value;
}

// Reads `count` float4 again and again, past the caches of the SMs: from L2 where they fit there.
extern "C" __global__ void read_again(const float4* data, float* sink, int count, int rounds) {
  float sum = 0;
  for (int round = 0; round < rounds; ++round)
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
      const float4 v = __ldcg(data + i);
      sum += v.x + v.y + v.z + v.w;
    }
  if (sum == -1.0f) sink[0] = sum;
}

// One step of a state that passes through global memory: write, barrier of the grid, read what another block wrote.
extern "C" __global__ void exchange(unsigned* counter, float* state, int rounds) {
  const int mine = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
  float value = mine;
  for (int round = 1; round <= rounds; ++round) {
    __stcg(state + (round & 1) * all + mine, value);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter, 1u);
      const unsigned wanted = gridDim.x * unsigned(round);
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < wanted);
    }
    __syncthreads();
    value = 0.5f * __ldcg(state + (round & 1) * all + (mine + blockDim.x) % all);
  }
  __stcg(state + mine, value);
}
