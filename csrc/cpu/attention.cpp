// Attention over selected blocks, forward and backward, for one instruction set.
//
// A strip is up to 32 queries of one (batch, head); a chunk is up to 32 keys. Scores are computed
// transposed, S'[key][query], so that the queries lie in the lanes: k, v, q and dO are then read in
// place, only q and dO of a strip are packed, and the sum over a row is a vertical operation.
//
//   forward    P' = exp2(S' - shift),  sum += P',  O += (M P) V,  o = O / (sum + c exp2(-shift))
//   backward   P' = exp2(S' - L),  dS' = P' (M V dO' - delta),  L = log2(exp2(lse) + c)
//              dV += M P' dO,  dK += dS' q,  dQ += dS K,  delta_i = <dO_i, o_i>
//
// with M the factors of dropout, drawn anew in the backward.
// All five products are one register tile, `product`. The scale and log2(e) are folded into the
// packed q, the scale of dS into the packed dO and delta.
#include "vectors.hpp"

namespace sat {
namespace SAT_SET {
namespace {

constexpr int64_t kStrip = 32;  // queries of a strip and keys of a chunk

// A number that the compiler knows, for the sizes that nearly all chunks have: there it knows the
// loops and addresses of the products.
template <int64_t N>
using Known = std::integral_constant<int64_t, N>;

// body(strip, keys, width)
template <class Body>
SAT_INLINE void with_known_sizes(int64_t strip, int64_t keys, int64_t width, Body body) {
  if constexpr (kLanes > 4) {  // not for the baseline, which has no speed to lose
    const bool full = strip == kStrip && keys == kStrip, half = strip == 16 && keys == 16;
    if (full && width == 32) return body(Known<kStrip>(), Known<kStrip>(), Known<32>());
    if (full && width == 64) return body(Known<kStrip>(), Known<kStrip>(), Known<64>());
    if (half && width == 32) return body(Known<16>(), Known<16>(), Known<32>());
    if (half && width == 64) return body(Known<16>(), Known<16>(), Known<64>());
  }
  body(strip, keys, width);
}

// Up to 6 rows times two registers: 12 accumulators, which with 2 operands and a broadcast fill the
// 16 registers of AVX2. 32 = 6 + 6 + 5 + 5 + 5 + 5: no remainder tile.
template <int64_t Count, class Body>
SAT_INLINE void for_each_tile(Known<Count>, Body body) {
  constexpr int64_t tiles = (Count + 5) / 6, size = Count / tiles, larger = Count % tiles;
  for (int64_t i = 0; i < larger * (size + 1); i += size + 1) body(Known<size + 1>(), i);
  for (int64_t i = larger * (size + 1); i < Count; i += size) body(Known<size>(), i);
}

// The same for any count; few sizes, so that the library stays small: 6, 5 and 1.
template <class Body>
SAT_INLINE void for_each_tile(int64_t count, Body body) {
  const int64_t tiles = (count + 5) / 6;
  const int64_t fives = 5 * tiles <= count ? 6 * tiles - count : 0;  // else sixes and single rows
  const int64_t sixes = fives ? tiles - fives : count / 6;
  int64_t i = 0;
  for (; i < 6 * sixes; i += 6) body(Known<6>(), i);
  for (; i < 6 * sixes + 5 * fives; i += 5) body(Known<5>(), i);
  for (; i < count; ++i) body(Known<1>(), i);
}

template <int Rows, int Registers, class Done>
SAT_INLINE void product_tile(const float *a, int64_t a_row, int64_t a_step, const float *x,
                             int64_t x_step, int64_t n, Done done) {
  Vec sum[Rows][Registers] = {};
#pragma GCC unroll 2
  for (int64_t t = 0; t < n; ++t) {
    Vec operand[Registers];
#pragma GCC unroll 2
    for (int c = 0; c < Registers; ++c) operand[c] = load(x + t * x_step + c * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const Vec factor = splat(a[i * a_row + t * a_step]);
#pragma GCC unroll 2
      for (int c = 0; c < Registers; ++c) sum[i][c] += factor * operand[c];
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < Registers; ++c) {
    Vec column[Rows];
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) column[i] = sum[i][c];
    done(c * kLanes, column);
  }
}

// done(i, c, column) for all i < count in groups of up to 6 and c < width in steps of a register,
// where column[r] = sum_{t < n} a[(i + r) * a_row + t * a_step] * x[t * x_step + c ...].
template <class Count, class Width, class Done>
SAT_INLINE void product(Count count, Width width, const float *a, int64_t a_row, int64_t a_step,
                        const float *x, int64_t x_step, int64_t n, Done done) {
  constexpr int64_t kPair = 2 * kLanes;
  for_each_tile(count, [&](auto rows, int64_t i) SAT_LAMBDA {
    constexpr int kRows = decltype(rows)::value;
    const auto column = [&](auto registers, int64_t c) SAT_LAMBDA {
      product_tile<kRows, decltype(registers)::value>(
          a + i * a_row, a_row, a_step, x + c, x_step, n,
          [&](int64_t dc, auto &sums) SAT_LAMBDA { done(i, c + dc, sums); });
    };
    for (int64_t c = 0; c + kPair <= width; c += kPair) column(Known<2>(), c);
    if (width % kPair) column(Known<1>(), width / kPair * kPair);
  });
}

// out[i][c] += sum_t a[i * a_row + t * a_step] * x[t][c]; fresh: = instead of +=, which saves filling
// it with zeros.
template <class Count, class Width>
SAT_INLINE void add_product(bool fresh, Count count, Width width, const float *a, int64_t a_row,
                            int64_t a_step, const float *x, int64_t x_step, int64_t n, float *out,
                            int64_t out_row) {
  product(count, width, a, a_row, a_step, x, x_step, n,
          [&](int64_t i, int64_t c, auto &column) SAT_LAMBDA {
            float *p = out + i * out_row + c;
            if (fresh) {
#pragma GCC unroll 6
              for (Vec sum : column) {
                store(p, sum);
                p += out_row;
              }
              return;
            }
#pragma GCC unroll 6
            for (Vec sum : column) {
              store(p, load(p) + sum);
              p += out_row;
            }
          });
}

// The same where no size is known: one copy, so that the library stays small.
SAT_ALONE void add_product(bool fresh, int64_t count, int64_t width, const float *a, int64_t a_row,
                           int64_t a_step, const float *x, int64_t x_step, int64_t n, float *out,
                           int64_t out_row) {
  add_product<int64_t, int64_t>(fresh, count, width, a, a_row, a_step, x, x_step, n, out, out_row);
}

// Asks for rows that will be needed soon, as many as a tile has. Within `done` of a product, at(turn)
// is true once for every group of rows: spread over the tiles of a chunk, the loads of the next
// one wait for no miss.
template <int Write, class Column>
SAT_INLINE void prefetch(const Column &, const float *rows, int64_t row_stride, int64_t width) {
#pragma GCC unroll 6
  for (size_t r = 0; r < std::extent_v<Column>; ++r)
    for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(rows + r * row_stride + d, Write);
}

// Whether column c of a tile is the one at which a strip prefetches something, by a number for it.
template <class Strip>
SAT_INLINE bool turn(Strip strip, int64_t c, int64_t number) {
  return c == number * kLanes % strip;
}

float *at(const sat_tensor &t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<float *>(t.data) + batch * t.batch_stride + head * t.head_stride +
         row * t.row_stride;
}

// to[d][r] = factor * from[r][d], zero from row `rows` on.
void pack(const float *from, int64_t row_stride, int64_t rows, int64_t width, int64_t strip,
          float factor, float *to) {
  for (int64_t r = 0; r < strip; r += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec tile[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        tile[i] = r + i < rows ? load(from + (r + i) * row_stride + d) * factor : Vec{};
      transpose<1>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * strip + r, tile[i]);
    }
}

// to[r][d] = factor[r] * from[d][r] for d < width
void unpack(const float *from, int64_t strip, int64_t rows, int64_t width, const float *factor,
            float *to, int64_t row_stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vec factors = load(factor + r);
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      Vec tile[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) tile[i] = load(from + (d + i) * strip + r) * factors;
      transpose<1>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (r + i < rows) store(to + (r + i) * row_stride + d, tile[i]);
    }
    for (; d < width; ++d)  // the map may have any number of columns
      for (int64_t i = r; i < least(r + kLanes, rows); ++i)
        to[i * row_stride + d] = from[d * strip + i] * factor[i];
  }
}

// Fills a number of floats that is a multiple of 4 with zeros. With `past_cache` nothing is read
// for it and the zeros do not displace what the caches hold.
void clear(float *p, int64_t count, [[maybe_unused]] bool past_cache) {
#if defined(__SSE2__)
  if (past_cache && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    for (int64_t i = 0; i < count; i += 4) _mm_stream_ps(p + i, _mm_setzero_ps());
    return;
  }
#endif
  std::memset(p, 0, count * sizeof(float));
}

// A chunk of keys that a strip of queries attends to.
struct Place {
  int64_t batch, head, index, key;  // strip index * strip ..., keys from `key` on
};

const float *at(const sat_tensor &t, const Place &place, int64_t row) {
  return at(t, place.batch, place.head, row);
}

// Sizes of a call, worked out once.
struct Plan {
  const Call &call;
  int64_t strip, parts;  // queries of a strip, strips of a block
  int64_t num_strips, pairs;
  uint32_t threshold;  // t of sat_kernels.h; 0: no dropout
  float kept;          // the factor of a weight that is not dropped
  bool large;          // whether the tensors are larger than the cache of a core

  explicit Plan(const Call &c) : call(c) {
    const int64_t block = c.blocks ? c.blocks->block_size : kStrip;
    strip = least(block, kStrip);
    parts = block / strip;
    num_strips = (c.problem.length + strip - 1) / strip;
    pairs = c.problem.batch * c.problem.heads;
    large = pairs * c.problem.length * c.problem.width >= 1 << 18;
    threshold = dropout_threshold(c.problem.dropout_p);
    kept = dropout_kept(threshold);
  }

  // Sets rows of an output to 0.
  void clear_rows(const sat_tensor &t, int64_t batch, int64_t head, int64_t begin,
                  int64_t end) const {
    if (begin >= end) return;
    const int64_t rows = end - begin, width = call.problem.width;
    float *p = at(t, batch, head, begin);
    if (t.row_stride == width) return clear(p, rows * width, large);
    for (int64_t i = 0; i < rows; ++i) clear(p + i * t.row_stride, width, large);
  }

  int64_t real(const int32_t *lengths, int64_t batch) const {
    const int64_t length = call.problem.length;
    if (!lengths) return length;
    return lengths[batch] < 0 ? 0 : least(lengths[batch], length);
  }
  int64_t real_keys(int64_t batch) const { return real(call.problem.key_lengths, batch); }
  int64_t real_queries(int64_t batch) const { return real(call.problem.query_lengths, batch); }

  // The chunks that a strip attends to, padded ones included, and the first key of one of them.
  int64_t num_chunks(int64_t index, int64_t keys) const {
    const sat_blocks *b = call.blocks;
    if (!b) return (keys + strip - 1) / strip;
    const int64_t row = index / parts;
    return (b->row_ptr[row + 1] - b->row_ptr[row]) * parts;
  }
  int64_t first_key(int64_t index, int64_t e) const {
    const sat_blocks *b = call.blocks;
    if (!b) return e * strip;
    const int64_t part_bits = parts - 1;  // 1 or 2 parts
    const int32_t *columns = b->col_idx + b->row_ptr[index / parts];
    return (columns[e >> part_bits] * parts + (e & part_bits)) * strip;
  }

  // The chunk that will be computed after chunk e of a strip, most likely: of the same strip, of
  // the next one that has any, or of the next (batch, head).
  Place after(Place place, int64_t e, int64_t count) const {
    if (e + 1 < count) {
      place.key = first_key(place.index, e + 1);
      return place;
    }
    Place next = place;
    do {
      if (++next.index < num_strips) continue;
      next.index = 0;
      if (++next.head < call.problem.heads) continue;
      next.head = 0;
      if (++next.batch == call.problem.batch) return place;
    } while (empty(next.index, real_keys(next.batch)));
    next.key = first_key(next.index, 0);
    return next;
  }

  // body(place, count, fresh, next) for the chunks of real keys that a strip attends to; fresh: the
  // first one. One call of body, which is large and inlined.
  template <class Body>
  SAT_INLINE void for_each_chunk(int64_t batch, int64_t head, int64_t index, Body body) const {
    const int64_t keys = real_keys(batch), count = num_chunks(index, keys);
    for (int64_t e = 0; e < count; ++e) {
      const Place place = {batch, head, index, first_key(index, e)};
      if (place.key < keys)
        body(place, least(strip, keys - place.key), e == 0, after(place, e, count));
    }
  }

  // body(index) for the strips that attend to a chunk: the transpose of the above.
  template <class Body>
  void for_each_strip(int64_t chunk, Body body) const {
    if (!call.blocks) {
      for (int64_t index = 0; index < num_strips; ++index) body(index);
      return;
    }
    const sat_blocks &b = *call.blocks;
    const int64_t column = chunk / parts;
    for (int32_t e = b.col_ptr[column]; e < b.col_ptr[column + 1]; ++e)
      for (int64_t part = 0; part < parts; ++part) body(b.row_idx[e] * parts + part);
  }

  // The first of them, -1 if there is none.
  int64_t first_strip(int64_t chunk) const {
    if (!call.blocks) return 0;
    const sat_blocks &b = *call.blocks;
    const int64_t column = chunk / parts;
    return b.col_ptr[column] < b.col_ptr[column + 1] ? b.row_idx[b.col_ptr[column]] * parts : -1;
  }

  // True if no real key is selected: the output is 0 and the log-sum-exp -inf.
  bool empty(int64_t index, int64_t keys) const {
    if (!call.blocks) return keys <= 0;
    const sat_blocks &b = *call.blocks;
    const int64_t row = index / parts;  // columns ascend
    return b.row_ptr[row] == b.row_ptr[row + 1] || b.col_idx[b.row_ptr[row]] * b.block_size >= keys;
  }

  // c_i, the number of unselected columns that count as a score of 0.
  float constant(int64_t index) const {
    if (!call.blocks || call.problem.denominator == SAT_RENORMALISED) return 0;
    const sat_blocks &b = *call.blocks;
    const int64_t row = index / parts;
    return static_cast<float>(call.problem.length -
                              b.block_size * (b.row_ptr[row + 1] - b.row_ptr[row]));
  }
};

// ---------------------------------------------------------------------------------------- dropout

// The generator of sat_kernels.h for the rows of a strip, and its factors for a chunk of keys.
struct Dropout {
  uint32_t low[kStrip], high[kStrip];
  float factors[kStrip * kStrip];  // [key][row]

  // z of every row
  void seed(const Plan &plan, int64_t batch, int64_t head, int64_t index) {
    const sat_problem &problem = plan.call.problem;
    const int64_t first = (batch * problem.heads + head) * problem.length + index * plan.strip;
    for (int64_t r = 0; r < plan.strip; ++r) {
      const uint64_t z = row_state(problem.seed, first + r);
      low[r] = static_cast<uint32_t>(z);
      high[r] = static_cast<uint32_t>(z >> 32);
    }
  }

  void draw(const Plan &plan, int64_t first_key, int64_t num_keys) {
    const Vec kept = splat(plan.kept);
    for (int64_t i = 0; i < num_keys; ++i) {
      const uint32_t step = 0x9E3779B9u * static_cast<uint32_t>(first_key + i);
      for (int64_t c = 0; c < plan.strip; c += kLanes) {
        const WordVec number = element_number(*reinterpret_cast<const WordVec *>(low + c) + step,
                                              *reinterpret_cast<const WordVec *>(high + c));
        store(factors + i * plan.strip + c, number < plan.threshold ? Vec{} : kept);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------- forward

// The scratch of a thread in the forward pass, `keys` floats a query for the weights.
struct ForwardScratch {
  float *q, *o, *shift, *sum, *factor, *weights, *map;
  Dropout dropout;

  static int64_t floats(int64_t width, int64_t strip, int64_t keys, int64_t map_keys) {
    return strip * (2 * width + 3 + keys + map_keys);
  }
  ForwardScratch(float *p, int64_t width, int64_t strip, int64_t keys) {
    q = p;
    o = q + width * strip;
    shift = o + width * strip;
    sum = shift + strip;
    factor = sum + strip;
    weights = factor + strip;
    map = weights + keys * strip;
  }
};

// Adds a chunk to the unnormalised output and row sums of a strip: weights exp2(score - shift).
template <bool kShifted, class Strip, class Keys, class Width>
SAT_ALONE void weigh_chunk(const Plan &plan, const Place &place, Strip strip, Keys keys,
                           Width width, bool fresh, const Place &next, float *weights,
                           ForwardScratch &s) {
  const Call &call = plan.call;
  const float *next_k = at(call.k, next, next.key), *next_v = at(call.v, next, next.key);
  const float *next_q = at(call.q, next, next.index * strip);
  const float *o = at(call.o, place, place.index * strip);
  const int64_t q_row = call.q.row_stride, k_row = call.k.row_stride, v_row = call.v.row_stride;
  const int64_t o_row = call.o.row_stride;
  // The next chunk of a row of chunks is what the processor fetches ahead by itself.
  const bool new_strip = next.index != place.index;
  const bool jump = new_strip || next.key != place.key + strip;
  product(keys, strip, at(call.k, place, place.key), k_row, 1, s.q, strip, width,
          [&](int64_t i, int64_t c, auto &column) SAT_LAMBDA {
            if (turn(strip, c, 0) && jump) prefetch<0>(column, next_k + i * k_row, k_row, width);
            if (turn(strip, c, 1) && jump) prefetch<0>(column, next_v + i * v_row, v_row, width);
            if (turn(strip, c, 2) && new_strip)
              prefetch<0>(column, next_q + i * q_row, q_row, width);
            if (turn(strip, c, 3) && fresh) prefetch<1>(column, o + i * o_row, o_row, width);
            Vec sum = fresh && i == 0 ? Vec{} : load(s.sum + c);
            float *to = weights + i * strip + c;
#pragma GCC unroll 6
            for (Vec score : column) {
              const Vec p = kShifted ? exp2_below_128(score - load(s.shift + c)) : exp2(score);
              store(to, p);
              sum += p;
              to += strip;
            }
            store(s.sum + c, sum);
          });
  if (plan.threshold) {
    s.dropout.draw(plan, place.key, keys);
    for (int64_t e = 0; e < keys * strip; ++e) s.dropout.factors[e] *= weights[e];
    weights = s.dropout.factors;
  }
  add_product(fresh, strip, width, weights, 1, strip, at(call.v, place, place.key), v_row, keys,
              s.o, width);
}

// Unnormalised output and row sums of a strip. kShifted: s.shift is what is taken from the scores,
// else 0. keep: the weights of key j stay at weights[j], otherwise each chunk overwrites the last.
template <bool kShifted>
void weigh(const Plan &plan, int64_t batch, int64_t head, int64_t index, bool keep,
           ForwardScratch &s) {
  const int64_t width = plan.call.problem.width, strip = plan.strip;
  plan.for_each_chunk(batch, head, index,
                      [&](const Place &place, int64_t n, bool fresh, const Place &next) SAT_LAMBDA {
                        float *weights = s.weights + (keep ? place.key * strip : 0);
                        const auto weigh = [&](auto strip, auto keys, auto width) SAT_LAMBDA {
                          weigh_chunk<kShifted>(plan, place, strip, keys, width, fresh, next,
                                                weights, s);
                        };
                        if constexpr (kShifted)  // the exception
                          weigh(strip, n, width);
                        else
                          with_known_sizes(strip, n, width, weigh);
                      });
}

// shift[r] = the largest score of row r (in units of log 2).
void find_shift(const Plan &plan, int64_t batch, int64_t head, int64_t index, ForwardScratch &s) {
  const Call &call = plan.call;
  for (int64_t r = 0; r < plan.strip; ++r) s.shift[r] = -__builtin_inff();
  plan.for_each_chunk(
      batch, head, index, [&](const Place &place, int64_t n, bool, const Place &) SAT_LAMBDA {
        product(n, plan.strip, at(call.k, place, place.key), call.k.row_stride, 1, s.q, plan.strip,
                call.problem.width, [&](int64_t, int64_t c, auto &column) SAT_LAMBDA {
                  Vec highest = load(s.shift + c);
                  for (Vec score : column) highest = max(score, highest);
                  store(s.shift + c, highest);
                });
      });
}

// False asks for the shift: a sum far from 1 has lost digits of a small row or overflowed.
// (A padded query has scores of 0, so its sum is the number of keys.)
bool in_range(const float *sums, int64_t strip) {
  IntVec good = ~IntVec{};
  for (int64_t c = 0; c < strip; c += kLanes) {
    const Vec sum = load(sums + c);
    good &= (sum > 0x1p-40f) & (sum < 0x1p40f);
  }
  int32_t all = -1;
  for (int i = 0; i < kLanes; ++i) all &= good[i];
  return all;
}

// One strip of one (batch, head). Returns false if it has nothing to attend to; otherwise factor[r]
// is 1 / denominator, and 0 for rows that are padding.
bool forward_strip(const Plan &plan, int64_t batch, int64_t head, int64_t index, bool keep,
                   ForwardScratch &s) {
  const Call &call = plan.call;
  const sat_problem &problem = call.problem;
  const int64_t width = problem.width, strip = plan.strip, first = index * strip;
  const int64_t end = least(first + strip, problem.length);
  const int64_t place = (batch * problem.heads + head) * problem.length;
  float *lse = call.lse + place, *lse_rest = call.lse_rest + place;

  int64_t rows = least(plan.real_queries(batch), end) - first;
  if (rows < 0 || plan.empty(index, plan.real_keys(batch))) rows = 0;
  plan.clear_rows(call.o, batch, head, first + rows, end);
  for (int64_t i = first + rows; i < end; ++i) {
    lse[i] = -__builtin_inff();
    lse_rest[i] = 0;
  }
  if (rows == 0) return false;

  pack(at(call.q, batch, head, first), call.q.row_stride, rows, width, strip,
       static_cast<float>(problem.scale * kLog2e), s.q);
  if (plan.threshold) s.dropout.seed(plan, batch, head, index);
  std::memset(s.shift, 0, strip * sizeof(float));
  weigh<false>(plan, batch, head, index, keep, s);
  if (!in_range(s.sum, strip)) {
    find_shift(plan, batch, head, index, s);
    weigh<true>(plan, batch, head, index, keep, s);
  }
  const float constant = plan.constant(index);
  for (int64_t c = 0; c < strip; c += kLanes) {
    const Vec shift = load(s.shift + c), sum = load(s.sum + c);
    // Without a constant exp2(-shift) may be inf, and 0 * inf NaN.
    store(s.factor + c, 1.0f / (constant > 0 ? sum + constant * exp2(-shift) : sum));
    store(s.sum + c, log2(sum));
  }
  for (int64_t r = rows; r < strip; ++r) s.factor[r] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double exact = (static_cast<double>(s.shift[r]) + s.sum[r]) * kLn2;
    lse[first + r] = static_cast<float>(exact);
    lse_rest[first + r] = static_cast<float>(exact - lse[first + r]);
  }
  float *to = at(call.o, batch, head, first);
  const float *from = s.o, *factors = s.factor;
  for (int64_t r = 0; r < rows; ++r, to += call.o.row_stride, from += width) {
    const Vec factor = splat(factors[r]);
    for (int64_t d = 0; d < width; d += kLanes) store(to + d, load(from + d) * factor);
  }
  return true;
}

// A thread owns a strip of the mean map for all batches and heads, so it needs no second copy of it.
int forward_with_map(const Plan &plan) {
  const Call &call = plan.call;
  const int64_t length = call.problem.length, width = call.problem.width, strip = plan.strip;
  const float share = plan.pairs ? 1.0f / static_cast<float>(plan.pairs) : 0.0f;
  return parallel(
      plan.num_strips, call.num_threads, ForwardScratch::floats(width, strip, length, length),
      [&](int64_t index, float *scratch) {
        ForwardScratch s(scratch, width, strip, length);
        std::memset(s.map, 0, length * strip * sizeof(float));
        for (int64_t pair = 0; pair < plan.pairs; ++pair) {
          const int64_t batch = pair / call.problem.heads, head = pair % call.problem.heads;
          if (!forward_strip(plan, batch, head, index, true, s)) continue;
          const int64_t keys = plan.real_keys(batch);
          for (int64_t c = 0; c < strip; c += kLanes) {
            const Vec factor = load(s.factor + c) * share;
            for (int64_t j = 0; j < keys; ++j) {
              float *p = s.map + j * strip + c;
              store(p, load(p) + factor * load(s.weights + j * strip + c));
            }
          }
        }
        const int64_t first = index * strip, rows = least(strip, length - first);
        for (int64_t r = 0; r < rows; ++r) s.factor[r] = 1;
        unpack(s.map, strip, rows, length, s.factor, call.map + first * length, length);
      });
}

int forward(const Call &call) {
  const Plan plan(call);
  if (call.map) return forward_with_map(plan);
  const int64_t width = call.problem.width, strip = plan.strip;
  return parallel(plan.pairs * plan.num_strips, call.num_threads,
                  ForwardScratch::floats(width, strip, strip, 0),
                  [&](int64_t task, float *scratch) {
                    ForwardScratch s(scratch, width, strip, strip);
                    const int64_t pair = task / plan.num_strips;
                    forward_strip(plan, pair / call.problem.heads, pair % call.problem.heads,
                                  task % plan.num_strips, false, s);
                  });
}

// --------------------------------------------------------------------------------------- backward

struct BackwardScratch {
  float *q, *d_o, *dq, *norm, *norm_rest, *delta, *weights, *d_scores;
  Dropout dropout;

  static int64_t floats(int64_t width, int64_t strip) {
    return strip * (3 * width + 3 + 2 * strip);
  }
  BackwardScratch(float *p, int64_t width, int64_t strip) {
    q = p;
    d_o = q + width * strip;
    dq = d_o + width * strip;
    norm = dq + width * strip;
    norm_rest = norm + strip;
    delta = norm_rest + strip;
    weights = delta + strip;
    d_scores = weights + strip * strip;
  }
};

// Packs a strip; returns the number of its rows that have a gradient.
int64_t prepare(const Plan &plan, int64_t batch, int64_t head, int64_t index, BackwardScratch &s) {
  const Call &call = plan.call;
  const sat_problem &problem = call.problem;
  const int64_t width = problem.width, strip = plan.strip, first = index * strip;
  const int64_t rows = least(plan.real_queries(batch) - first, strip);
  if (rows <= 0 || plan.empty(index, plan.real_keys(batch))) return 0;
  pack(at(call.q, batch, head, first), call.q.row_stride, rows, width, strip,
       static_cast<float>(problem.scale * kLog2e), s.q);
  pack(at(call.d_o, batch, head, first), call.d_o.row_stride, rows, width, strip, problem.scale,
       s.d_o);

  if (plan.threshold) s.dropout.seed(plan, batch, head, index);
  std::memset(s.norm, 0, strip * sizeof(float));
  std::memset(s.norm_rest, 0, strip * sizeof(float));
  std::memset(s.delta, 0, strip * sizeof(float));
  const int64_t place = (batch * problem.heads + head) * problem.length + first;
  for (int64_t r = 0; r < rows; ++r) {
    const double exact =
        (static_cast<double>(call.lse[place + r]) + call.lse_rest[place + r]) * kLog2e;
    s.norm[r] = static_cast<float>(exact);
    s.norm_rest[r] = static_cast<float>(exact - s.norm[r]);
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    Vec products[kLanes];  // [row][lane], then transposed and added
    for (int i = 0; i < kLanes; ++i) {
      products[i] = Vec{};
      if (r + i >= rows) continue;
      const float *o = at(call.o, batch, head, first + r + i);
      const float *d_o = at(call.d_o, batch, head, first + r + i);
      for (int64_t d = 0; d < width; d += kLanes) products[i] += load(o + d) * load(d_o + d);
    }
    transpose<1>(products);
    Vec delta = products[0];
    for (int i = 1; i < kLanes; ++i) delta += products[i];
    store(s.delta + r, delta * problem.scale);
  }

  // log2(exp2(lse) + c) = high + log2(1 + exp2(low - high)) cannot overflow.
  const float constant = plan.constant(index);
  if (constant > 0) {
    const Vec log_constant = log2(splat(constant));
    for (int64_t c = 0; c < strip; c += kLanes) {
      const Vec lse = load(s.norm + c), rest = load(s.norm_rest + c);
      const Vec high = max(log_constant, lse), low = min(log_constant, lse);
      store(s.norm + c, high);
      store(s.norm_rest + c, (lse < log_constant ? Vec{} : rest) + log2(1.0f + exp2(low - high)));
    }
  }
  return rows;
}

// What a strip and a chunk give to dQ (query_side) and to dK and dV (key_side). fresh_q, fresh_k: the
// first to give something to these rows.
struct Sides {
  bool query_side, fresh_q, key_side, fresh_k;
  float *dq;
  int64_t dq_row;
};

template <class Strip, class Keys, class Width>
SAT_ALONE void backward_tile_of(const Plan &plan, const Place &place, Strip strip, Keys keys,
                                Width width, int64_t rows, const Place &next, const Sides &sides,
                                BackwardScratch &s) {
  const Call &call = plan.call;
  const int64_t first = place.index * strip, j = place.key, next_first = next.index * strip;
  const float *k = at(call.k, place, j);
  const bool dropout = plan.threshold > 0, new_strip = next.index != place.index;
  const bool jump = new_strip || next.key != j + strip;
  if (dropout) s.dropout.draw(plan, j, keys);
  const auto ahead = [&](auto &column, const sat_tensor &t, int64_t row)
                         SAT_LAMBDA { prefetch<0>(column, at(t, next, row), t.row_stride, width); };
  const auto touch = [&](auto &column, const sat_tensor &t, int64_t row)
                         SAT_LAMBDA { prefetch<1>(column, at(t, next, row), t.row_stride, width); };
  product(keys, strip, k, call.k.row_stride, 1, s.q, strip, width,
          [&](int64_t i, int64_t c, auto &column) SAT_LAMBDA {
            if (turn(strip, c, 0) && jump) ahead(column, call.k, next.key + i);
            if (turn(strip, c, 1) && jump) ahead(column, call.v, next.key + i);
            if (turn(strip, c, 2) && new_strip) ahead(column, call.q, next_first + i);
            if (turn(strip, c, 3) && new_strip) ahead(column, call.d_o, next_first + i);
            const Vec norm = load(s.norm + c), rest = load(s.norm_rest + c);
            float *to = s.weights + i * strip + c;
#pragma GCC unroll 6
            for (Vec score : column) {
              store(to, exp2_below_128(score - norm - rest));
              to += strip;
            }
          });
  product(keys, strip, at(call.v, place, j), call.v.row_stride, 1, s.d_o, strip, width,
          [&](int64_t i, int64_t c, auto &column) SAT_LAMBDA {
            if (turn(strip, c, 0) && new_strip) ahead(column, call.o, next_first + i);
            if (turn(strip, c, 1) && sides.key_side && jump) touch(column, call.dk, next.key + i);
            if (turn(strip, c, 2) && sides.key_side && jump) touch(column, call.dv, next.key + i);
            if (turn(strip, c, 3) && sides.fresh_q)
              prefetch<1>(column, sides.dq + i * sides.dq_row, sides.dq_row, width);
            const Vec delta = load(s.delta + c);
            float *p = s.weights + i * strip + c;
            float *to = s.d_scores + i * strip + c;
            const float *factor = s.dropout.factors + i * strip + c;
#pragma GCC unroll 6
            for (Vec d_weight : column) {
              const Vec weight = load(p);
              if (dropout) {
                d_weight *= load(factor);
                store(p, weight * load(factor));
                factor += strip;
              }
              store(to, weight * (d_weight - delta));
              p += strip;
              to += strip;
            }
          });
  if (sides.query_side)
    add_product(sides.fresh_q, strip, width, s.d_scores, 1, strip, k, call.k.row_stride, keys,
                sides.dq, sides.dq_row);
  if (sides.key_side) {
    const auto add = [&](const float *weights, const sat_tensor &x,
                         const sat_tensor &to) SAT_LAMBDA {
      add_product(sides.fresh_k, keys, width, weights, strip, 1, at(x, place, first), x.row_stride,
                  rows, at(to, place.batch, place.head, j), to.row_stride);
    };
    add(s.weights, call.d_o, call.dv);
    add(s.d_scores, call.q, call.dk);
  }
}

// Both ways of `backward` go through this one function, so that both give the same bits.
SAT_ALONE void backward_tile(const Plan &plan, const Place &place, int64_t n, int64_t rows,
                             const Place &next, const Sides &sides, BackwardScratch &s) {
  with_known_sizes(plan.strip, n, plan.call.problem.width,
                   [&](auto strip, auto keys, auto width) SAT_LAMBDA {
                     backward_tile_of(plan, place, strip, keys, width, rows, next, sides, s);
                   });
}

// Clears the rows of dK and dV of a chunk to which no strip gives anything; returns how many of its
// keys get something.
int64_t clear_chunk(const Plan &plan, int64_t batch, int64_t head, int64_t chunk) {
  const Call &call = plan.call;
  const int64_t first = chunk * plan.strip;
  const int64_t end = least(first + plan.strip, call.problem.length);
  int64_t keys = least(plan.real_keys(batch), end) - first;
  const int64_t index = plan.first_strip(chunk);
  if (keys < 0 || index < 0 || index * plan.strip >= plan.real_queries(batch)) keys = 0;
  plan.clear_rows(call.dk, batch, head, first + keys, end);
  plan.clear_rows(call.dv, batch, head, first + keys, end);
  return keys;
}

// dQ of a strip, and with key_side its part of dK and dV.
void backward_strip(const Plan &plan, int64_t batch, int64_t head, int64_t index, bool key_side,
                    BackwardScratch &s) {
  const Call &call = plan.call;
  const int64_t width = call.problem.width, strip = plan.strip, first = index * strip;
  const int64_t rows = prepare(plan, batch, head, index, s);
  plan.clear_rows(call.dq, batch, head, first + rows, least(first + strip, call.problem.length));
  if (rows == 0) return;
  float *dq = at(call.dq, batch, head, first);
  const bool in_place = rows == strip;
  plan.for_each_chunk(batch, head, index,
                      [&](const Place &place, int64_t n, bool fresh, const Place &next) {
                        const Sides sides = {true,
                                             fresh,
                                             key_side,
                                             plan.first_strip(place.key / strip) == index,
                                             in_place ? dq : s.dq,
                                             in_place ? call.dq.row_stride : width};
                        backward_tile(plan, place, n, rows, next, sides, s);
                      });
  if (in_place) return;
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(dq + r * call.dq.row_stride, s.dq + r * width, width * sizeof(float));
}

// dK and dV of a chunk.
void backward_chunk(const Plan &plan, int64_t batch, int64_t head, int64_t chunk,
                    BackwardScratch &s) {
  const int64_t keys = clear_chunk(plan, batch, head, chunk);
  if (keys == 0) return;
  plan.for_each_strip(chunk, [&](int64_t index) {
    const int64_t rows = prepare(plan, batch, head, index, s);
    if (rows == 0) return;
    const Place place = {batch, head, index, chunk * plan.strip};
    const Sides sides = {false, false, true, plan.first_strip(chunk) == index, nullptr, 0};
    backward_tile(plan, place, keys, rows, place, sides, s);
  });
}

// With a (batch, head) for every thread one pass of five products; with fewer, a pass over strips
// for dQ and one over chunks for dK and dV, seven products that more threads can share.
int backward(const Call &call) {
  const Plan plan(call);
  const int64_t width = call.problem.width, heads = call.problem.heads, strip = plan.strip;
  const int64_t floats = BackwardScratch::floats(width, strip);
  if (plan.pairs >= call.num_threads)
    return parallel(plan.pairs, call.num_threads, floats, [&](int64_t pair, float *scratch) {
      BackwardScratch s(scratch, width, strip);
      const int64_t batch = pair / heads, head = pair % heads;
      for (int64_t index = 0; index < plan.num_strips; ++index) {
        clear_chunk(plan, batch, head, index);
        backward_strip(plan, batch, head, index, true, s);
      }
    });
  const int64_t half = plan.pairs * plan.num_strips;
  return parallel(2 * half, call.num_threads, floats, [&](int64_t task, float *scratch) {
    BackwardScratch s(scratch, width, strip);
    const int64_t pair = task % half / plan.num_strips, index = task % plan.num_strips;
    if (task < half)
      backward_strip(plan, pair / heads, pair % heads, index, false, s);
    else
      backward_chunk(plan, pair / heads, pair % heads, index, s);
  });
}

}  // namespace

#define SAT_QUOTE_(x) #x
#define SAT_QUOTE(x) SAT_QUOTE_(x)
#if defined(__aarch64__)
const InstructionSet instruction_set = {"neon", SAT_LANES, forward, backward};
#else
const InstructionSet instruction_set = {SAT_QUOTE(SAT_SET), SAT_LANES, forward, backward};
#endif

}  // namespace SAT_SET
}  // namespace sat
