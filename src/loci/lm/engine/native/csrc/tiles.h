// The matrix tiles of AMX: eight registers of 16 rows by 64 bytes, and the product of bf16 pairs into floats.
// Written as assembler because compilers' intrinsics do not say that a load reads memory.
#pragma once

#if LOCI_LEVEL >= LOCI_AMX

#include <cstdint>
#include <cstring>

static inline void tiles_begin() {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shape;
  memset(&shape, 0, sizeof shape);
  shape.palette = 1;
  for (int tile = 0; tile < 8; tile++) shape.rows[tile] = 16, shape.row_bytes[tile] = 64;
  asm volatile("ldtilecfg %0" ::"m"(shape));
}
static inline void tiles_end() { asm volatile("tilerelease"); }

template <int tile>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
static inline void tile_load(const void *from, size_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(tile) : "memory");
}
template <int tile>
static inline void tile_store(void *to, size_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(tile) : "memory");
}
// sum += rows (16 by 32 numbers) times columns (a tile of 16 pairs by 16 columns)
template <int sum, int rows, int columns>
static inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(rows), "i"(columns));
}

#endif
