// Sixteen floats at once, the width in which all fast kernels are written: one register of AVX-512, two of AVX2.
// LOCI_LEVEL says for which instruction set this translation unit is compiled; the scalar level has none of this.
#pragma once

#include "numbers.h"

#define LOCI_SCALAR 0
#define LOCI_AVX2 1
#define LOCI_AVX512 2
#define LOCI_AMX 3  // AVX-512 with bf16 conversion, and matrix tiles for the products

#if LOCI_LEVEL > LOCI_SCALAR
#include <immintrin.h>
#endif

#if LOCI_LEVEL >= LOCI_AVX512

struct Floats {
  __m512 v;
};

static inline Floats load(const float *from) { return {_mm512_loadu_ps(from)}; }
static inline void store(float *to, Floats a) { _mm512_storeu_ps(to, a.v); }
static inline Floats every(float value) { return {_mm512_set1_ps(value)}; }
static inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
static inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
// Lanes whose bit is set come from a, the others from b.
static inline Floats choose(uint32_t bits, Floats a, Floats b) { return {_mm512_mask_blend_ps((__mmask16)bits, b.v, a.v)}; }
static inline uint32_t above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// Of 16 pairs of bf16, the first ones and the second ones.
static inline void load_pairs(const bf16 *from, Floats &first, Floats &second) {
  __m512i pairs = _mm512_loadu_si512(from);
  first.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}
static inline __m512i rounded(Floats a) {  // the upper 16 bits of every lane are the bf16
  __m512i bits = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
static inline void store_bf16(bf16 *to, Floats a) {
#if LOCI_LEVEL >= LOCI_AMX
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(a.v));
#else
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16)));
#endif
}
static inline void store_bf16(bf16 *to, Floats first, Floats second) {
#if LOCI_LEVEL >= LOCI_AMX
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
#else
  store_bf16(to, first);
  store_bf16(to + 16, second);
#endif
}
static inline Floats load_fp16(const fp16 *from) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from))}; }
// 16 bytes that hold two 4-bit numbers each: the lower ones and the upper ones.
static inline void load_nibbles(const uint8_t *from, Floats &lower, Floats &upper) {
  __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
  lower.v = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
  upper.v = _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
}
// 16 signed bytes.
static inline Floats load_bytes(const uint8_t *from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)))};
}
static inline Floats nearest_integer(Floats a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline Floats times_power_of_two(Floats a, Floats exponent) { return {_mm512_scalef_ps(a.v, exponent.v)}; }

#elif LOCI_LEVEL == LOCI_AVX2

struct Floats {
  __m256 a, b;
};

static inline Floats load(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
static inline void store(float *to, Floats x) {
  _mm256_storeu_ps(to, x.a);
  _mm256_storeu_ps(to + 8, x.b);
}
static inline Floats every(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
static inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline Floats multiply_add(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline Floats smaller(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline float sum(Floats x) {
  __m256 half = _mm256_add_ps(x.a, x.b);
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
static inline float largest(Floats x) {
  __m256 half = _mm256_max_ps(x.a, x.b);
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
static inline __m256 lanes(uint32_t bits) {  // all ones in the lanes whose bit is set
  const __m256i each = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each));
}
static inline Floats choose(uint32_t bits, Floats x, Floats y) {
  return {_mm256_blendv_ps(y.a, x.a, lanes(bits)), _mm256_blendv_ps(y.b, x.b, lanes(bits >> 8))};
}
static inline uint32_t above(Floats x, Floats y) {
  uint32_t low = (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ));
  return low | (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)) << 8;
}
static inline void load_pairs(const bf16 *from, Floats &first, Floats &second) {
  const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
  __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + 16));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))};
}
static inline __m256i rounded(__m256 a) {
  __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
static inline void store_bf16(bf16 *to, Floats x) {
  __m256i a = _mm256_srli_epi32(rounded(x.a), 16), b = _mm256_srli_epi32(rounded(x.b), 16);
  _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8));
}
static inline void store_bf16(bf16 *to, Floats first, Floats second) {
  store_bf16(to, first);
  store_bf16(to + 16, second);
}
static inline Floats load_fp16(const fp16 *from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8)))};
}
static inline void load_nibbles(const uint8_t *from, Floats &lower, Floats &upper) {
  const __m256i mask = _mm256_set1_epi32(15);
  __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
  __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8)));
  lower = {_mm256_cvtepi32_ps(_mm256_and_si256(a, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(b, mask))};
  upper = {_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(b, 4))};
}
static inline Floats load_bytes(const uint8_t *from) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8))))};
}
static inline Floats nearest_integer(Floats x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 power_of_two(__m256 exponent) {  // for -126 to 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23));
}
static inline Floats times_power_of_two(Floats x, Floats exponent) {
  return {_mm256_mul_ps(x.a, power_of_two(exponent.a)), _mm256_mul_ps(x.b, power_of_two(exponent.b))};
}

#endif

#if LOCI_LEVEL > LOCI_SCALAR

// e^a for a up to 88, with a relative error below 3e-7; 0 below -87, where floats end. e^0 is exactly 1.
static inline Floats exponential(Floats a) {
  uint32_t inside = above(a, every(-87.0f));
  a = larger(a, every(-87.0f));
  Floats power = nearest_integer(a * every(1.44269504f));
  Floats rest = multiply_add(power, every(-0.693359375f), a);  // ln 2 in two parts, the first one exact
  rest = multiply_add(power, every(2.12194440e-4f), rest);
  Floats series = every(1.0f / 720);
  series = multiply_add(series, rest, every(1.0f / 120));
  series = multiply_add(series, rest, every(1.0f / 24));
  series = multiply_add(series, rest, every(1.0f / 6));
  series = multiply_add(series, rest, every(0.5f));
  series = multiply_add(series, rest, every(1.0f));
  series = multiply_add(series, rest, every(1.0f));
  return choose(inside, times_power_of_two(series, power), every(0.0f));
}

#endif
