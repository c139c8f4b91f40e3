// Vectors, their functions, the generator of dropout and the threads, for one instruction set: what
// attention.cpp and layer.cpp share.
//
// CMake compiles those files once for each set, with SAT_SET (a namespace) and SAT_LANES (floats in a
// register). All that they have but a table at their end has internal linkage, and nothing of the
// standard library that could be emitted out of line is used: the linker must never keep the AVX-512
// copy of a function for the baseline.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "instruction_set.hpp"

#ifdef _OPENMP
#define SAT_OMP(directive) _Pragma(directive)
#else
#define SAT_OMP(directive)
#endif

#define SAT_INLINE inline __attribute__((always_inline))
#define SAT_LAMBDA __attribute__((always_inline))
// For the inner loops: within a larger function GCC runs out of registers for them.
#define SAT_ALONE __attribute__((noinline))

namespace sat {
namespace SAT_SET {
namespace {

constexpr int64_t kLanes = SAT_LANES;
constexpr double kLog2e = 1.44269504088896341;
constexpr double kLn2 = 0.693147180559945309;

typedef float Vec __attribute__((vector_size(4 * SAT_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * SAT_LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * SAT_LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * SAT_LANES), aligned(4), may_alias));

SAT_INLINE Vec load(const float *p) { return *reinterpret_cast<const UnalignedVec *>(p); }
SAT_INLINE void store(float *p, Vec x) { *reinterpret_cast<UnalignedVec *>(p) = x; }
SAT_INLINE Vec splat(float x) { return x - Vec{}; }

// Both give b where b is NaN: the value goes second, the bound first. The instructions of x86 do just
// that, but GCC makes a comparison and a blend of the second form.
#if defined(__AVX2__) && SAT_LANES == 8
SAT_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
SAT_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#else
SAT_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
SAT_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

SAT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^x to 1e-7 (relative) for x < 128; 0 below 2^-126.5. The polynomial is the minimax one on
// [-1/2, 1/2]. Adding `round` leaves the biased exponent in the low bits of the sum.
SAT_INLINE Vec exp2_below_128(Vec x) {
  x = max(splat(-127.0f), x);
  const float round = 12582912.0f + 127.0f;  // 1.5 * 2^23 + exponent bias
  const Vec shifted = x + round;
  const Vec f = x - (shifted - round);
  Vec y = f * 0.001327647174f + 0.00967554154f;
  y = y * f + 0.05550713276f;
  y = y * f + 0.2402211972f;
  y = y * f + 0.6931469671f;
  y = y * f + 1.000000072f;
  return y * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(shifted) << 23);
}

// The same for any x; inf from 2^127.5.
SAT_INLINE Vec exp2(Vec x) { return exp2_below_128(min(splat(128.0f), x)); }

// log2 of a positive normal number; NaN for NaN and inf.
SAT_INLINE Vec log2(Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const Vec m = reinterpret_cast<Vec>(bits - (exponent << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f), t = s * s;
  Vec y = t * (1.0f / 9) + 1.0f / 7;
  y = y * t + 1.0f / 5;
  y = y * t + 1.0f / 3;
  y = y * t + 1.0f;
  return __builtin_convertvector(exponent, Vec) + (x - x) + static_cast<float>(2 * kLog2e) * s * y;
}

// One step of a transposition: exchanges the lanes of two rows that are `Step` apart.
template <int Step, size_t... Lane>
SAT_INLINE void exchange(Vec &a, Vec &b, std::index_sequence<Lane...>) {
  const Vec low = __builtin_shufflevector(a, b, (Lane & Step ? kLanes + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Step ? kLanes + Lane : Lane + Step)...);
  a = low;
}

template <int Step>
SAT_INLINE void transpose(Vec (&rows)[kLanes]) {
  if constexpr (Step < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & Step)) exchange<Step>(rows[i], rows[i + Step], std::make_index_sequence<kLanes>());
    transpose<2 * Step>(rows);
  }
}

// Runs body(task, scratch) for every task, each thread with its own 64-byte aligned scratch.
template <class Body>
int parallel(int64_t tasks, int num_threads, int64_t scratch_floats, Body body) {
  if (tasks <= 0) return SAT_OK;
  if (num_threads > tasks) num_threads = static_cast<int>(tasks);
  // Neighbouring tasks to one thread, which fetches ahead for the next one.
  [[maybe_unused]] const int64_t grain = num_threads == 1 ? tasks : 1 + tasks / (32 * num_threads);
  int failed = 0;
  SAT_OMP("omp parallel num_threads(num_threads) reduction(| : failed)") {
    const size_t bytes = (scratch_floats * sizeof(float) + 63) / 64 * 64;
    float *scratch = static_cast<float *>(std::aligned_alloc(64, bytes));
    failed = scratch == nullptr;
    SAT_OMP("omp for schedule(dynamic, grain)")
    for (int64_t task = 0; task < tasks; ++task)
      if (scratch) body(task, scratch);
#if defined(__SSE2__)
    _mm_sfence();  // what `clear` wrote past the cache, before other threads read it
#endif
    std::free(scratch);
  }
  return failed ? SAT_NO_MEMORY : SAT_OK;
}

// The generator of sat_kernels.h: z of a row, then of 2^24 the number of an element from the low half of
// z + 0x9E3779B9 * j and the high half of z.
SAT_INLINE uint64_t row_state(uint64_t seed, int64_t row) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * static_cast<uint64_t>(row + 1);
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

SAT_INLINE WordVec element_number(WordVec x, WordVec high) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = ((x ^ x >> 15) + high) * 0x846CA68Bu;
  return (x ^ x >> 16) >> 8;
}

// t of sat_kernels.h, and the factor of an element that is not dropped.
SAT_INLINE uint32_t dropout_threshold(float p) { return static_cast<uint32_t>(p * 0x1p24 + 0.5); }
SAT_INLINE float dropout_kept(uint32_t threshold) {
  return threshold < 1 << 24 ? static_cast<float>(0x1p24 / (0x1p24 - threshold)) : 0.0f;
}

}  // namespace
}  // namespace SAT_SET
}  // namespace sat
