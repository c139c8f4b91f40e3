// Calls every entry point of the emulated CUDA library, for the sanitizers, or of a CPU library, and
// compares float32 values and gradients with loops in double.
//
//   check LENGTH WIDTH BLOCK_SIZE [INSTRUCTION_SET]     prints the largest error; exit 1 above 1e-5
//   of the largest value. With the name of an instruction set float32 only: a CPU library has no more.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/sat_kernels.h"

namespace {

constexpr int kBatch = 2;
double largest_error = 0.0;

using Vector = std::vector<double>;

// A tensor of the library; with odd rows nothing but its first element is aligned. `data` is as
// large as it must be for float32.
struct Tensor {
  int stride;
  std::vector<float> data;
  sat_tensor view;

  Tensor(int length, int width, bool odd, uint32_t seed)
      : stride(width + odd), data(kBatch * length * stride - odd) {
    for (float &x : data) {
      seed = seed * 1664525 + 1013904223;
      x = static_cast<float>(seed >> 8) / (1 << 22) - 2.0f;
    }
    view = {data.data(), int64_t{length} * stride, 0, stride};
  }
  double operator()(int row, int e) const { return data[static_cast<size_t>(row) * stride + e]; }
};

void expect(int status) {
  if (status == SAT_OK) return;
  std::printf("status %d\n", status);
  std::exit(1);
}

// got: a function of the row and the element.
template <class Got>
void compare(const char *name, const Vector &expected, int width, const Got &got) {
  double largest = 1e-30, error = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::fabs(expected[i]));
    const double difference =
        std::fabs(expected[i] - got(static_cast<int>(i) / width, static_cast<int>(i) % width));
    if (!(difference <= error)) error = difference;  // also NaN
  }
  std::printf("%-4s %.1e\n", name, error / largest);
  if (!(error / largest <= largest_error)) largest_error = error / largest;
}

struct Case {
  int length, width, block;  // block 0: dense
  std::vector<int32_t> lengths, row_ptr, col_idx, col_ptr, row_idx;

  Case(int length, int width, int block)
      : length(length), width(width), block(block), lengths{length - 5, length} {
    if (!block) return;
    const int count = length / block;
    const auto csr = [&](std::vector<int32_t> &ptr, std::vector<int32_t> &idx, bool transposed) {
      ptr.push_back(0);
      for (int r = 0; r < count; ++r) {
        for (int c = 0; c < count; ++c)
          if (transposed ? block_selected(c, r) : block_selected(r, c)) idx.push_back(c);
        ptr.push_back(static_cast<int32_t>(idx.size()));
      }
    };
    csr(row_ptr, col_idx, false);
    csr(col_ptr, row_idx, true);
  }
  static bool block_selected(int r, int c) { return r != 1 && (r * 3 + c * 5) % 4 != 1; }
  bool selected(int i, int j) const { return !block || block_selected(i / block, j / block); }
};

void run(const Case &c, int32_t dtype, float dropout_p, bool odd) {
  const int n = c.length, d = c.width;
  Tensor q(n, d, odd, 1), k(n, d, odd, 2), v(n, d, odd, 3), d_o(n, d, odd, 4);
  Tensor o(n, d, odd, 5), dq(n, d, odd, 6), dk(n, d, odd, 7), dv(n, d, odd, 8);
  std::vector<float> lse(kBatch * n), rest(lse), delta(lse), map(n * n);
  sat_problem problem = {};
  problem.batch = kBatch;
  problem.heads = 1;
  problem.length = n;
  problem.width = d;
  problem.key_lengths = problem.query_lengths = c.lengths.data();
  problem.scale = 1.0f / std::sqrt(static_cast<float>(d));
  problem.dtype = dtype;
  problem.dropout_p = dropout_p;
  problem.seed = 9;
  const sat_blocks blocks = {c.block, c.row_ptr.data(), c.col_idx.data(), c.col_ptr.data(),
                             c.row_idx.data()};
  if (c.block) {
    expect(sat_block_sparse_forward(&problem, &blocks, &q.view, &k.view, &v.view, &o.view,
                                    lse.data(), rest.data(), nullptr));
    expect(sat_block_sparse_backward(&problem, &blocks, &q.view, &k.view, &v.view, &o.view,
                                     lse.data(), rest.data(), &d_o.view, &dq.view, &dk.view,
                                     &dv.view, delta.data(), nullptr));
  } else {
    expect(sat_dense_forward(&problem, &q.view, &k.view, &v.view, &o.view, lse.data(), rest.data(),
                             map.data(), nullptr));
    expect(sat_dense_backward(&problem, &q.view, &k.view, &v.view, &o.view, lse.data(), rest.data(),
                              &d_o.view, &dq.view, &dk.view, &dv.view, delta.data(), nullptr));
  }
  if (dtype != SAT_FLOAT32 || dropout_p > 0.0f) return;  // tests/unit/test_cuda_emulation.py

  Vector want_o(kBatch * n * d), want_dq(want_o), want_dk(want_o), want_dv(want_o), want_map(n * n);
  const auto dot = [&](const Tensor &x, int i, const Tensor &y, int j) {
    double sum = 0.0;
    for (int e = 0; e < d; ++e) sum += x(i, e) * y(j, e);
    return sum;
  };
  for (int b = 0; b < kBatch; ++b)
    for (int i = 0; i < c.lengths[b]; ++i) {
      const int row = b * n + i;
      Vector p(n), dp(n);
      double total = 0.0, mean = 0.0;
      for (int j = 0; j < n; ++j) {
        if (!c.selected(i, j))
          total += 1.0;
        else if (j < c.lengths[b])
          total += p[j] = std::exp(problem.scale * dot(q, row, k, b * n + j));
      }
      for (int j = 0; j < c.lengths[b]; ++j) {
        p[j] /= total;
        dp[j] = dot(d_o, row, v, b * n + j);
        mean += p[j] * dp[j];
        want_map[i * n + j] += p[j] / kBatch;
      }
      for (int j = 0; j < c.lengths[b]; ++j) {
        const int column = b * n + j;
        const double ds = problem.scale * p[j] * (dp[j] - mean);
        for (int e = 0; e < d; ++e) {
          want_o[row * d + e] += p[j] * v(column, e);
          want_dv[column * d + e] += p[j] * d_o(row, e);
          want_dq[row * d + e] += ds * k(column, e);
          want_dk[column * d + e] += ds * q(row, e);
        }
      }
    }
  compare("o", want_o, d, o);
  compare("dq", want_dq, d, dq);
  compare("dk", want_dk, d, dk);
  compare("dv", want_dv, d, dv);
  if (!c.block) compare("map", want_map, n, [&](int i, int j) { return map[i * n + j]; });
}

}  // namespace

int main(int count, char **arguments) {
  if (count != 4 && count != 5) return 2;
  const bool on_cpu = count == 5;
  if (on_cpu && std::strcmp(arguments[4], "auto")) expect(sat_use_instruction_set(arguments[4]));
  const int length = std::atoi(arguments[1]), width = std::atoi(arguments[2]);
  for (const int block : {std::atoi(arguments[3]), 0}) {
    const Case c(length, width, block);
    run(c, SAT_FLOAT32, 0.0f, false);
    run(c, SAT_FLOAT32, 0.0f, true);
    run(c, SAT_FLOAT32, 0.1f, false);
    if (on_cpu) continue;
    run(c, SAT_BFLOAT16, 0.0f, false);
    run(c, SAT_FLOAT16, 0.0f, true);
    run(c, SAT_TF32, 0.0f, true);
  }
  std::printf("%s, largest error %.1e\n", sat_instruction_set(), largest_error);
  return largest_error <= 1e-5 ? 0 : 1;
}
