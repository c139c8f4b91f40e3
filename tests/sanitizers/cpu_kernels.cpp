// Calls every function of libsat_cpu on tensors of exactly the size they need, for test_cpu_sanitizers.py:
// AddressSanitizer sees every element read or written outside. Exit status 1 if a result is not finite.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/sat_kernels.h"

namespace {

using Floats = std::vector<float>;

// A length, a width and a block, 0 for dense; real tokens of the two sequences.
struct Case {
  int64_t length, width, block;
  int32_t real[2];
  float dropout_p, scale;
};

constexpr int64_t kBatch = 2, kHeads = 2;

Floats numbers(int64_t count, unsigned seed) {
  Floats x(count);
  for (float &value : x) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / (1 << 23) - 1.0f;
  }
  return x;
}

bool finite(const Floats &x, bool infinite_allowed = false) {
  for (float value : x)
    if (std::isnan(value) || (std::isinf(value) && !infinite_allowed)) return false;
  return true;
}

bool run(const Case &c) {
  const int64_t rows = kBatch * kHeads * c.length, size = rows * c.width;
  const auto tensor = [&](Floats &x) {
    return sat_tensor{x.data(), kHeads * c.length * c.width, c.length * c.width, c.width};
  };
  Floats data[8];  // q, k, v, o, d_o, dq, dk, dv
  sat_tensor t[8];
  for (int i = 0; i < 8; ++i) {
    data[i] = numbers(size, i + 1);
    t[i] = tensor(data[i]);
  }
  for (float &x : data[0]) x *= c.scale;
  Floats lse(rows), rest(rows), map(c.length * c.length), delta(rows);
  const std::vector<int32_t> real(c.real, c.real + 2);
  const sat_problem problem = {kBatch,      kHeads,      c.length, c.width,
                               real.data(), real.data(), 0.2f,     SAT_ZERO_LOGITS,
                               SAT_FLOAT32, c.dropout_p, 7};
  int status;
  if (c.block) {
    // A full row, an empty one, and every second block of the others.
    const int32_t nb = static_cast<int32_t>(c.length / c.block);
    std::vector<int32_t> row_ptr = {0}, col_idx, col_ptr = {0}, row_idx;
    const auto selected = [](int32_t i, int32_t j) {
      return i == 0 || (i > 1 && (i + j) % 2 == 0);
    };
    for (int32_t i = 0; i < nb; ++i) {
      for (int32_t j = 0; j < nb; ++j) {
        if (selected(i, j)) col_idx.push_back(j);
        if (selected(j, i)) row_idx.push_back(j);
      }
      row_ptr.push_back(static_cast<int32_t>(col_idx.size()));
      col_ptr.push_back(static_cast<int32_t>(row_idx.size()));
    }
    const sat_blocks blocks = {c.block, row_ptr.data(), col_idx.data(), col_ptr.data(),
                               row_idx.data()};
    status = sat_block_sparse_forward(&problem, &blocks, &t[0], &t[1], &t[2], &t[3], lse.data(),
                                      rest.data(), nullptr);
    status |=
        sat_block_sparse_backward(&problem, &blocks, &t[0], &t[1], &t[2], &t[3], lse.data(),
                                  rest.data(), &t[4], &t[5], &t[6], &t[7], delta.data(), nullptr);
  } else {
    status = sat_dense_forward(&problem, &t[0], &t[1], &t[2], &t[3], lse.data(), rest.data(),
                               map.data(), nullptr);
    status |= sat_dense_backward(&problem, &t[0], &t[1], &t[2], &t[3], lse.data(), rest.data(),
                                 &t[4], &t[5], &t[6], &t[7], delta.data(), nullptr);
  }
  bool good = status == SAT_OK && finite(map) && finite(rest) && finite(lse, true);
  for (const Floats &x : data) good &= finite(x);
  return good;
}

}  // namespace

// The rows of a layer, forward and backward; every array ends where its memory ends.
bool run_rows(int64_t sequences, int64_t length, int64_t width, float dropout_p) {
  const sat_rows rows = {sequences, length, width, length + 3, dropout_p, 5};
  const size_t count = static_cast<size_t>(sequences * length), size = count * width;
  std::vector<float> y(size, 0.5f), x(size, 0.25f), bias(width, 0.1f), weight(width, 1.0f),
      out(size), h(size), statistics(2 * count), dx(size), dy(size), sums(3 * width),
      bias_sums(width);
  for (size_t i = 0; i < size; ++i) y[i] = static_cast<float>(i % 7) - 3;
  const bool done =
      sat_norm_forward(&rows, y.data(), bias.data(), 0, x.data(), weight.data(), bias.data(),
                       out.data(), h.data(), statistics.data()) == SAT_OK &&
      sat_norm_backward(&rows, y.data(), x.data(), out.data(), weight.data(), statistics.data(),
                        dx.data(), dy.data(), sums.data()) == SAT_OK &&
      sat_norm_backward(&rows, nullptr, x.data(), out.data(), weight.data(), statistics.data(),
                        nullptr, nullptr, sums.data()) == SAT_OK &&
      sat_gelu_forward(&rows, y.data(), bias.data(), out.data()) == SAT_OK &&
      sat_gelu_backward(&rows, x.data(), y.data(), bias.data(), dy.data(), bias_sums.data()) ==
          SAT_OK;
  for (float value : dy)
    if (!(value == value)) return false;
  std::vector<float> map(length * length, 1.0f), other(length * length);
  double map_sums[4];
  if (sat_map_sums(length, length / 2, map.data(), other.data(), 0.5, map_sums) != SAT_OK)
    return false;
  if (map_sums[3] != static_cast<double>(length * length)) return false;
  return sat_map_sums(length, length, map.data(), nullptr, 0, map_sums) == SAT_OK && done;
}

int main() {
  const Case cases[] = {
      {128, 32, 32, {128, 77}, 0, 1},  {128, 64, 64, {128, 1}, 0, 1},
      {64, 8, 16, {33, 0}, 0, 1},      {128, 32, 32, {128, 77}, 0.3f, 1},
      {96, 40, 32, {96, 50}, 0, 1e4f}, {37, 8, 0, {37, 20}, 0, 1},
      {130, 32, 0, {130, 0}, 0.5f, 1}, {64, 64, 0, {64, 33}, 0, 1e4f},
      {1, 24, 0, {1, 1}, 0, 1},
  };
  for (const char *set : {"baseline", "avx2", "avx512", "neon"}) {
    if (sat_use_instruction_set(set) != SAT_OK) continue;
    for (int threads : {1, 5})  // 5: the backward in two passes
      for (const Case &c : cases) {
        sat_set_num_threads(threads);
        if (!run(c)) {
          std::printf("%s: length %d, width %d, block %d\n", set, static_cast<int>(c.length),
                      static_cast<int>(c.width), static_cast<int>(c.block));
          return 1;
        }
      }
    for (int threads : {1, 3})
      for (int64_t width : {8, 24, 64}) {
        sat_set_num_threads(threads);
        if (!run_rows(3, 67, width, 0.2f) || !run_rows(1, 1, width, 0) || !run_rows(0, 4, width, 0))
          return 1;
      }
    std::printf("%s\n", set);
  }
}
