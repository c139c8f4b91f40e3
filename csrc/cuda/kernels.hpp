// The kernels of attention over tiles, dense and block-sparse; c_i and m_ij as in sat_kernels.h.
//
//   forward    p_j = exp(s_j - max),  o = sum_j m_j p_j v_j / (sum_j p_j + c exp(-max))
//   backward   p_j = exp(s_j - log(exp(lse) + c)),  delta = <dO, o>
//              ds_j = p_j (m_j <dO, v_j> - delta)
//              dV_j = sum_i m p dO_i,  dK_j = scale sum_i ds q_i,  dQ_i = scale sum_j ds k_j
//
// A thread block owns a tile of rows of one batch and head and walks over the tiles of columns that
// the rows meet. It writes nothing that another one writes or reads, so there are no atomics and
// every run gives the same bits. Every barrier is reached by all threads of the block or by none.
#pragma once

#include "tiles.hpp"

namespace sat {

template <class S>
struct alignas(16) ForwardMemory {
  float q[S::rows][S::stride], k[S::columns][S::stride], v[S::columns][S::stride];
  Weights<S> weights;
};

template <class S>
__global__ void __launch_bounds__(S::threads) forward_kernel(const Call c) {
  auto &memory = dynamic_shared<ForwardMemory<S>>();
  const int tiles_of_rows = (c.length + S::rows - 1) / S::rows;
  const Place p(c, blockIdx.x / tiles_of_rows, blockIdx.x % tiles_of_rows * S::rows, S::owned);
  const Tiles tiles(c, c.blocks.row_ptr, c.blocks.col_idx, p.first,
                    p.first < p.queries ? p.keys : 0, S::columns);
  load_tile<S>(c, c.q, p, p.first, p.queries, memory.q);
  float highest[S::owned], total[S::owned];
  float4 sum[S::owned][S::vectors];
  clear<S>(sum);
#pragma unroll
  for (int a = 0; a < S::owned; ++a) {
    highest[a] = -INFINITY;
    total[a] = 0.0f;
  }
  for (int t = 0; t < tiles.count; ++t) {
    const int first = tiles.start(t);
    if (first == tiles.end) break;
    __syncthreads();  // all have read the tiles before
    load_tile<S>(c, c.k, p, first, p.keys, memory.k);
    load_tile<S>(c, c.v, p, first, p.keys, memory.v);
    __syncthreads();
    float scores[S::owned][S::across];
    multiply<S>(c, memory.q, memory.k, p, c.problem.scale, memory.weights, scores);
#pragma unroll
    for (int a = 0; a < S::owned; ++a) {
      float higher = highest[a];
#pragma unroll
      for (int b = 0; b < S::across; ++b) {
        if (first + p.lane + b * kLanes >= p.keys) scores[a][b] = -INFINITY;
        higher = fmaxf(higher, scores[a][b]);
      }
      higher = group_max(higher);
      // Without a number above -inf yet: exp(-inf - 0) = 0, where -inf - -inf would be NaN.
      const float base = higher == -INFINITY ? 0.0f : higher;
      const float rescale = expf(highest[a] - base);
      highest[a] = higher;
      const int i = p.first + p.row + a;
      const uint64_t z = c.dropped ? dropout_row(c, p, i) : 0;
      float added = 0.0f;
#pragma unroll
      for (int b = 0; b < S::across; ++b) {
        const int column = p.lane + b * kLanes;
        const float weight = expf(scores[a][b] - base);
        added += weight;
        memory.weights[p.row + a][column] =
            c.dropped ? weight * dropout_factor(c, z, first + column) : weight;
      }
      total[a] = total[a] * rescale + group_sum(added);
#pragma unroll
      for (int e = 0; e < S::vectors; ++e) {
        sum[a][e].x *= rescale;
        sum[a][e].y *= rescale;
        sum[a][e].z *= rescale;
        sum[a][e].w *= rescale;
      }
    }
    __syncwarp();  // the weights of a row are written and read by one warp
    accumulate<S>(c, memory.weights, memory.v, p, sum);
  }
  const bool empty = tiles.count == 0 || tiles.start(0) == tiles.end;
#pragma unroll
  for (int a = 0; a < S::owned; ++a) {
    const int i = p.first + p.row + a;
    const bool nothing = empty || i >= p.queries;
    const float base = highest[a] == -INFINITY ? 0.0f : highest[a];
    const float rest = nothing ? 0.0f : unselected(c, i);
    const float denominator = rest > 0.0f ? total[a] + rest * expf(-base) : total[a];
    write_row<S>(c, c.o, p, a, sum[a], !nothing, 1.0f / denominator);
    if (p.lane || i >= c.length) continue;
    // lse + lse_rest = base + log(total): the sum of two floats and its rounding error.
    const float log_total = logf(total[a]), lse = base + log_total, part = lse - base;
    const bool finite = !nothing && fabsf(lse) < INFINITY;
    c.lse[p.scalar(c, i)] = nothing ? -INFINITY : lse;
    c.lse_rest[p.scalar(c, i)] = finite ? (base - (lse - part)) + (log_total - part) : 0.0f;
  }
}

// The parts of log(exp(lse) + c): p = exp((s - large) - small) keeps the digits of s - large.
struct Normaliser {
  float large, small;

  __device__ __forceinline__ Normaliser(const Call &c, const Place &p, int i)
      : large(c.lse[p.scalar(c, i)]), small(c.lse_rest[p.scalar(c, i)]) {
    const float rest = unselected(c, i);
    if (rest <= 0.0f) return;
    const float log_rest = logf(rest);
    if (large < log_rest) {
      small = log1pf(expf(large - log_rest));
      large = log_rest;
    } else {  // also for NaN
      small += log1pf(expf(log_rest - large));
    }
  }
};

template <class S>
struct alignas(16) MapMemory {
  float q[S::rows][S::stride], k[S::columns][S::stride];
  Weights<S> weights;  // scratch of tensor cores
};

// The mean map: a thread block owns a tile of it and adds up all batches and heads in order.
template <class S>
__global__ void __launch_bounds__(S::threads) map_kernel(const Call c) {
  auto &memory = dynamic_shared<MapMemory<S>>();
  const int length = c.length, across = (length + S::columns - 1) / S::columns;
  const int first_row = blockIdx.x / across * S::rows;
  const int first = blockIdx.x % across * S::columns;
  const int pairs = static_cast<int>(c.problem.batch) * c.heads;
  float sum[S::owned][S::across] = {};
  for (int pair = 0; pair < pairs; ++pair) {
    const Place p(c, pair, first_row, S::owned);
    if (first_row >= p.queries || first >= p.keys) continue;  // the same for all threads
    __syncthreads();
    load_tile<S>(c, c.q, p, first_row, p.queries, memory.q);
    load_tile<S>(c, c.k, p, first, p.keys, memory.k);
    __syncthreads();
    float scores[S::owned][S::across];
    multiply<S>(c, memory.q, memory.k, p, c.problem.scale, memory.weights, scores);
#pragma unroll
    for (int a = 0; a < S::owned; ++a) {
      const int i = first_row + p.row + a;
      if (i >= p.queries) continue;
      const Normaliser n(c, p, i);
#pragma unroll
      for (int b = 0; b < S::across; ++b)
        if (first + p.lane + b * kLanes < p.keys)
          sum[a][b] += expf((scores[a][b] - n.large) - n.small);
    }
  }
  const Place p(c, 0, first_row, S::owned);
#pragma unroll
  for (int a = 0; a < S::owned; ++a)
#pragma unroll
    for (int b = 0; b < S::across; ++b) {
      const int i = first_row + p.row + a, j = first + p.lane + b * kLanes;
      if (i < length && j < length)
        c.map[static_cast<int64_t>(i) * length + j] = sum[a][b] / static_cast<float>(pairs);
    }
}

constexpr int kDeltaThreads = 128;

// delta_i = <dO_i, o_i>, 8 threads a row.
static __global__ void __launch_bounds__(kDeltaThreads) delta_kernel(const Call c) {
  constexpr int rows = kDeltaThreads / kLanes;
  const int tiles_of_rows = (c.length + rows - 1) / rows;
  const Place p(c, blockIdx.x / tiles_of_rows, blockIdx.x % tiles_of_rows * rows, 1);
  const int i = p.first + p.row;
  float sum = 0.0f;
  if (i < p.queries)
    for (int d = p.lane * 4; d < c.width; d += kLanes * 4) {
      const float4 x = load4(c.o, c.problem.dtype, p.offset(c.o, i) + d);
      const float4 y = load4(c.d_o, c.problem.dtype, p.offset(c.d_o, i) + d);
      sum += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
    }
  sum = group_sum(sum);
  if (p.lane == 0 && i < c.length) c.delta[p.scalar(c, i)] = sum;
}

template <class S>
struct alignas(16) QueryGradientMemory {
  float q[S::rows][S::stride], d_o[S::rows][S::stride];
  float k[S::columns][S::stride], v[S::columns][S::stride];
  Weights<S> weights;  // ds
};

template <class S>
__global__ void __launch_bounds__(S::threads) query_gradient_kernel(const Call c) {
  auto &memory = dynamic_shared<QueryGradientMemory<S>>();
  const int tiles_of_rows = (c.length + S::rows - 1) / S::rows;
  const Place p(c, blockIdx.x / tiles_of_rows, blockIdx.x % tiles_of_rows * S::rows, S::owned);
  const Tiles tiles(c, c.blocks.row_ptr, c.blocks.col_idx, p.first,
                    p.first < p.queries ? p.keys : 0, S::columns);
  load_tile<S>(c, c.q, p, p.first, p.queries, memory.q);
  load_tile<S>(c, c.d_o, p, p.first, p.queries, memory.d_o);
  float large[S::owned], small[S::owned], delta[S::owned];
#pragma unroll
  for (int a = 0; a < S::owned; ++a) {
    const int i = p.first + p.row + a;
    large[a] = INFINITY;  // a padded query: weight 0
    small[a] = delta[a] = 0.0f;
    if (i >= p.queries) continue;
    const Normaliser n(c, p, i);
    large[a] = n.large;
    small[a] = n.small;
    delta[a] = c.delta[p.scalar(c, i)];
  }
  float4 sum[S::owned][S::vectors];
  clear<S>(sum);
  for (int t = 0; t < tiles.count; ++t) {
    const int first = tiles.start(t);
    if (first == tiles.end) break;
    __syncthreads();
    load_tile<S>(c, c.k, p, first, p.keys, memory.k);
    load_tile<S>(c, c.v, p, first, p.keys, memory.v);
    __syncthreads();
    float scores[S::owned][S::across], d_weights[S::owned][S::across];
    multiply<S>(c, memory.q, memory.k, p, c.problem.scale, memory.weights, scores);
    multiply<S>(c, memory.d_o, memory.v, p, 1.0f, memory.weights, d_weights);
#pragma unroll
    for (int a = 0; a < S::owned; ++a) {
      const uint64_t z = c.dropped ? dropout_row(c, p, p.first + p.row + a) : 0;
#pragma unroll
      for (int b = 0; b < S::across; ++b) {
        const int column = p.lane + b * kLanes;
        const float weight = expf((scores[a][b] - large[a]) - small[a]);
        const float factor = c.dropped ? dropout_factor(c, z, first + column) : 1.0f;
        memory.weights[p.row + a][column] =
            first + column < p.keys ? weight * (factor * d_weights[a][b] - delta[a]) : 0.0f;
      }
    }
    __syncwarp();
    accumulate<S>(c, memory.weights, memory.k, p, sum);
  }
#pragma unroll
  for (int a = 0; a < S::owned; ++a)
    write_row<S>(c, c.dq, p, a, sum[a], p.first + p.row + a < p.queries, c.problem.scale);
}

template <class S>
struct alignas(16) KeyGradientMemory {
  float k[S::rows][S::stride], v[S::rows][S::stride];
  float q[S::columns][S::stride], d_o[S::columns][S::stride];
  Weights<S> weights;  // first m p, then ds: a square each would not fit in the memory of sm_75
  float large[S::columns], small[S::columns], delta[S::columns];
};

// The same with keys as the rows of the tile and queries as its columns.
template <class S>
__global__ void __launch_bounds__(S::threads) key_gradient_kernel(const Call c) {
  auto &memory = dynamic_shared<KeyGradientMemory<S>>();
  const int tiles_of_rows = (c.length + S::rows - 1) / S::rows;
  const Place p(c, blockIdx.x / tiles_of_rows, blockIdx.x % tiles_of_rows * S::rows, S::owned);
  const Tiles tiles(c, c.blocks.col_ptr, c.blocks.row_idx, p.first,
                    p.first < p.keys ? p.queries : 0, S::columns);
  load_tile<S>(c, c.k, p, p.first, p.keys, memory.k);
  load_tile<S>(c, c.v, p, p.first, p.keys, memory.v);
  float4 dk[S::owned][S::vectors], dv[S::owned][S::vectors];
  clear<S>(dk);
  clear<S>(dv);
  for (int t = 0; t < tiles.count; ++t) {
    const int first = tiles.start(t);
    if (first == tiles.end) break;
    __syncthreads();
    load_tile<S>(c, c.q, p, first, p.queries, memory.q);
    load_tile<S>(c, c.d_o, p, first, p.queries, memory.d_o);
    if (threadIdx.x < S::columns) {
      const int i = first + threadIdx.x;
      float large = INFINITY, small = 0.0f, delta = 0.0f;
      if (i < p.queries) {
        const Normaliser n(c, p, i);
        large = n.large;
        small = n.small;
        delta = c.delta[p.scalar(c, i)];
      }
      memory.large[threadIdx.x] = large;
      memory.small[threadIdx.x] = small;
      memory.delta[threadIdx.x] = delta;
    }
    __syncthreads();
    float scores[S::owned][S::across], d_weights[S::owned][S::across];
    multiply<S>(c, memory.k, memory.q, p, c.problem.scale, memory.weights, scores);
    multiply<S>(c, memory.v, memory.d_o, p, 1.0f, memory.weights, d_weights);
#pragma unroll
    for (int b = 0; b < S::across; ++b) {
      const int column = p.lane + b * kLanes;
      const float large = memory.large[column], small = memory.small[column];
      const float delta = memory.delta[column];
      const uint64_t z = c.dropped ? dropout_row(c, p, first + column) : 0;
#pragma unroll
      for (int a = 0; a < S::owned; ++a) {
        const float weight = expf((scores[a][b] - large) - small);
        const float factor = c.dropped ? dropout_factor(c, z, p.first + p.row + a) : 1.0f;
        memory.weights[p.row + a][column] = factor * weight;
        scores[a][b] = weight * (factor * d_weights[a][b] - delta);
      }
    }
    __syncwarp();
    accumulate<S>(c, memory.weights, memory.d_o, p, dv);
    __syncwarp();
#pragma unroll
    for (int a = 0; a < S::owned; ++a)
#pragma unroll
      for (int b = 0; b < S::across; ++b)
        memory.weights[p.row + a][p.lane + b * kLanes] = scores[a][b];
    __syncwarp();
    accumulate<S>(c, memory.weights, memory.q, p, dk);
  }
#pragma unroll
  for (int a = 0; a < S::owned; ++a) {
    const bool counts = p.first + p.row + a < p.keys;
    write_row<S>(c, c.dk, p, a, dk[a], counts, c.problem.scale);
    write_row<S>(c, c.dv, p, a, dv[a], counts, 1.0f);
  }
}

}  // namespace sat
