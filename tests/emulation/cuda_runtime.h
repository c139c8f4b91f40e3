// Stands in for CUDA's header of this name where csrc/cuda is compiled as plain C++; see
// emulation.hpp. It has what our kernels use, with the names and the meaning that CUDA gives them.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>
#include <unordered_map>

#include "emulation.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline float __fmul_rn(float a, float b) { return a * b; }  // compile with -ffp-contract=off

// A barrier can be left out, to see that its absence is noticed: see emulation.hpp.
inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulation::is_skipped(file, line)) emulation::wait_for_block();
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char *file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  if (!emulation::is_skipped(file, line)) emulation::wait_for_warp(mask, true);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  static_assert(sizeof(T) == 4, "only values of 32 bits are emulated");
  const unsigned lane = emulation::running % emulation::kWarpSize, other = lane ^ lane_mask;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // A lane outside the group of `width` lanes gives the caller's own value.
  bits = emulation::exchange(mask, bits, other / width == lane / width ? other : lane);
  std::memcpy(&value, &bits, 4);
  return value;
}

// ---- The runtime --------------------------------------------------------------------------------

typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CUstream_st *cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void *attrs;
  unsigned numAttrs;
};

namespace emulation {
constexpr int kSharedBytes = 48 << 10, kMostSharedBytes = 64 << 10;  // of sm_75, the smallest
inline std::unordered_map<const void *, int> shared_limits;
}  // namespace emulation

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), int attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > emulation::kMostSharedBytes)
    return cudaErrorInvalidValue;
  emulation::shared_limits[reinterpret_cast<const void *>(kernel)] = value;
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...),
                               A &&...arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  if (num_threads == 0 || num_threads > emulation::kMaxThreads)
    return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 || grid.y > UINT16_MAX || grid.z == 0 ||
      grid.z > UINT16_MAX)
    return cudaErrorInvalidConfiguration;
  const auto found = emulation::shared_limits.find(reinterpret_cast<const void *>(kernel));
  const int limit =
      found == emulation::shared_limits.end() ? emulation::kSharedBytes : found->second;
  if (config->dynamicSmemBytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
  struct Bound {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } bound = {kernel, {static_cast<P>(arguments)...}};
  emulation::launch(
      grid, block, config->dynamicSmemBytes,
      [](const void *bound) {
        std::apply(static_cast<const Bound *>(bound)->kernel,
                   static_cast<const Bound *>(bound)->arguments);
      },
      &bound);
  return cudaSuccess;
}
