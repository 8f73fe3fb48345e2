// Where a level keeps the activations of a product: as tiles of rows, or, for AMX, of pairs, because there the weights
// are the rows. Weights expand faster as rows: the numbers of one row share a scale.
#pragma once

#include "kernels.h"
#include "simd.h"

static inline size_t panel_place(int row, int input, int inputs) {
  const size_t tile = ((size_t)(row / 16) * (inputs / 32) + input / 32) * TILE;
#if LOCI_LEVEL >= LOCI_AMX
  return tile + input % 32 / 2 * 32 + row % 16 * 2 + input % 2;
#else
  return tile + row % 16 * 32 + input % 32;
#endif
}

#if LOCI_LEVEL > LOCI_SCALAR

// 16 numbers of a row, from `input` on.
static inline void put(bf16 *panels, int row, int input, int inputs, Floats x) {
  bf16 *to = panels + panel_place(row, input, inputs);
#if LOCI_LEVEL >= LOCI_AMX
  alignas(32) bf16 rounded[16];
  store_bf16(rounded, x);
  for (int pair = 0; pair < 8; pair++) memcpy(to + pair * 32, rounded + pair * 2, 2 * sizeof(bf16));
#else
  store_bf16(to, x);
#endif
}

#endif
