// libsat_cuda.so: checks, the choice of a kernel and its launch. The device code is in kernels.hpp.
//
// Not run on a GPU by its authors: compiled by nvcc with warnings as errors; its numbers come from
// the same source compiled as plain C++ against tests/emulation. On a GPU it is checked against
// plain PyTorch on its first use in every process (sat/attention/selection.py).
#include <cmath>

#include "kernels.hpp"

namespace sat {
namespace {

using Kernel = void (*)(const Call);

// A kernel of one shape, and what its launch needs to know.
struct Variant {
  Kernel kernel;
  int threads, rows, columns;
  size_t shared_bytes;
};

struct Forward {
  template <class S>
  static constexpr Variant of() {
    return {forward_kernel<S>, S::threads, S::rows, S::columns, sizeof(ForwardMemory<S>)};
  }
};
struct Map {
  template <class S>
  static constexpr Variant of() {
    return {map_kernel<S>, S::threads, S::rows, S::columns, sizeof(MapMemory<S>)};
  }
};
struct QueryGradient {
  template <class S>
  static constexpr Variant of() {
    return {query_gradient_kernel<S>, S::threads, S::rows, S::columns,
            sizeof(QueryGradientMemory<S>)};
  }
};
struct KeyGradient {
  template <class S>
  static constexpr Variant of() {
    return {key_gradient_kernel<S>, S::threads, S::rows, S::columns, sizeof(KeyGradientMemory<S>)};
  }
};

// The kernel of a head width and a block size: the narrowest that holds the width, with as many
// rows as the block and the shared memory allow.
template <class What, int Width>
Variant choose_rows(int block_size) {
  if (block_size == 16) return What::template of<Shape<Width, 16>>();
  if (block_size == 32) return What::template of<Shape<Width, 32>>();
  return What::template of<Shape<Width, 64>>();  // dense attention too
}

template <class What>
Variant choose(const Call &c) {
  const int width = c.width;
  if (width <= 32) return choose_rows<What, 32>(c.block);
  if (width <= 64) return choose_rows<What, 64>(c.block);
  if (width <= 128) return What::template of<Shape<128, 16>>();
  return What::template of<Shape<256, 16>>();
}

constexpr int64_t kMaxWidth = 256;

int check(const sat_problem &p, const sat_blocks *b) {
  bool good = p.batch >= 0 && p.heads >= 0 && p.length >= 0 && p.width > 0 && p.width % 8 == 0;
  good &= p.denominator == SAT_ZERO_LOGITS || p.denominator == SAT_RENORMALISED;
  good &= p.dtype >= SAT_FLOAT32 && p.dtype <= SAT_TF32;
  good &= p.dropout_p >= 0 && p.dropout_p < 1;
  if (b) {
    good &= b->block_size == 16 || b->block_size == 32 || b->block_size == 64;
    good = good && p.length % b->block_size == 0;
  }
  if (!good) return SAT_BAD_ARGUMENT;
  // Positions and numbers of tiles are int on the device.
  const bool fits = p.length <= INT32_MAX / 2 && p.batch * p.heads <= INT32_MAX / 2;
  return fits && p.width <= kMaxWidth ? SAT_OK : SAT_NOT_SUPPORTED;
}

Matrix matrix(const sat_problem &p, const sat_tensor &t) {
  // of four elements
  const uintptr_t bytes = p.dtype == SAT_FLOAT32 || p.dtype == SAT_TF32 ? 16 : 8;
  const bool aligned = reinterpret_cast<uintptr_t>(t.data) % bytes == 0 &&
                       t.batch_stride % 4 == 0 && t.head_stride % 4 == 0 && t.row_stride % 4 == 0;
  return {t.data, t.batch_stride, t.head_stride, t.row_stride, aligned};
}

int64_t parts(int64_t length, int64_t size) { return (length + size - 1) / size; }

int launch(const Variant &variant, const Call &call, int64_t thread_blocks, void *stream) {
  if (thread_blocks == 0) return SAT_OK;
  if (thread_blocks > INT32_MAX) return SAT_NOT_SUPPORTED;
  const cudaError_t error =
      cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(variant.shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(thread_blocks));
  config.blockDim = dim3(static_cast<unsigned>(variant.threads));
  config.dynamicSmemBytes = variant.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, variant.kernel, call);
}

// A kernel whose thread blocks own a tile of rows each.
int launch_rows(const Variant &variant, const Call &call, void *stream) {
  const int64_t pairs = call.problem.batch * call.problem.heads;
  return launch(variant, call, pairs * parts(call.problem.length, variant.rows), stream);
}

int forward(const Call &call, void *stream) {
  if (const int error = launch_rows(choose<Forward>(call), call, stream)) return error;
  if (!call.map) return SAT_OK;
  const Variant map = choose<Map>(call);
  const int64_t length = call.problem.length;
  return launch(map, call, parts(length, map.rows) * parts(length, map.columns), stream);
}

int backward(const Call &call, void *stream) {
  const Variant delta = {delta_kernel, kDeltaThreads, kDeltaThreads / kLanes, 0, 0};
  if (const int error = launch_rows(delta, call, stream)) return error;
  if (const int error = launch_rows(choose<QueryGradient>(call), call, stream)) return error;
  return launch_rows(choose<KeyGradient>(call), call, stream);
}

Call make_call(const sat_problem &problem, const sat_blocks *blocks, const sat_tensor *q,
               const sat_tensor *k, const sat_tensor *v, const sat_tensor *o, const float *lse,
               const float *lse_rest) {
  Call call = {};
  call.problem = problem;
  call.tensor_cores = problem.dtype == SAT_TF32;
  if (call.tensor_cores) call.problem.dtype = SAT_FLOAT32;  // of what is read and written
  if (blocks) call.blocks = *blocks;
  call.q = matrix(problem, *q);
  call.k = matrix(problem, *k);
  call.v = matrix(problem, *v);
  call.o = matrix(problem, *o);
  call.lse = const_cast<float *>(lse);
  call.lse_rest = const_cast<float *>(lse_rest);
  call.length = static_cast<int>(problem.length);
  call.width = static_cast<int>(problem.width);
  call.heads = static_cast<int>(problem.heads);
  call.block = blocks ? static_cast<int>(blocks->block_size) : 0;
  constexpr double all = 1 << 24;
  call.dropped = static_cast<uint32_t>(std::floor(all * problem.dropout_p + 0.5));
  call.kept_factor = static_cast<float>(all / (all - call.dropped));
  return call;
}

int backward_of(Call call, const sat_tensor *d_o, const sat_tensor *dq, const sat_tensor *dk,
                const sat_tensor *dv, float *delta, void *stream) {
  call.d_o = matrix(call.problem, *d_o);
  call.dq = matrix(call.problem, *dq);
  call.dk = matrix(call.problem, *dk);
  call.dv = matrix(call.problem, *dv);
  call.delta = delta;
  return backward(call, stream);
}

}  // namespace
}  // namespace sat

extern "C" {

int sat_abi_version(void) { return SAT_ABI_VERSION; }

const char *sat_instruction_set(void) { return "cuda"; }

int sat_use_instruction_set(const char *name) { return name ? SAT_NOT_SUPPORTED : SAT_OK; }

void sat_set_num_threads(int) {}

int sat_block_sparse_forward(const sat_problem *problem, const sat_blocks *blocks,
                             const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                             const sat_tensor *o, float *lse, float *lse_rest, void *stream) {
  if (!blocks) return SAT_BAD_ARGUMENT;
  if (const int error = sat::check(*problem, blocks)) return error;
  return sat::forward(sat::make_call(*problem, blocks, q, k, v, o, lse, lse_rest), stream);
}

int sat_block_sparse_backward(const sat_problem *problem, const sat_blocks *blocks,
                              const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                              const sat_tensor *o, const float *lse, const float *lse_rest,
                              const sat_tensor *d_o, const sat_tensor *dq, const sat_tensor *dk,
                              const sat_tensor *dv, float *delta, void *stream) {
  if (!blocks || !delta) return SAT_BAD_ARGUMENT;
  if (const int error = sat::check(*problem, blocks)) return error;
  return sat::backward_of(sat::make_call(*problem, blocks, q, k, v, o, lse, lse_rest), d_o, dq, dk,
                          dv, delta, stream);
}

int sat_dense_forward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                      const sat_tensor *v, const sat_tensor *o, float *lse, float *lse_rest,
                      float *map, void *stream) {
  if (const int error = sat::check(*problem, nullptr)) return error;
  sat::Call call = sat::make_call(*problem, nullptr, q, k, v, o, lse, lse_rest);
  call.map = map;
  return sat::forward(call, stream);
}

int sat_dense_backward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                       const sat_tensor *v, const sat_tensor *o, const float *lse,
                       const float *lse_rest, const sat_tensor *d_o, const sat_tensor *dq,
                       const sat_tensor *dk, const sat_tensor *dv, float *delta, void *stream) {
  if (!delta) return SAT_BAD_ARGUMENT;
  if (const int error = sat::check(*problem, nullptr)) return error;
  return sat::backward_of(sat::make_call(*problem, nullptr, q, k, v, o, lse, lse_rest), d_o, dq, dk,
                          dv, delta, stream);
}

}  // extern "C"
