// What attention.cpp offers once for each instruction set it is compiled for.
#pragma once

#include "../sat_kernels.h"

namespace sat {

// One call; `blocks` is null for dense attention, `map` is null unless the mean map is asked for.
struct Call {
  sat_problem problem;
  const sat_blocks *blocks;
  sat_tensor q, k, v, o, d_o, dq, dk, dv;
  float *lse, *lse_rest;
  float *map;
  int num_threads;
};

struct InstructionSet {
  const char *name;
  int lanes;  // width must be a multiple of it
  int (*forward)(const Call &);
  int (*backward)(const Call &);
};

namespace baseline {
extern const InstructionSet instruction_set;
}
namespace avx2 {
extern const InstructionSet instruction_set;
}
namespace avx512 {
extern const InstructionSet instruction_set;
}

}  // namespace sat
