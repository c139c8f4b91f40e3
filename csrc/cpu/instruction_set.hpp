// What attention.cpp and layer.cpp offer once for each instruction set they are compiled for.
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

// The arguments of sat_norm_forward and the like.
struct NormForward {
  sat_rows rows;
  const float *y, *y_bias;
  int64_t y_bias_stride;
  const float *x, *weight, *bias;
  float *x_out, *h, *statistics;
  int num_threads;
};

struct NormBackward {
  sat_rows rows;
  const float *d_x_out, *d_h, *x_out, *weight, *statistics;
  float *dx, *dy, *sums;
  int num_threads;
};

struct Gelu {  // out: the output, or the gradient of u
  sat_rows rows;
  const float *d_out, *u, *bias;
  float *out, *sums;
  int num_threads;
};

struct MapSums {
  int64_t length, size;
  const float *map, *other;
  double shift, *sums;
  int num_threads;
};

struct LayerSet {
  int (*norm_forward)(const NormForward &);
  int (*norm_backward)(const NormBackward &);
  int (*gelu_forward)(const Gelu &);
  int (*gelu_backward)(const Gelu &);
  int (*map_sums)(const MapSums &);
};

namespace baseline {
extern const InstructionSet instruction_set;
extern const LayerSet layer_set;
}  // namespace baseline
namespace avx2 {
extern const InstructionSet instruction_set;
extern const LayerSet layer_set;
}  // namespace avx2
namespace avx512 {
extern const InstructionSet instruction_set;
extern const LayerSet layer_set;
}  // namespace avx512

}  // namespace sat
