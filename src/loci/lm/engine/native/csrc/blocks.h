// Blocks of quantised weights, and how a half block of 16 outputs by 32 inputs becomes a tile of rows in bf16.
//
// The GGUF formats hold 32 weights of one row in a block: Q4_0 (scale; 4-bit numbers minus 8), Q4_1 (scale, minimum;
// 4-bit numbers), Q8_0 (scale; signed bytes), scales and minima in fp16. Packed, 16 rows stand together:
//   Q4_0, Q4_1  [output / 2][input], the even output's number in the lower four bits of a byte, the odd one's above it
//   Q8_0        [output][input], a byte each
//   BF16        the tile itself
// and behind the numbers the 16 scales, for Q4_1 then the 16 minima. Scale times number is exact in float, so a weight is
// rounded once when the minimum is added and once to bf16, as in a bf16 copy of the model.
//
// With AVX-512 the 16 values that a row's 4-bit numbers can have are computed and rounded once, and one permutation looks
// up 32 weights: half the work of computing each.
#pragma once

#include "kernels.h"
#include "simd.h"

static inline float weight_of(Format format, const uint8_t *half, int output, int input) {
  const fp16 *scales = (const fp16 *)(half + (format == Q8_0 ? 512 : 256));
  switch (format) {
    case BF16: return from_bf16(((const bf16 *)half)[output * STRIP + input]);
    case Q8_0: return (float)(int8_t)half[output * STRIP + input] * from_fp16(scales[output]);
    default: break;
  }
  const uint8_t both = half[output / 2 * STRIP + input];
  const int number = output % 2 ? both >> 4 : both & 15;
  const float scale = from_fp16(scales[output]);
  return (float)number * scale + (format == Q4_1 ? from_fp16(scales[16 + output]) : -8.0f * scale);
}

static inline void expand_scalar(Format format, const uint8_t *half, bf16 *tile) {
  for (int output = 0; output < 16; output++)
    for (int input = 0; input < STRIP; input++)
      tile[output * STRIP + input] = to_bf16(weight_of(format, half, output, input));
}

#if LOCI_LEVEL > LOCI_SCALAR

#if LOCI_LEVEL >= LOCI_AVX512

// scale * number + minimum in bf16 for the numbers 0 to 15, twice.
static inline __m512i values_of(float scale, float minimum) {
  const __m512 numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 values = _mm512_fmadd_ps(numbers, _mm512_set1_ps(scale), _mm512_set1_ps(minimum));
#if LOCI_LEVEL >= LOCI_AMX
  return (__m512i)_mm512_cvtne2ps_pbh(values, values);
#else
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded({values}), 16)));
#endif
}

// Two outputs' 32 weights each.
static inline void expand_nibbles(const uint8_t *from, const float *scales, const float *minima, bf16 *rows) {
  const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
  // Of an index the lowest five bits count; the values stand there twice, so that the fifth does not matter.
  _mm512_storeu_si512(rows, _mm512_permutexvar_epi16(both, values_of(scales[0], minima[0])));
  _mm512_storeu_si512(rows + STRIP, _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), values_of(scales[1], minima[1])));
}

#else

static inline void expand_nibbles(const uint8_t *from, const float *scales, const float *minima, bf16 *rows) {
  for (int part = 0; part < STRIP; part += 16) {
    Floats even, odd;
    load_nibbles(from + part, even, odd);
    store_bf16(rows + part, multiply_add(even, every(scales[0]), every(minima[0])));
    store_bf16(rows + STRIP + part, multiply_add(odd, every(scales[1]), every(minima[1])));
  }
}

#endif

// Compilers would rather pick numbers out of a register, which costs two shuffles each, than read them from memory.
static inline void in_memory(const float *numbers) { asm volatile("" ::"r"(numbers) : "memory"); }

template <Format format>
static inline void expand_as(const uint8_t *half, bf16 *tile) {
  if (format == BF16) {
    memcpy(tile, half, TILE * sizeof(bf16));
    return;
  }
  float scales[16], minima[16];
  const Floats scale = load_fp16((const fp16 *)(half + (format == Q8_0 ? 512 : 256)));
  store(scales, scale);
  in_memory(scales);
  if (format == Q8_0) {
#pragma GCC unroll 16
    for (int output = 0; output < 16; output++) {
      const uint8_t *from = half + output * STRIP;
      const Floats factor = every(scales[output]);
      store_bf16(tile + output * STRIP, load_bytes(from) * factor, load_bytes(from + 16) * factor);
    }
    return;
  }
  store(minima, format == Q4_1 ? load_fp16((const fp16 *)(half + 288)) : scale * every(-8.0f));
  in_memory(minima);
#pragma GCC unroll 8
  for (int output = 0; output < 16; output += 2)
    expand_nibbles(half + output / 2 * STRIP, scales + output, minima + output, tile + output * STRIP);
}

static inline void expand_fast(Format format, const uint8_t *half, bf16 *tile) {
  switch (format) {
    case Q4_0: return expand_as<Q4_0>(half, tile);
    case Q4_1: return expand_as<Q4_1>(half, tile);
    case Q8_0: return expand_as<Q8_0>(half, tile);
    case BF16: return expand_as<BF16>(half, tile);
  }
}

#endif
