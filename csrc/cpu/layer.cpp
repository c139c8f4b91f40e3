// What a Transformer layer does to its rows between the products, for one instruction set: bias, dropout,
// residual and LayerNorm in one pass, bias, GELU and dropout in another, forward and backward.
//
//   forward    x' = x + M (y + bias),  h = (x' - mean) rstd w + b          o = M GELU(u + bias)
//   backward   d = dx' + rstd (g - mean(g) - n mean(g n)),  n = (x' - mean) rstd,  g = dh w
//              dx = d,  dy = M d,  and sums over rows for the weights
//
// with M the factors of dropout, drawn anew in the backward. Rows are worked on as many at a time as a
// register has lanes: their sums are then added by one transposition. Sums over rows are taken over
// chunks of fixed size and those added in order, so that the number of threads changes no bit.
#include "vectors.hpp"

namespace sat {
namespace SAT_SET {
namespace {

constexpr int64_t kChunk = 128;  // rows
constexpr float kEpsilon = 1e-5f;

// Rows of a chunk and what is drawn for them.
struct Rows {
  const sat_rows &rows;
  uint32_t threshold;
  float kept;

  explicit Rows(const sat_rows &r) : rows(r), threshold(dropout_threshold(r.dropout_p)) {
    kept = dropout_kept(threshold);
  }
  int64_t count() const { return rows.sequences * rows.length; }
  int64_t chunks() const { return (count() + kChunk - 1) / kChunk; }
  uint64_t state(int64_t row) const {
    const int64_t sequence = row / rows.length;
    return row_state(rows.seed, sequence * rows.counter_length + row % rows.length);
  }
};

// The factors of one row.
struct Factors {
  WordVec low, high;  // in all lanes; `low` has the channel added
  Vec kept;
  uint32_t threshold;

  SAT_INLINE Factors(const Rows &rows, int64_t row) : kept(splat(rows.kept)) {
    const uint64_t z = rows.state(row);
    threshold = rows.threshold;
    high = static_cast<uint32_t>(z >> 32) - WordVec{};
    low = static_cast<uint32_t>(z) - WordVec{};
    uint32_t lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = 0x9E3779B9u * static_cast<uint32_t>(i);
    low += *reinterpret_cast<const WordVec *>(lanes);
  }
  SAT_INLINE Vec at(int64_t channel) const {
    const WordVec number = element_number(low + 0x9E3779B9u * static_cast<uint32_t>(channel), high);
    const IntVec small =
        reinterpret_cast<IntVec>(number);  // below 2^24: signed will do, and is quicker
    return small < static_cast<int32_t>(threshold) ? Vec{} : kept;
  }
};

// The sums over the lanes of every vector, in the lanes of one.
SAT_INLINE Vec sums_of(Vec (&rows)[kLanes]) {
  transpose<1>(rows);
  Vec sum = rows[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) sum += rows[i];
  return sum;
}

// body(drop, width) with what the compiler then knows.
template <class Body>
SAT_INLINE void with_known(bool drop, int64_t width, Body body) {
  using Width = std::integral_constant<int64_t, 64>;
  if constexpr (kLanes > 4) {
    if (drop && width == 64) return body(std::true_type(), Width());
    if (width == 64) return body(std::false_type(), Width());
  }
  if (drop) return body(std::true_type(), width);
  body(std::false_type(), width);
}

template <class Drop, class Width>
SAT_ALONE void norm_rows(const NormForward &c, const Rows &rows, int64_t first, int64_t n, Drop,
                         Width width) {
  Vec sums[kLanes];
  float mean[kLanes], rstd[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    sums[i] = Vec{};
    if (i >= n) continue;
    const int64_t row = first + i, place = row * width;
    const float *y_bias = c.y_bias + row % rows.rows.length * c.y_bias_stride;
    [[maybe_unused]] const Factors factors(rows, Drop::value ? row : 0);
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec v = load(c.y + place + d) + load(y_bias + d);
      if constexpr (Drop::value) v *= factors.at(d);
      if (c.x) v += load(c.x + place + d);
      store(c.x_out + place + d, v);
      sums[i] += v;
    }
  }
  store(mean, sums_of(sums) / static_cast<float>(width));
  for (int64_t i = 0; i < kLanes; ++i) {
    sums[i] = Vec{};
    if (i >= n) continue;
    const float *x = c.x_out + (first + i) * width;
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec v = load(x + d) - mean[i];
      sums[i] += v * v;
    }
  }
  store(rstd, sums_of(sums) / static_cast<float>(width) + kEpsilon);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = first + i, place = row * width;
    const float r = 1.0f / __builtin_sqrtf(rstd[i]);
    c.statistics[2 * row] = mean[i];
    c.statistics[2 * row + 1] = r;
    for (int64_t d = 0; d < width; d += kLanes)
      store(c.h + place + d,
            (load(c.x_out + place + d) - mean[i]) * r * load(c.weight + d) + load(c.bias + d));
  }
}

int norm_forward(const NormForward &c) {
  const Rows rows(c.rows);
  return parallel(rows.chunks(), c.num_threads, 16, [&](int64_t chunk, float *) {
    const int64_t end = least((chunk + 1) * kChunk, rows.count());
    with_known(rows.threshold > 0, c.rows.width, [&](auto drop, auto width) SAT_LAMBDA {
      for (int64_t row = chunk * kChunk; row < end; row += kLanes)
        norm_rows(c, rows, row, least(kLanes, end - row), drop, width);
    });
  });
}

// sums: of d_h n, d_h and dy over the rows
template <class Drop, class Width>
SAT_ALONE void norm_rows_backward(const NormBackward &c, const Rows &rows, int64_t first, int64_t n,
                                  float *sums, Drop, Width width) {
  Vec first_sums[kLanes], second_sums[kLanes];
  float first_mean[kLanes], second_mean[kLanes], mean[kLanes], rstd[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    first_sums[i] = second_sums[i] = Vec{};
    if (i >= n) continue;
    const int64_t row = first + i, place = row * width;
    mean[i] = c.statistics[2 * row];
    rstd[i] = c.statistics[2 * row + 1];
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec g = load(c.d_h + place + d) * load(c.weight + d);
      first_sums[i] += g;
      second_sums[i] += g * ((load(c.x_out + place + d) - mean[i]) * rstd[i]);
    }
  }
  store(first_mean, sums_of(first_sums) / static_cast<float>(width));
  store(second_mean, sums_of(second_sums) / static_cast<float>(width));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = first + i, place = row * width;
    [[maybe_unused]] const Factors factors(rows, Drop::value ? row : 0);
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec d_h = load(c.d_h + place + d);
      const Vec normal = (load(c.x_out + place + d) - mean[i]) * rstd[i];
      Vec v = (d_h * load(c.weight + d) - first_mean[i] - normal * second_mean[i]) * rstd[i];
      if (c.d_x_out) v += load(c.d_x_out + place + d);
      if (c.dx) store(c.dx + place + d, v);
      if constexpr (Drop::value) v *= factors.at(d);
      if (c.dy) store(c.dy + place + d, v);
      store(sums + d, load(sums + d) + d_h * normal);
      store(sums + width + d, load(sums + width + d) + d_h);
      store(sums + 2 * width + d, load(sums + 2 * width + d) + v);
    }
  }
}

// body(chunk, sums) for all chunks; then adds up their sums in order.
template <class Body>
int parallel_sums(int64_t chunks, int num_threads, int64_t size, float *total, Body body) {
  std::memset(total, 0, size * sizeof(float));
  if (chunks == 0) return SAT_OK;
  float *sums = static_cast<float *>(std::calloc(chunks * size, sizeof(float)));
  if (!sums) return SAT_NO_MEMORY;
  const int status = parallel(chunks, num_threads, 16,
                              [&](int64_t chunk, float *) { body(chunk, sums + chunk * size); });
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t d = 0; d < size; ++d) total[d] += sums[chunk * size + d];
  std::free(sums);
  return status;
}

int norm_backward(const NormBackward &c) {
  const Rows rows(c.rows);
  return parallel_sums(
      rows.chunks(), c.num_threads, 3 * c.rows.width, c.sums, [&](int64_t chunk, float *sums) {
        const int64_t end = least((chunk + 1) * kChunk, rows.count());
        with_known(rows.threshold > 0, c.rows.width, [&](auto drop, auto width) SAT_LAMBDA {
          for (int64_t row = chunk * kChunk; row < end; row += kLanes)
            norm_rows_backward(c, rows, row, least(kLanes, end - row), sums, drop, width);
        });
      });
}

// The normal distribution function of x and its density times sqrt(2 pi).
SAT_INLINE void normal_distribution(Vec x, Vec &distribution, Vec &density) {
  const Vec size = max(x, -x);
  density = exp2_below_128(x * x * static_cast<float>(-0.5 * kLog2e));
  // P(X > size) / density as a polynomial in t on (0, 1], to 5e-8 (relative; fitted for size <= 9, behind
  // which the density is 0)
  const Vec t = 1.0f / (1.0f + 0.3f * size);
  Vec y = t * 3.753587074e-02f - 1.650203911e-01f;
  y = y * t + 2.199726549e-01f;
  y = y * t - 6.640403884e-02f;
  y = y * t + 1.354210419e-01f;
  y = y * t + 9.778364453e-02f;
  y = y * t + 1.211057548e-01f;
  y = y * t + 1.196054880e-01f;
  const Vec tail = y * t * density;
  distribution = x > 0 ? 1.0f - tail : tail;
}

template <class Drop>
SAT_ALONE void gelu_row(const Gelu &c, const Rows &rows, int64_t row, Drop) {
  const int64_t width = c.rows.width, place = row * width;
  [[maybe_unused]] const Factors factors(rows, Drop::value ? row : 0);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec x = load(c.u + place + d) + load(c.bias + d);
    Vec distribution, density;
    normal_distribution(x, distribution, density);
    Vec v = x * distribution;
    if constexpr (Drop::value) v *= factors.at(d);
    store(c.out + place + d, v);
  }
}

template <class Drop>
SAT_ALONE void gelu_row_backward(const Gelu &c, const Rows &rows, int64_t row, float *sums, Drop) {
  const int64_t width = c.rows.width, place = row * width;
  const float root = 0.398942280401432678f;  // 1 / sqrt(2 pi)
  [[maybe_unused]] const Factors factors(rows, Drop::value ? row : 0);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec x = load(c.u + place + d) + load(c.bias + d);
    Vec distribution, density;
    normal_distribution(x, distribution, density);
    Vec v = load(c.d_out + place + d);
    if constexpr (Drop::value) v *= factors.at(d);
    v *= distribution + x * density * root;
    store(c.out + place + d, v);
    store(sums + d, load(sums + d) + v);
  }
}

int gelu_forward(const Gelu &c) {
  const Rows rows(c.rows);
  return parallel(rows.chunks(), c.num_threads, 16, [&](int64_t chunk, float *) {
    const int64_t end = least((chunk + 1) * kChunk, rows.count());
    for (int64_t row = chunk * kChunk; row < end; ++row) {
      if (rows.threshold > 0)
        gelu_row(c, rows, row, std::true_type());
      else
        gelu_row(c, rows, row, std::false_type());
    }
  });
}

int gelu_backward(const Gelu &c) {
  const Rows rows(c.rows);
  return parallel_sums(rows.chunks(), c.num_threads, c.rows.width, c.sums,
                       [&](int64_t chunk, float *sums) {
                         const int64_t end = least((chunk + 1) * kChunk, rows.count());
                         for (int64_t row = chunk * kChunk; row < end; ++row) {
                           if (rows.threshold > 0)
                             gelu_row_backward(c, rows, row, sums, std::true_type());
                           else
                             gelu_row_backward(c, rows, row, sums, std::false_type());
                         }
                       });
}

// Sums over a map in double precision, a row at a time; see sat_map_sums.
int map_sums(const MapSums &c) {
  constexpr int64_t kHalf = kLanes / 2;
  typedef double Double __attribute__((vector_size(4 * SAT_LANES)));
  typedef float Half __attribute__((vector_size(2 * SAT_LANES), aligned(4), may_alias));
  std::memset(c.sums, 0, 4 * sizeof(double));
  double *rows = static_cast<double *>(std::calloc(c.length * 4 + 1, sizeof(double)));
  if (!rows) return SAT_NO_MEMORY;
  const auto read = [](const float *p) SAT_LAMBDA {
    return __builtin_convertvector(*reinterpret_cast<const Half *>(p), Double);
  };
  const int status = parallel(c.length, c.num_threads, 16, [&](int64_t row, float *) {
    const float *a = c.map + row * c.length, *other = c.other + (c.other ? row * c.length : 0);
    double *sums = rows + 4 * row;
    const auto add = [&](int64_t begin, int64_t end, bool moments) SAT_LAMBDA {
      Double first = {}, second = {}, third = {}, squared = {};
      int64_t d = begin;
      for (; d + kHalf <= end; d += kHalf) {
        const Double x = read(a + d);
        if (moments) {
          const Double centred = x - c.shift, square = centred * centred;
          first += centred;
          second += square;
          third += square * centred;
        }
        if (other) {
          const Double difference = x - read(other + d);
          squared += difference * difference;
        }
      }
      for (int64_t i = 0; i < kHalf; ++i) {
        sums[0] += first[i];
        sums[1] += second[i];
        sums[2] += third[i];
        sums[3] += squared[i];
      }
      for (; d < end; ++d) {
        const double centred = static_cast<double>(a[d]) - c.shift, square = centred * centred;
        if (moments) {
          sums[0] += centred;
          sums[1] += square;
          sums[2] += square * centred;
        }
        const double difference = other ? static_cast<double>(a[d]) - other[d] : 0;
        sums[3] += difference * difference;
      }
    };
    const int64_t size = row < c.size ? c.size : 0;
    add(0, size, true);
    if (other) add(size, c.length, false);
  });
  for (int64_t row = 0; row < c.length; ++row)
    for (int i = 0; i < 4; ++i) c.sums[i] += rows[4 * row + i];
  std::free(rows);
  return status;
}

}  // namespace

const LayerSet layer_set = {norm_forward, norm_backward, gelu_forward, gelu_backward, map_sums};

}  // namespace SAT_SET
}  // namespace sat
