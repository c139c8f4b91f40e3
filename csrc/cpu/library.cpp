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
  bool (*supported)();
};

const Candidate candidates[] = {  // best first
#if defined(__x86_64__)
    {&sat::avx512::instruction_set, has_avx512},
    {&sat::avx2::instruction_set, has_avx2},
#endif
    {&sat::baseline::instruction_set, always},
};

const char *forced = nullptr;
int num_threads = 1;

// A wide set needs a width that fills its registers; 8 and 24 fall back to a narrower one.
const InstructionSet &choose(int64_t width) {
  for (const Candidate &candidate : candidates) {
    const bool named = !forced || !std::strcmp(forced, candidate.set->name);
    if (named && candidate.supported() && width % candidate.set->lanes == 0) return *candidate.set;
  }
  return sat::baseline::instruction_set;
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
  const Call call = {*problem, blocks, *q,  *k,       *v,  *o,         {},
                     {},       {},     {},  lse, lse_rest, map, num_threads};
  return choose(problem->width).forward(call);
}

int backward(const sat_problem *problem, const sat_blocks *blocks, const sat_tensor *q,
             const sat_tensor *k, const sat_tensor *v, const sat_tensor *o, const float *lse,
             const float *lse_rest, const sat_tensor *d_o, const sat_tensor *dq,
             const sat_tensor *dk, const sat_tensor *dv) {
  if (const int status = check(*problem, blocks)) return status;
  const Call call = {*problem, blocks, *q, *k, *v, *o, *d_o, *dq, *dk, *dv,
                     const_cast<float *>(lse), const_cast<float *>(lse_rest), nullptr, num_threads};
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

}  // extern "C"
