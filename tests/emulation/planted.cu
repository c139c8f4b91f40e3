// A kernel with a mistake, chosen by PLANTED, that the emulation must find; right with PLANTED=0.
// Prints what the kernel gave and the right answer.
#include <cuda_runtime.h>

#include <cstdio>

namespace {

constexpr int kThreads = 64, kIdle = 32;

struct Memory {
  float values[kThreads];
};

// Every thread hands its number to the one opposite, and a warp adds up what it got. The last warp
// returns at once: a barrier does not wait for it.
__global__ void planted_kernel(float *sums) {
  auto *memory = reinterpret_cast<Memory *>(emulation::shared_memory);
  const int i = threadIdx.x;
  if (i >= kThreads) return;
  memory->values[PLANTED == 2 ? i + 1 : i] = static_cast<float>(i);  // 2: past the end
  if (PLANTED == 3 && i == 0) __syncwarp();  // 3: a barrier that one thread reaches
  if (PLANTED != 1) __syncthreads();         // 1: missing
  float x = memory->values[kThreads - 1 - i];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (i % 32 == 0) sums[i / 32] = x;
}

}  // namespace

int main() {
  float sums[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(kThreads + kIdle);
  config.dynamicSmemBytes = sizeof(Memory);
  if (cudaLaunchKernelEx(&config, planted_kernel, sums) != cudaSuccess) return 2;
  std::printf("%g %g, right: 1520 496\n", sums[0], sums[1]);
  return sums[0] == 1520.0f && sums[1] == 496.0f ? 0 : 1;
}
