// The C interface of libsat_cpu.so: checks the arguments and hands the call to the best instruction
// set that this machine has. Nothing here needs more than the baseline, so the library loads anywhere.
#include <cstring>

#include "instruction_set.hpp"

namespace {

using sat::Call;
using sat::InstructionSet;

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512f"); }
#endif
bool always() { return true; }

struct Candidate {
  const InstructionSet *set;
  const sat::LayerSet *layer;
  bool (*supported)();
};

// best first
const Candidate candidates[] = {
#if defined(__x86_64__)
    {&sat::avx512::instruction_set, &sat::avx512::layer_set, has_avx512},
    {&sat::avx2::instruction_set, &sat::avx2::layer_set, has_avx2},
#endif
    {&sat::baseline::instruction_set, &sat::baseline::layer_set, always},
};

const char *forced = nullptr;
int num_threads = 1;

// A wide set needs a width that fills its registers; 8 and 24 fall back to a narrower one.
const Candidate &candidate_for(int64_t width) {
  for (const Candidate &candidate : candidates) {
    const bool named = !forced || !std::strcmp(forced, candidate.set->name);
    if (named && candidate.supported() && width % candidate.set->lanes == 0) return candidate;
  }
  return candidates[sizeof candidates / sizeof *candidates - 1];
}

const InstructionSet &choose(int64_t width) { return *candidate_for(width).set; }
const sat::LayerSet &layer(int64_t width) { return *candidate_for(width).layer; }

int check(const sat_rows &r) {
  const bool good = r.sequences >= 0 && r.length >= 0 && r.width > 0 && r.width % 8 == 0 &&
                    r.counter_length >= r.length && r.dropout_p >= 0 && r.dropout_p < 1;
  return good ? SAT_OK : SAT_BAD_ARGUMENT;
}

int check(const sat_problem &p, const sat_blocks *b) {
  if (p.dtype == SAT_BFLOAT16 || p.dtype == SAT_FLOAT16 || p.dtype == SAT_TF32)
    return SAT_NOT_SUPPORTED;
  bool good = p.batch >= 0 && p.heads >= 0 && p.length >= 0 && p.width > 0 && p.width % 8 == 0;
  good &= p.denominator == SAT_ZERO_LOGITS || p.denominator == SAT_RENORMALISED;
  good &= p.dtype == SAT_FLOAT32 && p.dropout_p >= 0 && p.dropout_p < 1;
  if (b) {
    good &= b->block_size == 16 || b->block_size == 32 || b->block_size == 64;
    good = good && p.length % b->block_size == 0;
  }
  return good ? SAT_OK : SAT_BAD_ARGUMENT;
}

int forward(const sat_problem *problem, const sat_blocks *blocks, const sat_tensor *q,
            const sat_tensor *k, const sat_tensor *v, const sat_tensor *o, float *lse,
            float *lse_rest, float *map) {
  if (const int status = check(*problem, blocks)) return status;
  const Call call = {*problem, blocks, *q, *k,  *v,       *o,  {},
                     {},       {},     {}, lse, lse_rest, map, num_threads};
  return choose(problem->width).forward(call);
}

int backward(const sat_problem *problem, const sat_blocks *blocks, const sat_tensor *q,
             const sat_tensor *k, const sat_tensor *v, const sat_tensor *o, const float *lse,
             const float *lse_rest, const sat_tensor *d_o, const sat_tensor *dq,
             const sat_tensor *dk, const sat_tensor *dv) {
  if (const int status = check(*problem, blocks)) return status;
  const Call call = {*problem,
                     blocks,
                     *q,
                     *k,
                     *v,
                     *o,
                     *d_o,
                     *dq,
                     *dk,
                     *dv,
                     const_cast<float *>(lse),
                     const_cast<float *>(lse_rest),
                     nullptr,
                     num_threads};
  return choose(problem->width).backward(call);
}

}  // namespace

extern "C" {

int sat_abi_version(void) { return SAT_ABI_VERSION; }

const char *sat_instruction_set(void) { return choose(64).name; }

int sat_use_instruction_set(const char *name) {
  if (!name) {
    forced = nullptr;
    return SAT_OK;
  }
  for (const Candidate &candidate : candidates) {
    if (!std::strcmp(name, candidate.set->name) && candidate.supported()) {
      forced = candidate.set->name;
      return SAT_OK;
    }
  }
  return SAT_NOT_SUPPORTED;
}

void sat_set_num_threads(int threads) { num_threads = threads < 1 ? 1 : threads; }

int sat_block_sparse_forward(const sat_problem *problem, const sat_blocks *blocks,
                             const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                             const sat_tensor *o, float *lse, float *lse_rest, void *) {
  if (!blocks) return SAT_BAD_ARGUMENT;
  return forward(problem, blocks, q, k, v, o, lse, lse_rest, nullptr);
}

int sat_block_sparse_backward(const sat_problem *problem, const sat_blocks *blocks,
                              const sat_tensor *q, const sat_tensor *k, const sat_tensor *v,
                              const sat_tensor *o, const float *lse, const float *lse_rest,
                              const sat_tensor *d_o, const sat_tensor *dq, const sat_tensor *dk,
                              const sat_tensor *dv, float *, void *) {
  if (!blocks) return SAT_BAD_ARGUMENT;
  return backward(problem, blocks, q, k, v, o, lse, lse_rest, d_o, dq, dk, dv);
}

int sat_dense_forward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                      const sat_tensor *v, const sat_tensor *o, float *lse, float *lse_rest,
                      float *map, void *) {
  return forward(problem, nullptr, q, k, v, o, lse, lse_rest, map);
}

int sat_dense_backward(const sat_problem *problem, const sat_tensor *q, const sat_tensor *k,
                       const sat_tensor *v, const sat_tensor *o, const float *lse,
                       const float *lse_rest, const sat_tensor *d_o, const sat_tensor *dq,
                       const sat_tensor *dk, const sat_tensor *dv, float *, void *) {
  return backward(problem, nullptr, q, k, v, o, lse, lse_rest, d_o, dq, dk, dv);
}

int sat_norm_forward(const sat_rows *rows, const float *y, const float *y_bias,
                     int64_t y_bias_stride, const float *x, const float *weight, const float *bias,
                     float *x_out, float *h, float *statistics) {
  if (const int status = check(*rows)) return status;
  return layer(rows->width)
      .norm_forward(
          {*rows, y, y_bias, y_bias_stride, x, weight, bias, x_out, h, statistics, num_threads});
}

int sat_norm_backward(const sat_rows *rows, const float *d_x_out, const float *d_h,
                      const float *x_out, const float *weight, const float *statistics, float *dx,
                      float *dy, float *sums) {
  if (const int status = check(*rows)) return status;
  return layer(rows->width)
      .norm_backward({*rows, d_x_out, d_h, x_out, weight, statistics, dx, dy, sums, num_threads});
}

int sat_gelu_forward(const sat_rows *rows, const float *u, const float *bias, float *out) {
  if (const int status = check(*rows)) return status;
  return layer(rows->width).gelu_forward({*rows, nullptr, u, bias, out, nullptr, num_threads});
}

int sat_gelu_backward(const sat_rows *rows, const float *d_out, const float *u, const float *bias,
                      float *du, float *sums) {
  if (const int status = check(*rows)) return status;
  return layer(rows->width).gelu_backward({*rows, d_out, u, bias, du, sums, num_threads});
}

int sat_map_sums(int64_t length, int64_t size, const float *map, const float *other, double shift,
                 double *sums) {
  if (length < 0 || size < 0 || size > length) return SAT_BAD_ARGUMENT;
  return layer(64).map_sums({length, size, map, other, shift, sums, num_threads});
}

}  // extern "C"
