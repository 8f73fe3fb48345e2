// A strip of a matrix times many rows of activations.
//
// Each product is summed over ascending inputs in one accumulator (AVX: in its 16 lanes, which are added up at the end),
// whatever the number of rows. So a row's result does not depend on the rows beside it.
#pragma once

#include "blocks.h"
#include "kernels.h"
#include "panels.h"
#include "simd.h"
#include "tiles.h"

static inline void multiply_scalar(const Matrix &matrix, int strip, const bf16 *panels, int rows, float *output,
                                   int stride, bf16 *tiles) {
  const size_t bytes = half_block_bytes(matrix.format);
  for (int half = 0; half < 2 * matrix.blocks(); half++)
    expand_scalar(matrix.format, strip_data(matrix, strip) + half * bytes, tiles + half * TILE);
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < STRIP; i++) {
      float total = 0.0f;
      for (int input = 0; input < matrix.inputs; input++) {
        const bf16 weight = tiles[((size_t)(input / 32) * 2 + i / 16) * TILE + i % 16 * 32 + input % 32];
        total += from_bf16(weight) * from_bf16(panels[panel_place(row, input, matrix.inputs)]);
      }
      output[(size_t)row * stride + i] = total;
    }
}

#if LOCI_LEVEL > LOCI_SCALAR

// Call half blocks into the caches: those 48 ahead into the second level, those 4 ahead into the first. By measurement.
static inline void fetch(const uint8_t *half, size_t half_bytes, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) {
    _mm_prefetch((const char *)(half + 48 * half_bytes + line), _MM_HINT_T1);
    _mm_prefetch((const char *)(half + 4 * half_bytes + line), _MM_HINT_T0);
  }
}

template <Format format>
static inline void expand_strip(const Matrix &matrix, int strip, bf16 *tiles) {
  const size_t bytes = half_block_bytes(format);
  const uint8_t *half = strip_data(matrix, strip);
  for (int tile = 0; tile < 2 * matrix.blocks(); tile++, half += bytes, tiles += TILE) {
    fetch(half, bytes, bytes);
    expand_as<format>(half, tiles);
  }
}

#if LOCI_LEVEL < LOCI_AMX

// Some outputs of one half strip times some rows.
template <int outputs, int rows>
static inline void multiply_some(const bf16 *tiles, int blocks, const bf16 *panel, float *output, int stride) {
  Floats sums[outputs][rows];
  for (int i = 0; i < outputs; i++)
    for (int row = 0; row < rows; row++) sums[i][row] = every(0.0f);
  for (int block = 0; block < blocks; block++, tiles += 2 * TILE, panel += TILE) {
    Floats x[rows][2];
    for (int row = 0; row < rows; row++) load_pairs(panel + row * 32, x[row][0], x[row][1]);
    for (int i = 0; i < outputs; i++) {
      Floats first, second;
      load_pairs(tiles + i * 32, first, second);
      for (int row = 0; row < rows; row++)
        sums[i][row] = multiply_add(second, x[row][1], multiply_add(first, x[row][0], sums[i][row]));
    }
  }
  for (int i = 0; i < outputs; i++)
    for (int row = 0; row < rows; row++) output[(size_t)row * stride + i] = sum(sums[i][row]);
}

template <Format format>
static void multiply_as(const Matrix &matrix, int strip, const bf16 *panels, int rows, float *output, int stride,
                        bf16 *tiles) {
  // What the registers hold.
  const int outputs = LOCI_LEVEL == LOCI_AVX2 ? 2 : 4, together = LOCI_LEVEL == LOCI_AVX2 ? 2 : 4;
  expand_strip<format>(matrix, strip, tiles);
  for (int row = 0; row < rows;) {
    const bf16 *panel = panels + panel_place(row, 0, matrix.inputs);
    const int step = rows - row >= together ? together : 1;
    for (int i = 0; i < STRIP; i += outputs) {
      const bf16 *from = tiles + i / 16 * TILE + i % 16 * 32;
      float *to = output + (size_t)row * stride + i;
      if (step == together)
        multiply_some<outputs, together>(from, matrix.blocks(), panel, to, stride);
      else
        multiply_some<outputs, 1>(from, matrix.blocks(), panel, to, stride);
    }
    row += step;
  }
}

#else

// Sums lie as [output][row] in four tiles: two halves of the strip by two panels. Write them row by row.
static inline void write_turned(const float *sums, int rows, float *output, int stride) {
  const __m512i places = _mm512_mullo_epi32(_mm512_set1_epi32(16), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5,
                                                                                    4, 3, 2, 1, 0));
  if (rows <= 3) {
    for (int row = 0; row < rows; row++)
      _mm512_storeu_ps(output + (size_t)row * stride, _mm512_i32gather_ps(places, sums + row, 4));
    return;
  }
  // Four rounds of exchanges: of pairs, of fours, of eights, of halves.
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(sums + i * 16);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
    a[i + 4] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int row = 0; row < 16; row++)
    if (row < rows) _mm512_storeu_ps(output + (size_t)row * stride, a[row]);
}

template <bool two>
static inline void write_sums(int rows, float *output, int stride) {
  alignas(64) float sums[4][256];
  tile_store<0>(sums[0], 64);
  tile_store<1>(sums[1], 64);
  if (two) tile_store<2>(sums[2], 64), tile_store<3>(sums[3], 64);
  for (int half = 0; half < 2; half++) {
    write_turned(sums[half], rows < 16 ? rows : 16, output + half * 16, stride);
    if (two) write_turned(sums[2 + half], rows - 16, output + (size_t)16 * stride + half * 16, stride);
  }
}

// Up to 32 rows: weights are expanded right before they are used and never leave the first-level cache.
template <Format format, bool two>
static inline void multiply_few(const Matrix &matrix, int strip, const bf16 *panels, int rows, float *output, int stride) {
  const size_t bytes = half_block_bytes(format), panel = (size_t)matrix.blocks() * TILE;
  const uint8_t *half = strip_data(matrix, strip);
  alignas(64) bf16 tiles[4][TILE];  // two blocks in turn, so that expanding one does not wait for the other's loads
  tile_zero<0>(), tile_zero<1>();
  if (two) tile_zero<2>(), tile_zero<3>();
  for (int block = 0; block < matrix.blocks(); block++, half += 2 * bytes, panels += TILE) {
    const bf16 *left = tiles[block % 2 * 2], *right = tiles[block % 2 * 2 + 1];
    fetch(half, bytes, 2 * bytes);
    if (format == BF16) {
      left = (const bf16 *)half, right = (const bf16 *)(half + bytes);
    } else {
      expand_as<format>(half, tiles[block % 2 * 2]);
      expand_as<format>(half + bytes, tiles[block % 2 * 2 + 1]);
    }
    tile_load<6>(panels, 64);
    tile_load<4>(left, 64);
    tile_multiply<0, 4, 6>();
    tile_load<5>(right, 64);
    tile_multiply<1, 5, 6>();
    if (two) {
      tile_load<7>(panels + panel, 64);
      tile_multiply<2, 4, 7>();
      tile_multiply<3, 5, 7>();
    }
  }
  write_sums<two>(rows, output, stride);
}

// 33 to 64 rows: one half of the strip after the other, each of its tiles against all four panels.
template <Format format>
static inline void multiply_some(const Matrix &matrix, int strip, const bf16 *panels, int rows, float *output, int stride) {
  const size_t bytes = half_block_bytes(format), panel = (size_t)matrix.blocks() * TILE;
  alignas(64) bf16 tiles[2][TILE];
  alignas(64) float sums[4][256];
  for (int part = 0; part < 2; part++) {
    const uint8_t *half = strip_data(matrix, strip) + part * bytes;
    const bf16 *x = panels;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int block = 0; block < matrix.blocks(); block++, half += 2 * bytes, x += TILE) {
      const bf16 *weights = format == BF16 ? (const bf16 *)half : tiles[block % 2];
      fetch(half, bytes, bytes);
      if (format != BF16) expand_as<format>(half, tiles[block % 2]);
      tile_load<4>(weights, 64);
      tile_load<6>(x, 64);
      tile_multiply<0, 4, 6>();
      tile_load<7>(x + panel, 64);
      tile_multiply<1, 4, 7>();
      tile_load<6>(x + 2 * panel, 64);
      tile_multiply<2, 4, 6>();
      if (rows > 48) {
        tile_load<7>(x + 3 * panel, 64);
        tile_multiply<3, 4, 7>();
      }
    }
    tile_store<0>(sums[0], 64);
    tile_store<1>(sums[1], 64);
    tile_store<2>(sums[2], 64);
    tile_store<3>(sums[3], 64);
    for (int row = 0; row < rows; row += 16)
      write_turned(sums[row / 16], rows - row < 16 ? rows - row : 16, output + (size_t)row * stride + part * 16, stride);
  }
}

// More rows: the strip is expanded once, and every pair of panels meets it.
template <Format format>
static inline void multiply_many(const Matrix &matrix, int strip, const bf16 *panels, int rows, float *output,
                                 int stride, bf16 *tiles) {
  const size_t panel = (size_t)matrix.blocks() * TILE;
  if (format != BF16) expand_strip<format>(matrix, strip, tiles);
  const bf16 *weights = format == BF16 ? (const bf16 *)strip_data(matrix, strip) : tiles;
  for (; rows > 0; rows -= 32, panels += 2 * panel, output += (size_t)32 * stride) {
    const bf16 *from = weights;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    if (rows > 16) {
      for (int block = 0; block < matrix.blocks(); block++, from += 2 * TILE) {
        tile_load<6>(panels + (size_t)block * TILE, 64);
        tile_load<4>(from, 64);
        tile_multiply<0, 4, 6>();
        tile_load<5>(from + TILE, 64);
        tile_multiply<1, 5, 6>();
        tile_load<7>(panels + panel + (size_t)block * TILE, 64);
        tile_multiply<2, 4, 7>();
        tile_multiply<3, 5, 7>();
      }
      write_sums<true>(rows < 32 ? rows : 32, output, stride);
    } else {
      for (int block = 0; block < matrix.blocks(); block++, from += 2 * TILE) {
        tile_load<6>(panels + (size_t)block * TILE, 64);
        tile_load<4>(from, 64);
        tile_multiply<0, 4, 6>();
        tile_load<5>(from + TILE, 64);
        tile_multiply<1, 5, 6>();
      }
      write_sums<false>(rows, output, stride);
    }
  }
}

template <Format format>
static void multiply_as(const Matrix &matrix, int strip, const bf16 *panels, int rows, float *output, int stride,
                        bf16 *tiles) {
  if (rows <= 16)
    multiply_few<format, false>(matrix, strip, panels, rows, output, stride);
  else if (rows <= 32)
    multiply_few<format, true>(matrix, strip, panels, rows, output, stride);
  else if (rows <= 64 && format != BF16)
    multiply_some<format>(matrix, strip, panels, rows, output, stride);
  else
    multiply_many<format>(matrix, strip, panels, rows, output, stride, tiles);
}

#endif

static inline void multiply_fast(const Matrix &matrix, int strip, const bf16 *panels, int rows, float *output,
                                 int stride, bf16 *tiles) {
  switch (matrix.format) {
    case Q4_0: return multiply_as<Q4_0>(matrix, strip, panels, rows, output, stride, tiles);
    case Q4_1: return multiply_as<Q4_1>(matrix, strip, panels, rows, output, stride, tiles);
    case Q8_0: return multiply_as<Q8_0>(matrix, strip, panels, rows, output, stride, tiles);
    case BF16: return multiply_as<BF16>(matrix, strip, panels, rows, output, stride, tiles);
  }
}

#endif
