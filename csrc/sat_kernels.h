/* Block-sparse and dense attention: the C interface of libsat_cpu.so and libsat_cuda.so.
 *
 * Both libraries export the same functions. The CPU library takes host pointers and ignores
 * `stream`; the CUDA library takes device pointers of the current device, enqueues its work on
 * `stream` (a cudaStream_t), does not wait for it and allocates nothing.
 *
 * With s_ij = scale * <q_i, k_j>, J_i the real keys in the blocks selected for row i, and n_i the
 * number of selected keys, padded ones included:
 *
 *     p_ij = exp(s_ij) / (sum_{j in J_i} exp(s_ij) + c_i),    o_i = sum_{j in J_i} p_ij v_j
 *     c_i  = length - n_i (SAT_ZERO_LOGITS)   or   0 (SAT_RENORMALISED)
 *     lse_i = log sum_{j in J_i} exp(s_ij)      (without c_i, whatever the denominator)
 *
 * lse_i = -inf says that J_i is empty or that row i is padding; then o_i = 0, row i sends no
 * gradient and receives none. Dense attention is the case J_i = all real keys, c_i = 0.
 * A NaN in a row that is read gives NaN; finite scores never overflow.
 *
 * Every output is written by one thread in a fixed order: the CPU library gives the same bits for
 * any number of threads. */
#ifndef SAT_KERNELS_H
#define SAT_KERNELS_H

#include <stdint.h>

/* Raised with every change of this file that a caller could notice. */
#define SAT_ABI_VERSION 1

#if defined(__GNUC__)
#define SAT_API __attribute__((visibility("default")))
#else
#define SAT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* float32 [batch, heads, length, width]; strides in elements, the last dimension is contiguous. */
typedef struct sat_tensor {
  float *data;
  int64_t batch_stride, head_stride, row_stride;
} sat_tensor;

typedef struct sat_problem {
  int64_t batch, heads, length, width; /* width: a multiple of 8 */
  const int32_t *key_lengths;          /* [batch] real keys of each sequence; NULL: all */
  const int32_t *query_lengths;        /* [batch] real queries of each sequence; NULL: all */
  float scale;
  int32_t denominator; /* SAT_ZERO_LOGITS or SAT_RENORMALISED; dense attention ignores it */
} sat_problem;

/* The block mask shared by batch and heads, in CSR and in CSR of its transpose; indices ascend in
 * each row. nb = length / block_size. */
typedef struct sat_blocks {
  int64_t block_size;                 /* 16, 32 or 64; divides length */
  const int32_t *row_ptr, *col_idx;   /* [nb + 1], [selected blocks] */
  const int32_t *col_ptr, *row_idx;   /* [nb + 1], [selected blocks]; only the backward reads them */
} sat_blocks;

enum { SAT_ZERO_LOGITS = 0, SAT_RENORMALISED = 1 };

/* What every function below that returns int returns; positive values are cudaError_t. */
enum { SAT_OK = 0, SAT_BAD_ARGUMENT = -1, SAT_NO_MEMORY = -2, SAT_NOT_SUPPORTED = -3 };

SAT_API int sat_abi_version(void);

/* "baseline", "avx2", "avx512" or "neon" (CPU), "cuda". */
SAT_API const char *sat_instruction_set(void);

/* Forces an instruction set by name, NULL returns to the best one of this machine.
 * SAT_NOT_SUPPORTED: not in this library, or not on this machine. */
SAT_API int sat_use_instruction_set(const char *name);

/* Threads of the calls that follow; below 1 means one. The CUDA library ignores it. */
SAT_API void sat_set_num_threads(int num_threads);

/* o: output like q; lse: float32 [batch, heads, length], contiguous. */
SAT_API int sat_block_sparse_forward(const sat_problem *problem, const sat_blocks *blocks,
                                     const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                                     const sat_tensor *o, float *lse, void *stream);

/* Gradients dq, dk, dv (every element is written) for the gradient d_o of o. delta: scratch of
 * float32 [batch, heads, length] that the CUDA library needs and the CPU library does not touch. */
SAT_API int sat_block_sparse_backward(const sat_problem *problem, const sat_blocks *blocks,
                                      const sat_tensor *q, const sat_tensor *k,
                                      const sat_tensor *v, const sat_tensor *o, const float *lse,
                                      const sat_tensor *d_o, const sat_tensor *dq,
                                      const sat_tensor *dk, const sat_tensor *dv, float *delta,
                                      void *stream);

/* map: NULL, or float32 [length, length]: the mean of p over batch and heads. */
SAT_API int sat_dense_forward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                              const sat_tensor *v, const sat_tensor *o, float *lse, float *map,
                              void *stream);

SAT_API int sat_dense_backward(const sat_problem *problem, const sat_tensor *q,
                               const sat_tensor *k, const sat_tensor *v, const sat_tensor *o,
                               const float *lse, const sat_tensor *d_o, const sat_tensor *dq,
                               const sat_tensor *dk, const sat_tensor *dv, float *delta,
                               void *stream);

#ifdef __cplusplus
}
#endif

#endif
