// Stands in for CUDA's header of this name; see emulation.hpp.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return x.bits >> 15 ? -value : value;
}

// To the nearest, ties to the even one; nearbyint rounds like that unless somebody changes the
// mode.
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  x = std::fabs(x);
  if (x >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(x, &exponent);                              // x = f 2^exponent with f in [1/2, 1)
  const int unit = x >= 0x1p-14f ? exponent - 11 : -24;  // the last bit of x as a half
  const int units = static_cast<int>(std::nearbyint(std::ldexp(x, -unit)));
  // A normal number: 1024 of the units are its leading bit, and one more for a carry fits by
  // itself.
  const int bits = unit == -24 ? units : ((unit + 24) << 10) + units;
  return {static_cast<uint16_t>(sign | bits)};
}
