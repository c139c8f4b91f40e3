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
 * The log-sum-exp is held in two floats, lse_i + lse_rest_i, the second the rounding error of the
 * first: at scores of 10^4 the last digit of one float would move every p_ij by a thousandth.
 *
 * With dropout_p > 0, o_i = sum_j m_ij p_ij v_j and the map stays that of p. The factor m_ij is 0 or
 * 2^24 / (2^24 - t) with t = floor(2^24 dropout_p + 1/2), a function of the seed and the place only.
 * In wrapping unsigned arithmetic (64 bits for z, 32 bits for x):
 *
 *     z = seed + 0x9E3779B97F4A7C15 * ((batch * heads + head) * length + i + 1)
 *     z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;  z ^= z >> 31
 *     x = low 32 bits of z + 0x9E3779B9 * j;   x = (x ^ x >> 16) * 0x7FEB352D
 *     x = ((x ^ x >> 15) + high 32 bits of z) * 0x846CA68B;   x ^= x >> 16
 *     m_ij = 0 if (x >> 8) < t
 *
 * (the rounds of SplitMix64 for a row, multiply-xorshift rounds for an element of it).
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
#define SAT_ABI_VERSION 4

#if defined(__GNUC__)
#define SAT_API __attribute__((visibility("default")))
#else
#define SAT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* [batch, heads, length, width] of problem->dtype; strides in elements, the last dimension is
 * contiguous. */
typedef struct sat_tensor {
  void *data;
  int64_t batch_stride, head_stride, row_stride;
} sat_tensor;

typedef struct sat_problem {
  int64_t batch, heads, length, width; /* width: a multiple of 8 */
  const int32_t *key_lengths;          /* [batch] real keys of each sequence; NULL: all */
  const int32_t *query_lengths;        /* [batch] real queries of each sequence; NULL: all */
  float scale;
  int32_t denominator; /* SAT_ZERO_LOGITS or SAT_RENORMALISED; dense attention ignores it */
  int32_t dtype;   /* of every sat_tensor; sums are float32. The CPU library: SAT_FLOAT32 only */
  float dropout_p; /* in [0, 1); 0: no dropout */
  uint64_t seed;   /* of the dropout; the backward takes that of its forward */
} sat_problem;

/* The block mask shared by batch and heads, in CSR and in CSR of its transpose; indices ascend in
 * each row. nb = length / block_size. */
typedef struct sat_blocks {
  int64_t block_size;               /* 16, 32 or 64; divides length */
  const int32_t *row_ptr, *col_idx; /* [nb + 1], [selected blocks] */
  const int32_t *col_ptr, *row_idx; /* [nb + 1], [selected blocks]; only the backward reads them */
} sat_blocks;

enum { SAT_ZERO_LOGITS = 0, SAT_RENORMALISED = 1 };
/* SAT_TF32: float32 tensors whose products run on tensor cores, in TF32 (11 significant bits, sums in
 * float32). Only the CUDA library has it: head widths up to 128, from sm_80 on; elsewhere it computes
 * in float32. */
enum { SAT_FLOAT32 = 0, SAT_BFLOAT16 = 1, SAT_FLOAT16 = 2, SAT_TF32 = 3 };

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

/* o: output like q; lse, lse_rest: float32 [batch, heads, length], contiguous. */
SAT_API int sat_block_sparse_forward(const sat_problem *problem, const sat_blocks *blocks,
                                     const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                                     const sat_tensor *o, float *lse, float *lse_rest,
                                     void *stream);

/* Gradients dq, dk, dv (every element is written) for the gradient d_o of o. delta: scratch of
 * float32 [batch, heads, length] that the CUDA library needs and the CPU library does not touch. */
SAT_API int sat_block_sparse_backward(const sat_problem *problem, const sat_blocks *blocks,
                                      const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                                      const sat_tensor *o, const float *lse, const float *lse_rest,
                                      const sat_tensor *d_o, const sat_tensor *dq,
                                      const sat_tensor *dk, const sat_tensor *dv, float *delta,
                                      void *stream);

/* map: NULL, or float32 [length, length]: the mean of p over batch and heads. */
SAT_API int sat_dense_forward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                              const sat_tensor *v, const sat_tensor *o, float *lse, float *lse_rest,
                              float *map, void *stream);

SAT_API int sat_dense_backward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                               const sat_tensor *v, const sat_tensor *o, const float *lse,
                               const float *lse_rest, const sat_tensor *d_o, const sat_tensor *dq,
                               const sat_tensor *dk, const sat_tensor *dv, float *delta,
                               void *stream);

/* The rows of a layer beside attention. Only the CPU library has what follows. */

/* float32 [sequences, length, width], contiguous; width: a multiple of 8. Row i of sequence s and
 * channel c have the factor of dropout m_ij above for the row s * counter_length + i and j = c. */
typedef struct sat_rows {
  int64_t sequences, length, width, counter_length;
  float dropout_p;
  uint64_t seed;
} sat_rows;

/* x_out = x + m (y + y_bias), h = LayerNorm(x_out) * weight + bias, epsilon 1e-5. The bias of row i begins
 * at y_bias + i * y_bias_stride. x: NULL for 0. statistics: [rows, 2], the mean and 1 / deviation. */
SAT_API int sat_norm_forward(const sat_rows *rows, const float *y, const float *y_bias,
                             int64_t y_bias_stride, const float *x, const float *weight,
                             const float *bias, float *x_out, float *h, float *statistics);

/* Gradients dx and dy (NULL where not wanted) for those of x_out (NULL for 0) and h. sums: [3, width], the
 * gradients of weight and bias, and the sum of dy over all rows. */
SAT_API int sat_norm_backward(const sat_rows *rows, const float *d_x_out, const float *d_h,
                              const float *x_out, const float *weight, const float *statistics,
                              float *dx, float *dy, float *sums);

/* out = m GELU(u + bias), GELU(x) = x (1 + erf(x / sqrt(2))) / 2. */
SAT_API int sat_gelu_forward(const sat_rows *rows, const float *u, const float *bias, float *out);

/* du, and in sums [width] the gradient of bias. */
SAT_API int sat_gelu_backward(const sat_rows *rows, const float *d_out, const float *u,
                              const float *bias, float *du, float *sums);

/* sums [4] of a map [length, length] in double precision: of (a - shift), its square and its cube over the
 * first `size` rows and columns, and of (a - other)^2 over all. other: NULL for none, then 0. */
SAT_API int sat_map_sums(int64_t length, int64_t size, const float *map, const float *other,
                         double shift, double *sums);

#ifdef __cplusplus
}
#endif

#endif
