// Attention over selected blocks on an NVIDIA GPU, forward and backward: libsat_cuda.so.
//
// Not run on a GPU by its authors: compiled by nvcc with warnings as errors, and checked against
// plain PyTorch on its first use in every process (sat/attention/selection.py).
//
//   forward    p = exp(s - max),  o = sum p v / (sum p + c exp(-max))
//   backward   p = exp(s - L),  ds = p (<dO, v> - delta),  L = log(exp(lse) + c)
//              dV += p dO,  dK += scale ds q,  dQ += scale ds k,  delta_i = <dO_i, o_i>
//
// A thread block of 16 x 16 threads works on tiles of 16 queries and 16 keys: thread (y, x) owns one
// score of the tile, and elements x, x + 16, ... of row y of what it accumulates. dQ has a kernel of
// its own, and dK with dV another: no thread block writes what another one does, so there are no
// atomics and the result is the same in every run. No inline PTX; no barrier inside a condition that
// the threads of a block do not share.
#include <cuda_runtime.h>

#include <cstdint>

#include "../sat_kernels.h"

namespace {

constexpr int kTile = 16;
constexpr int kMaxWidth = 256;
constexpr int kOwned = kMaxWidth / kTile;  // elements of an accumulated row that a thread owns
constexpr unsigned kWarp = 0xffffffffu;

// The arguments of every kernel. `blocks` is not set for dense attention (block_size 0).
struct Call {
  sat_problem problem;
  sat_blocks blocks;
  sat_tensor q, k, v, o, d_o, dq, dk, dv;
  float *lse, *delta, *map;
};

__device__ float *row(const sat_tensor &t, int64_t batch, int64_t head, int64_t i) {
  return t.data + batch * t.batch_stride + head * t.head_stride + i * t.row_stride;
}

__device__ int64_t real(const int32_t *lengths, int64_t batch, int64_t length) {
  if (!lengths) return length;
  const int64_t n = lengths[batch];
  return n < 0 ? 0 : (n < length ? n : length);
}

// Where a thread block works: one tile of rows (queries, or keys for dK and dV) of one sequence.
struct Place {
  int64_t batch, head, first, keys, queries, offset;  // offset of this sequence in lse and delta

  __device__ explicit Place(const Call &c) {
    const int64_t tiles = (c.problem.length + kTile - 1) / kTile;
    const int64_t pair = blockIdx.x / tiles;
    batch = pair / c.problem.heads;
    head = pair % c.problem.heads;
    first = blockIdx.x % tiles * kTile;
    keys = real(c.problem.key_lengths, batch, c.problem.length);
    queries = real(c.problem.query_lengths, batch, c.problem.length);
    offset = pair * c.problem.length;
  }
};

// The tiles that the tile at `first` meets, ascending: with (row_ptr, col_idx) the keys of a query
// tile, with (col_ptr, row_idx) the queries of a key tile. Those from `end` on are padding.
struct Tiles {
  const int32_t *indices;
  int64_t block, parts, count, end;

  __device__ Tiles(const Call &c, const int32_t *ptr, const int32_t *idx, int64_t first, int64_t stop)
      : indices(nullptr), block(0), parts(1), count((stop + kTile - 1) / kTile), end(stop) {
    if (!c.blocks.block_size) return;
    block = c.blocks.block_size;
    parts = block / kTile;
    const int64_t line = first / block;
    indices = idx + ptr[line];
    count = (ptr[line + 1] - ptr[line]) * parts;
  }
  __device__ int64_t start(int64_t t) const {
    return indices ? indices[t / parts] * block + t % parts * kTile : t * kTile;
  }
};

// c_i of sat_kernels.h
__device__ float constant(const Call &c, int64_t i) {
  if (!c.blocks.block_size || c.problem.denominator == SAT_RENORMALISED) return 0.0f;
  const int64_t line = i / c.blocks.block_size;
  const int32_t *ptr = c.blocks.row_ptr;
  return static_cast<float>(c.problem.length - c.blocks.block_size * (ptr[line + 1] - ptr[line]));
}

// Copies a tile to shared memory, rows one element apart from a multiple of the banks; zero from
// row `end` on.
__device__ void load_tile(const sat_tensor &t, const Place &p, int64_t first, int64_t end, int width,
                          float *to) {
  const int64_t i = first + threadIdx.y;
  const float *from = row(t, p.batch, p.head, i);
  for (int d = threadIdx.x; d < width; d += kTile)
    to[threadIdx.y * (width + 1) + d] = i < end ? from[d] : 0.0f;
}

__device__ float dot(const float *a, const float *b, int width) {
  float sum = 0.0f;
  for (int d = 0; d < width; ++d) sum += a[d] * b[d];
  return sum;
}

// Sum and maximum over the 16 threads of a row; the maximum ignores NaN.
__device__ float row_sum(float x) {
  for (int step = kTile / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step, kTile);
  return x;
}
__device__ float row_max(float x) {
  for (int step = kTile / 2; step > 0; step /= 2)
    x = fmaxf(x, __shfl_xor_sync(kWarp, x, step, kTile));
  return x;
}

// log(exp(lse) + c)
__device__ float normaliser(float lse, float c) {
  if (c <= 0.0f) return lse;
  const float log_c = logf(c);
  if (lse <= log_c) return log_c + log1pf(expf(lse - log_c));
  return lse + log1pf(expf(log_c - lse));  // also for NaN
}

// sum[e] += sum_t weights[t * step] * x[t][threadIdx.x + 16 e]
__device__ void accumulate(float (&sum)[kOwned], const float *weights, int step, const float *x,
                           int width) {
#pragma unroll
  for (int e = 0; e < kOwned; ++e) {
    const int d = threadIdx.x + e * kTile;
    if (d < width)
      for (int t = 0; t < kTile; ++t) sum[e] += weights[t * step] * x[t * (width + 1) + d];
  }
}

__device__ void write_row(const sat_tensor &t, const Place &p, int64_t i, int64_t length, int width,
                          const float (&sum)[kOwned], float factor) {
  if (i >= length) return;
  float *to = row(t, p.batch, p.head, i);
#pragma unroll
  for (int e = 0; e < kOwned; ++e) {
    const int d = threadIdx.x + e * kTile;
    if (d < width) to[d] = factor == 0.0f ? 0.0f : sum[e] * factor;
  }
}

// Dynamic shared memory, its parts one after another: tiles of 16 rows of width + 1, then 16 x 16
// weights.
extern __shared__ float shared[];

__global__ void forward_kernel(Call c) {
  const Place p(c);
  const int width = static_cast<int>(c.problem.width), stride = width + 1;
  const int y = threadIdx.y, x = threadIdx.x;
  float *q = shared, *k = q + kTile * stride, *v = k + kTile * stride, *weights = v + kTile * stride;
  const int64_t i = p.first + y;
  const Tiles tiles(c, c.blocks.row_ptr, c.blocks.col_idx, p.first, p.keys);

  load_tile(c.q, p, p.first, p.queries, width, q);
  float highest = -INFINITY, total = 0.0f, sum[kOwned] = {};
  bool any = false;
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t first = tiles.start(t);
    if (first >= p.keys) continue;
    any = true;
    __syncthreads();
    load_tile(c.k, p, first, p.keys, width, k);
    load_tile(c.v, p, first, p.keys, width, v);
    __syncthreads();
    const bool counts = first + x < p.keys;
    const float score = c.problem.scale * dot(q + y * stride, k + x * stride, width);
    const float higher = fmaxf(highest, row_max(counts ? score : -INFINITY));
    // Before the first finite score there is nothing to rescale, and -inf - -inf is NaN.
    const float rescale = highest == -INFINITY ? (total == total ? 0.0f : total) : expf(highest - higher);
    const float weight = counts ? expf(score - higher) : 0.0f;
    weights[y * kTile + x] = weight;
    total = total * rescale + row_sum(weight);
    highest = higher;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kOwned; ++e) sum[e] *= rescale;
    accumulate(sum, weights + y * kTile, 1, v, width);
  }
  const bool empty = !any || i >= p.queries;
  const float unselected = empty ? 0.0f : constant(c, i);
  const float denominator = unselected > 0.0f ? total + unselected * expf(-highest) : total;
  write_row(c.o, p, i, c.problem.length, width, sum, empty ? 0.0f : 1.0f / denominator);
  if (x == 0 && i < c.problem.length) c.lse[p.offset + i] = empty ? -INFINITY : highest + logf(total);
}

// The mean map: a thread owns one entry and adds up all batches and heads in order.
__global__ void map_kernel(Call c) {
  const int width = static_cast<int>(c.problem.width), stride = width + 1;
  const int y = threadIdx.y, x = threadIdx.x;
  float *q = shared, *k = q + kTile * stride;
  const int64_t length = c.problem.length, tiles = (length + kTile - 1) / kTile;
  Place p(c);
  p.first = blockIdx.x / tiles * kTile;
  const int64_t first_key = blockIdx.x % tiles * kTile, i = p.first + y, j = first_key + x;
  float sum = 0.0f;
  for (p.batch = 0; p.batch < c.problem.batch; ++p.batch) {
    p.keys = real(c.problem.key_lengths, p.batch, length);
    p.queries = real(c.problem.query_lengths, p.batch, length);
    for (p.head = 0; p.head < c.problem.heads; ++p.head) {
      __syncthreads();
      load_tile(c.q, p, p.first, p.queries, width, q);
      load_tile(c.k, p, first_key, p.keys, width, k);
      __syncthreads();
      if (i < p.queries && j < p.keys) {
        const float score = c.problem.scale * dot(q + y * stride, k + x * stride, width);
        sum += expf(score - c.lse[(p.batch * c.problem.heads + p.head) * length + i]);
      }
    }
  }
  if (i < length && j < length)
    c.map[i * length + j] = sum / static_cast<float>(c.problem.batch * c.problem.heads);
}

__global__ void delta_kernel(Call c) {
  const Place p(c);
  const int64_t i = p.first + threadIdx.y;
  float sum = 0.0f;
  if (i < p.queries) {
    const float *o = row(c.o, p.batch, p.head, i), *d_o = row(c.d_o, p.batch, p.head, i);
    for (int d = threadIdx.x; d < c.problem.width; d += kTile) sum += o[d] * d_o[d];
  }
  sum = row_sum(sum);
  if (threadIdx.x == 0 && i < c.problem.length) c.delta[p.offset + i] = sum;
}

// Weight and score gradient of query y and key x of the tiles in shared memory; 0 where either is
// padding.
__device__ void weigh(const Call &c, const Place &p, int64_t first_query, int64_t first_key,
                      const float *q, const float *d_o, const float *k, const float *v, int query,
                      int key, float *weight, float *d_score) {
  const int width = static_cast<int>(c.problem.width), stride = width + 1;
  const int64_t i = first_query + query;
  *weight = *d_score = 0.0f;
  if (i >= p.queries || first_key + key >= p.keys) return;
  const float score = c.problem.scale * dot(q + query * stride, k + key * stride, width);
  *weight = expf(score - normaliser(c.lse[p.offset + i], constant(c, i)));
  *d_score = *weight * (dot(d_o + query * stride, v + key * stride, width) - c.delta[p.offset + i]);
}

__global__ void query_gradient_kernel(Call c) {
  const Place p(c);
  const int width = static_cast<int>(c.problem.width), stride = width + 1;
  const int y = threadIdx.y, x = threadIdx.x;
  float *q = shared, *d_o = q + kTile * stride, *k = d_o + kTile * stride, *v = k + kTile * stride;
  float *d_scores = v + kTile * stride;
  const Tiles tiles(c, c.blocks.row_ptr, c.blocks.col_idx, p.first, p.keys);

  load_tile(c.q, p, p.first, p.queries, width, q);
  load_tile(c.d_o, p, p.first, p.queries, width, d_o);
  float sum[kOwned] = {};
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t first = tiles.start(t);
    if (first >= p.keys) continue;
    __syncthreads();
    load_tile(c.k, p, first, p.keys, width, k);
    load_tile(c.v, p, first, p.keys, width, v);
    __syncthreads();
    float weight;
    weigh(c, p, p.first, first, q, d_o, k, v, y, x, &weight, d_scores + y * kTile + x);
    __syncthreads();
    accumulate(sum, d_scores + y * kTile, 1, k, width);
  }
  const float factor = p.first + y < p.queries ? c.problem.scale : 0.0f;
  write_row(c.dq, p, p.first + y, c.problem.length, width, sum, factor);
}

__global__ void key_gradient_kernel(Call c) {
  const Place p(c);
  const int width = static_cast<int>(c.problem.width), stride = width + 1;
  const int y = threadIdx.y, x = threadIdx.x;
  float *k = shared, *v = k + kTile * stride, *q = v + kTile * stride, *d_o = q + kTile * stride;
  float *weights = d_o + kTile * stride, *d_scores = weights + kTile * kTile;
  const int64_t count = p.first < p.keys ? p.queries : 0;
  const Tiles tiles(c, c.blocks.col_ptr, c.blocks.row_idx, p.first, count);

  load_tile(c.k, p, p.first, p.keys, width, k);
  load_tile(c.v, p, p.first, p.keys, width, v);
  float dk[kOwned] = {}, dv[kOwned] = {};
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t first = tiles.start(t);
    if (first >= count) continue;
    __syncthreads();
    load_tile(c.q, p, first, p.queries, width, q);
    load_tile(c.d_o, p, first, p.queries, width, d_o);
    __syncthreads();
    const int at = y * kTile + x;  // query y, key x
    weigh(c, p, first, p.first, q, d_o, k, v, y, x, weights + at, d_scores + at);
    __syncthreads();
    accumulate(dv, weights + y, kTile, d_o, width);  // row y is key y
    accumulate(dk, d_scores + y, kTile, q, width);
  }
  const bool counts = p.first + y < p.keys;
  write_row(c.dk, p, p.first + y, c.problem.length, width, dk, counts ? c.problem.scale : 0.0f);
  write_row(c.dv, p, p.first + y, c.problem.length, width, dv, counts ? 1.0f : 0.0f);
}

int check(const sat_problem &p, const sat_blocks &b, int64_t thread_blocks) {
  if (p.batch < 0 || p.heads < 0 || p.length < 0 || p.width <= 0 || p.width % 8)
    return SAT_BAD_ARGUMENT;
  if (p.denominator != SAT_ZERO_LOGITS && p.denominator != SAT_RENORMALISED) return SAT_BAD_ARGUMENT;
  if (b.block_size && (b.block_size % kTile || p.length % b.block_size)) return SAT_BAD_ARGUMENT;
  if (p.width > kMaxWidth || thread_blocks > INT32_MAX) return SAT_NOT_SUPPORTED;
  return SAT_OK;
}

// Enqueues a kernel with `tiles` tiles of 16 rows and `squares` of 16 x 16 in shared memory.
int launch(void (*kernel)(Call), const Call &call, int64_t thread_blocks, int tiles, int squares,
           void *stream) {
  if (const int error = check(call.problem, call.blocks, thread_blocks)) return error;
  if (thread_blocks == 0) return SAT_OK;
  const size_t bytes =
      sizeof(float) * (tiles * kTile * (call.problem.width + 1) + squares * kTile * kTile);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(thread_blocks));
  config.blockDim = dim3(kTile, kTile);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, call);
}

int64_t count_tiles(const sat_problem &p) { return (p.length + kTile - 1) / kTile; }

int forward(const Call &call, void *stream) {
  const int64_t tiles = count_tiles(call.problem);
  const int64_t pairs = call.problem.batch * call.problem.heads;
  if (const int error = launch(forward_kernel, call, pairs * tiles, 3, 1, stream)) return error;
  if (!call.map) return SAT_OK;
  return launch(map_kernel, call, tiles * tiles, 2, 0, stream);
}

int backward(const Call &call, void *stream) {
  const int64_t count = call.problem.batch * call.problem.heads * count_tiles(call.problem);
  if (const int error = launch(delta_kernel, call, count, 0, 0, stream)) return error;
  if (const int error = launch(query_gradient_kernel, call, count, 4, 1, stream)) return error;
  return launch(key_gradient_kernel, call, count, 4, 2, stream);
}

Call make_call(const sat_problem *problem, const sat_blocks *blocks, const sat_tensor *q,
               const sat_tensor *k, const sat_tensor *v, const sat_tensor *o, const float *lse) {
  Call call = {};
  call.problem = *problem;
  if (blocks) call.blocks = *blocks;
  call.q = *q;
  call.k = *k;
  call.v = *v;
  call.o = *o;
  call.lse = const_cast<float *>(lse);
  return call;
}

int backward_of(Call call, const sat_tensor *d_o, const sat_tensor *dq, const sat_tensor *dk,
                const sat_tensor *dv, float *delta, void *stream) {
  call.d_o = *d_o;
  call.dq = *dq;
  call.dk = *dk;
  call.dv = *dv;
  call.delta = delta;
  return backward(call, stream);
}

}  // namespace

extern "C" {

int sat_abi_version(void) { return SAT_ABI_VERSION; }

const char *sat_instruction_set(void) { return "cuda"; }

int sat_use_instruction_set(const char *name) { return name ? SAT_NOT_SUPPORTED : SAT_OK; }

void sat_set_num_threads(int) {}

int sat_block_sparse_forward(const sat_problem *problem, const sat_blocks *blocks,
                             const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                             const sat_tensor *o, float *lse, void *stream) {
  if (!blocks || !blocks->block_size) return SAT_BAD_ARGUMENT;
  return forward(make_call(problem, blocks, q, k, v, o, lse), stream);
}

int sat_block_sparse_backward(const sat_problem *problem, const sat_blocks *blocks,
                              const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                              const sat_tensor *o, const float *lse, const sat_tensor *d_o,
                              const sat_tensor *dq, const sat_tensor *dk, const sat_tensor *dv,
                              float *delta, void *stream) {
  if (!blocks || !blocks->block_size) return SAT_BAD_ARGUMENT;
  return backward_of(make_call(problem, blocks, q, k, v, o, lse), d_o, dq, dk, dv, delta, stream);
}

int sat_dense_forward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                      const sat_tensor *v, const sat_tensor *o, float *lse, float *map,
                      void *stream) {
  Call call = make_call(problem, nullptr, q, k, v, o, lse);
  call.map = map;
  return forward(call, stream);
}

int sat_dense_backward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                       const sat_tensor *v, const sat_tensor *o, const float *lse,
                       const sat_tensor *d_o, const sat_tensor *dq, const sat_tensor *dk,
                       const sat_tensor *dv, float *delta, void *stream) {
  return backward_of(make_call(problem, nullptr, q, k, v, o, lse), d_o, dq, dk, dv, delta, stream);
}

}  // extern "C"
