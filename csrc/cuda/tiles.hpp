// Tiles of rows in shared memory, and what the threads of a block do with them together.
//
// The rows of a tile (queries; keys in the kernel of dK and dV) belong to groups of 8 threads of
// one warp: a thread owns S::owned rows of its group, and of each the columns lane, lane + 8, ...
// of the scores and the float4s lane, lane + 8, ... of what it accumulates. The 8 threads of a
// group read one float4 of the rows together, and 8 of the columns whose rows lie 4 banks apart: no
// conflicts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../sat_kernels.h"

namespace sat {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define SAT_TENSOR_CORES false  // not for TF32
#else
#define SAT_TENSOR_CORES true
#endif

constexpr int kLanes = 8;
constexpr unsigned kWarp = 0xffffffffu;

// Width: of a row in shared memory, heads that are narrower are filled up with zeros.
template <int Width, int Rows>
struct Shape {
  static constexpr int width = Width, rows = Rows, stride = Width + 4;
  static constexpr int widest = Width <= 64 ? 32 : Width == 128 ? 16 : 8;
  static constexpr int columns = Rows < widest ? Rows : widest;
  static constexpr int owned = Rows == 64 ? 4 : Width == 256 ? 1 : 2;
  static constexpr int threads = Rows / owned * kLanes;
  static constexpr int across = columns / kLanes;     // scores of a row that a thread owns
  static constexpr int vectors = Width / 4 / kLanes;  // float4s of a row that a thread owns
  // Tensor cores multiply by 8 rows, a warp has 4 groups of `owned` rows.
  static constexpr bool tensor_cores = owned >= 2 && SAT_TENSOR_CORES;
  static constexpr int pieces = owned / 2;  // times 8 rows of a warp
  static_assert(vectors >= 1 && across >= 1 && threads % 32 == 0, "a thread owns something");
};

// A sat_tensor; `aligned` says that four neighbours can be read at once everywhere.
struct Matrix {
  void *data;
  int64_t batch_stride, head_stride, row_stride;
  bool aligned;
};

// The arguments of every kernel.
struct Call {
  sat_problem problem;
  sat_blocks blocks;  // not set for dense attention
  Matrix q, k, v, o, d_o, dq, dk, dv;
  float *lse, *lse_rest, *delta, *map;
  int length, width, heads;  // those of the problem: 32 bits save registers
  int block;                 // block size, 0: dense attention
  uint32_t dropped;          // t of sat_kernels.h; 0: no dropout
  float kept_factor;         // what a weight that is kept is multiplied by
  bool tensor_cores;         // products in TF32
};

// Dynamic shared memory as a T. This and the two instructions of tensor cores below are the only
// lines that the emulation does not share with CUDA.
template <class T>
__device__ __forceinline__ T &dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ float4 memory[];
  return *reinterpret_cast<T *>(memory);
#else
  return *reinterpret_cast<T *>(emulation::shared_memory);
#endif
}

// Four neighbours of a row, in one access where all rows begin at a multiple of four elements.
template <class E>
struct alignas(4 * sizeof(E)) Four {
  E x, y, z, w;
};

__device__ __forceinline__ float value(float x) { return x; }
__device__ __forceinline__ float value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float value(__half x) { return __half2float(x); }
__device__ __forceinline__ void set(float &to, float x) { to = x; }
__device__ __forceinline__ void set(__nv_bfloat16 &to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void set(__half &to, float x) { to = __float2half_rn(x); }

template <class E>
__device__ __forceinline__ float4 load4_of(const Matrix &m, int64_t at) {
  const E *from = static_cast<const E *>(m.data) + at;
  if (!m.aligned)
    return make_float4(value(from[0]), value(from[1]), value(from[2]), value(from[3]));
  const Four<E> four = *reinterpret_cast<const Four<E> *>(from);
  return make_float4(value(four.x), value(four.y), value(four.z), value(four.w));
}

template <class E>
__device__ __forceinline__ void store4_of(const Matrix &m, int64_t at, float4 x) {
  E *to = static_cast<E *>(m.data) + at;
  Four<E> four;
  set(four.x, x.x);
  set(four.y, x.y);
  set(four.z, x.z);
  set(four.w, x.w);
  if (m.aligned) {
    *reinterpret_cast<Four<E> *>(to) = four;
    return;
  }
  to[0] = four.x;
  to[1] = four.y;
  to[2] = four.z;
  to[3] = four.w;
}

// The type is the same for all threads: a branch on it costs little, a kernel a type costs much.
__device__ __forceinline__ float4 load4(const Matrix &m, int32_t dtype, int64_t at) {
  if (dtype == SAT_FLOAT32) return load4_of<float>(m, at);
  if (dtype == SAT_BFLOAT16) return load4_of<__nv_bfloat16>(m, at);
  return load4_of<__half>(m, at);
}

__device__ __forceinline__ void store4(const Matrix &m, int32_t dtype, int64_t at, float4 x) {
  if (dtype == SAT_FLOAT32)
    store4_of<float>(m, at, x);
  else if (dtype == SAT_BFLOAT16)
    store4_of<__nv_bfloat16>(m, at, x);
  else
    store4_of<__half>(m, at, x);
}

__device__ __forceinline__ int real(const int32_t *lengths, int batch, int length) {
  if (!lengths) return length;
  const int n = lengths[batch];
  return n < 0 ? 0 : n < length ? n : length;
}

// Where a thread works: a tile of rows of one sequence, and its own part of the tile.
struct Place {
  int batch, head, pair;  // pair = batch * heads + head
  int first;              // the tile begins at this row
  int keys, queries;      // real ones of the sequence
  int row, lane;          // the first row of the tile that the thread owns, its place in the group

  __device__ __forceinline__ Place(const Call &c, int pair, int first, int owned)
      : batch(pair / c.heads),
        head(pair % c.heads),
        pair(pair),
        first(first),
        keys(real(c.problem.key_lengths, batch, c.length)),
        queries(real(c.problem.query_lengths, batch, c.length)),
        row(threadIdx.x / kLanes * owned),
        lane(threadIdx.x % kLanes) {}

  __device__ __forceinline__ int64_t offset(const Matrix &m, int i) const {
    return batch * m.batch_stride + head * m.head_stride + i * m.row_stride;
  }
  __device__ __forceinline__ int64_t scalar(const Call &c, int i) const {  // in lse and delta
    return pair * c.problem.length + i;
  }
};

// The column tiles that the row tile at `first` meets, ascending: with (row_ptr, col_idx) the keys
// of queries, with (col_ptr, row_idx) the queries of keys. From `end` on there is padding.
struct Tiles {
  const int32_t *indices;
  int block, parts, columns, count, end;

  __device__ __forceinline__ Tiles(const Call &c, const int32_t *ptr, const int32_t *idx, int first,
                                   int end, int columns)
      : indices(nullptr),
        block(c.block),
        parts(1),
        columns(columns),
        count((end + columns - 1) / columns),
        end(end) {
    if (!block) return;
    const int line = first / block;
    parts = block / columns;
    indices = idx + ptr[line];
    count = end ? (ptr[line + 1] - ptr[line]) * parts : 0;
  }
  // Where tile t begins, or `end` if it and all that follow are padding.
  __device__ __forceinline__ int start(int t) const {
    const int at = indices ? indices[t / parts] * block + t % parts * columns : t * columns;
    return at < end ? at : end;
  }
};

// c_i of sat_kernels.h, the same for all rows of a block.
__device__ __forceinline__ float unselected(const Call &c, int i) {
  if (!c.block || c.problem.denominator == SAT_RENORMALISED) return 0.0f;
  const int32_t *ptr = c.blocks.row_ptr + i / c.block;
  return static_cast<float>(c.length - c.block * (ptr[1] - ptr[0]));
}

// Copies rows first, first + 1, ... to shared memory; zeros from row `end` and from the head's
// width on.
template <class S, int Rows>
__device__ __forceinline__ void load_tile(const Call &c, const Matrix &m, const Place &p, int first,
                                          int end, float (&to)[Rows][S::stride]) {
  constexpr int vectors = S::width / 4;
  for (int at = threadIdx.x; at < Rows * vectors; at += S::threads) {
    const int r = at / vectors, d = at % vectors * 4;
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + r < end && d < c.width) x = load4(m, c.problem.dtype, p.offset(m, first + r) + d);
    *reinterpret_cast<float4 *>(&to[r][d]) = x;
  }
}

// A row of weights for every row of the tile, padded like the tiles.
template <class S>
using Weights = float[S::rows][S::columns + 4];

// ---- Tensor cores -------------------------------------------------------------------------------
//
// One instruction of a warp: a 16 x 8 matrix += a 16 x 8 one times an 8 x 8 one. Lane 4 g + t holds
// of the first (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), of the second (t, g), (t + 4, g), of
// the sum (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1); PTX ISA, mma.m16n8k8. The rows of a
// tile are the 8: a warp has 8 or 16 of them. Sums go through shared memory to the threads that own
// them.

// Rounded to TF32, to the nearest.
__device__ __forceinline__ uint32_t tf32(float x) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return emulation::round_to_tf32(x);
#endif
}

__device__ __forceinline__ void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             float (&sum)[4]) {
#ifdef __CUDACC__
#if SAT_TENSOR_CORES
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
#else
  emulation::multiply_add_tf32(a, b, sum);
#endif
}

// Where a lane is in the matrices above, and the first row of its warp.
struct Lane {
  int g, t, row;

  __device__ __forceinline__ explicit Lane(int owned)
      : g(threadIdx.x % 32 / 4), t(threadIdx.x % 4), row(threadIdx.x / 32 * 4 * owned) {}
};

// Hands the sums of 16 columns to shared memory: to[row][first + 0 ... 15].
template <class S>
__device__ __forceinline__ void hand_over(const float (&sum)[S::pieces][4], const Lane &l,
                                          int first, Weights<S> &to) {
#pragma unroll
  for (int n = 0; n < S::pieces; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      to[l.row + n * 8 + l.t * 2 + e % 2][first + l.g + e / 2 * 8] = sum[n][e];
}

// multiply (below) on tensor cores. `scratch`: of the same rows, overwritten.
template <class S>
__device__ __forceinline__ void multiply_tf32(const float (*rows)[S::stride],
                                              const float (*columns)[S::stride], const Place &p,
                                              float factor, Weights<S> &scratch,
                                              float (&products)[S::owned][S::across]) {
  const Lane l(S::owned);
#pragma unroll
  for (int m = 0; m < S::columns; m += 16) {
    float sum[S::pieces][4] = {};
#pragma unroll 4
    for (int d = 0; d < S::width; d += 8) {
      uint32_t a[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = tf32(columns[m + l.g + e % 2 * 8][d + l.t + e / 2 * 4]);
#pragma unroll
      for (int n = 0; n < S::pieces; ++n) {
        const float *row = rows[l.row + n * 8 + l.g] + d + l.t;
        const uint32_t b[2] = {tf32(row[0]), tf32(row[4])};
        multiply_add(a, b, sum[n]);
      }
    }
    hand_over<S>(sum, l, m, scratch);
  }
  __syncwarp();  // the sums are there
#pragma unroll
  for (int a = 0; a < S::owned; ++a)
#pragma unroll
    for (int b = 0; b < S::across; ++b)
      products[a][b] = __fmul_rn(factor, scratch[p.row + a][p.lane + b * kLanes]);
  __syncwarp();  // the scratch can be written again
}

// accumulate (below) on tensor cores; overwrites the weights.
template <class S>
__device__ __forceinline__ void accumulate_tf32(Weights<S> &weights,
                                                const float (*columns)[S::stride], const Place &p,
                                                float4 (&sum)[S::owned][S::vectors]) {
  const Lane l(S::owned);
  uint32_t b[S::pieces][S::columns / 8][2];
#pragma unroll
  for (int n = 0; n < S::pieces; ++n)
#pragma unroll
    for (int t = 0; t < S::columns; t += 8) {
      b[n][t / 8][0] = tf32(weights[l.row + n * 8 + l.g][t + l.t]);
      b[n][t / 8][1] = tf32(weights[l.row + n * 8 + l.g][t + l.t + 4]);
    }
  __syncwarp();  // all of the warp have read their weights, whose place is scratch from here on
#pragma unroll
  for (int d = 0; d < S::width; d += 16) {
    float part[S::pieces][4] = {};
#pragma unroll
    for (int t = 0; t < S::columns; t += 8) {
      uint32_t a[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = tf32(columns[t + l.t + e / 2 * 4][d + l.g + e % 2 * 8]);
#pragma unroll
      for (int n = 0; n < S::pieces; ++n) multiply_add(a, b[n][t / 8], part[n]);
    }
    hand_over<S>(part, l, 0, weights);
    __syncwarp();                    // the sums are there
    if (p.lane / 4 == d / 16 % 2) {  // float4 e of a thread begins at 4 lane + 32 e
#pragma unroll
      for (int a = 0; a < S::owned; ++a) {
        const float4 x = *reinterpret_cast<const float4 *>(&weights[p.row + a][p.lane % 4 * 4]);
        float4 &to = sum[a][d / 32];
        to = make_float4(to.x + x.x, to.y + x.y, to.z + x.z, to.w + x.w);
      }
    }
    __syncwarp();  // the scratch can be written again
  }
}

// ---- Products -----------------------------------------------------------------------------------

// products[a][b] = factor * <row a of the thread, column b of the thread>. In float32 every kernel
// gets the same bits for the same query and key: no addition that follows may be fused with the last
// product.
template <class S>
__device__ __forceinline__ void multiply(const Call &c, const float (*rows)[S::stride],
                                         const float (*columns)[S::stride], const Place &p,
                                         float factor, Weights<S> &scratch,
                                         float (&products)[S::owned][S::across]) {
  if constexpr (S::tensor_cores)
    if (c.tensor_cores) return multiply_tf32<S>(rows, columns, p, factor, scratch, products);
#pragma unroll
  for (int a = 0; a < S::owned; ++a)
#pragma unroll
    for (int b = 0; b < S::across; ++b) products[a][b] = 0.0f;
#pragma unroll 4
  for (int d = 0; d < S::width; d += 4) {
    float4 y[S::across];
#pragma unroll
    for (int b = 0; b < S::across; ++b)
      y[b] = *reinterpret_cast<const float4 *>(&columns[p.lane + b * kLanes][d]);
#pragma unroll
    for (int a = 0; a < S::owned; ++a) {
      const float4 x = *reinterpret_cast<const float4 *>(&rows[p.row + a][d]);
#pragma unroll
      for (int b = 0; b < S::across; ++b) {
        products[a][b] += x.x * y[b].x;
        products[a][b] += x.y * y[b].y;
        products[a][b] += x.z * y[b].z;
        products[a][b] += x.w * y[b].w;
      }
    }
  }
#pragma unroll
  for (int a = 0; a < S::owned; ++a)
#pragma unroll
    for (int b = 0; b < S::across; ++b) products[a][b] = __fmul_rn(factor, products[a][b]);
}

// sum[a][e] += sum_t weights[row a][t] * columns[t][float4 e of the thread]
template <class S>
__device__ __forceinline__ void accumulate(const Call &c, Weights<S> &weights,
                                           const float (*columns)[S::stride], const Place &p,
                                           float4 (&sum)[S::owned][S::vectors]) {
  if constexpr (S::tensor_cores)
    if (c.tensor_cores) return accumulate_tf32<S>(weights, columns, p, sum);
#pragma unroll 2
  for (int t = 0; t < S::columns; t += 4) {
    float4 w[S::owned];
#pragma unroll
    for (int a = 0; a < S::owned; ++a)
      w[a] = *reinterpret_cast<const float4 *>(&weights[p.row + a][t]);
#pragma unroll
    for (int e = 0; e < S::vectors; ++e)
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const float4 x =
            *reinterpret_cast<const float4 *>(&columns[t + u][(p.lane + e * kLanes) * 4]);
#pragma unroll
        for (int a = 0; a < S::owned; ++a) {
          const float weight = u == 0 ? w[a].x : u == 1 ? w[a].y : u == 2 ? w[a].z : w[a].w;
          sum[a][e].x += weight * x.x;
          sum[a][e].y += weight * x.y;
          sum[a][e].z += weight * x.z;
          sum[a][e].w += weight * x.w;
        }
      }
  }
}

template <class S>
__device__ __forceinline__ void clear(float4 (&sum)[S::owned][S::vectors]) {
#pragma unroll
  for (int a = 0; a < S::owned; ++a)
#pragma unroll
    for (int e = 0; e < S::vectors; ++e) sum[a][e] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// Row a of the thread times factor, or zeros where it is not real.
template <class S>
__device__ __forceinline__ void write_row(const Call &c, const Matrix &m, const Place &p, int a,
                                          const float4 (&sum)[S::vectors], bool is_real,
                                          float factor) {
  const int i = p.first + p.row + a;
  if (i >= c.length) return;
#pragma unroll
  for (int e = 0; e < S::vectors; ++e) {
    const int d = (p.lane + e * kLanes) * 4;
    if (d >= c.width) continue;
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (is_real)
      x = make_float4(sum[e].x * factor, sum[e].y * factor, sum[e].z * factor, sum[e].w * factor);
    store4(m, c.problem.dtype, p.offset(m, i) + d, x);
  }
}

// Sum and maximum over the threads of a group; the maximum ignores NaN.
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step, kLanes);
  return x;
}
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = fmaxf(x, __shfl_xor_sync(kWarp, x, step, kLanes));
  return x;
}

// Dropout, see sat_kernels.h: z of a row, and the factor m_ij of an element of it.
__device__ __forceinline__ uint64_t dropout_row(const Call &c, const Place &p, int i) {
  uint64_t z = c.problem.seed + 0x9E3779B97F4A7C15u * static_cast<uint64_t>(p.scalar(c, i) + 1);
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}
__device__ __forceinline__ float dropout_factor(const Call &c, uint64_t z, int j) {
  uint32_t x = static_cast<uint32_t>(z) + 0x9E3779B9u * static_cast<uint32_t>(j);
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = ((x ^ x >> 15) + static_cast<uint32_t>(z >> 32)) * 0x846CA68Bu;
  x ^= x >> 16;
  return x >> 8 < c.dropped ? 0.0f : c.kept_factor;
}

}  // namespace sat
