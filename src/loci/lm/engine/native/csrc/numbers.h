// Half-precision numbers as the integers that hold them. bf16 is the upper half of a float; fp16 is IEEE 754 binary16.
// Functions are static: every instruction set is a translation unit of its own and must keep its own copies.
#pragma once

#include <cstdint>
#include <cstring>

typedef uint16_t bf16;
typedef uint16_t fp16;

// To the nearest, ties to the even one, as torch rounds.
static inline bf16 to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits += 0x7fff + ((bits >> 16) & 1);
  return (bf16)(bits >> 16);
}

static inline float from_bf16(bf16 value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

static inline float from_fp16(fp16 value) {
  uint32_t sign = (uint32_t)(value & 0x8000) << 16, exponent = (value >> 10) & 31, mantissa = value & 0x3ff, bits;
  float result;
  if (exponent == 0) {  // zero and subnormal numbers: a multiple of 2^-24
    result = (float)mantissa * 5.9604644775390625e-8f;
    return sign ? -result : result;
  }
  bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
  memcpy(&result, &bits, 4);
  return result;
}
