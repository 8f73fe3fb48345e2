// What an instruction set offers to the step: one table of kernels for each level, and the layouts they share.
//
// Strip    32 outputs of a matrix. Its weights follow each other in blocks of 32 inputs, each block as two halves of 16
//          outputs, so that a product reads its weights as one stream.
// Tile     512 numbers in bf16, 1 KiB, the shape of an AMX register; there are two kinds:
//          rows   [16][32], numbers of one row beside each other: an expanded half block is [output][input];
//          pairs  [16][16][2], pairs of numbers of one column beside each other: cached keys are [dimensions][slot][2],
//                 cached values [slots][dimension][2].
// Panels   activations of a product, 16 rows by 32 inputs a tile, [row / 16][input / 32]; of which kind is the level's
//          own affair (panels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.h"

enum Format { Q4_0 = 0, Q4_1 = 1, Q8_0 = 2, BF16 = 3 };

const int STRIP = 32;       // outputs of a strip, inputs of a block
const int TILE = 512;       // numbers of a tile
const int MAX_HEAD_SIZE = 512;
const int PAGE = 128;       // slots of a page of the cache
const float HIDDEN = -1e30f;  // the score of a slot that a node does not see

struct Matrix {
  Format format;
  int outputs, inputs;  // both filled up to whole strips and blocks
  uint8_t *data;

  int strips() const { return outputs / STRIP; }
  int blocks() const { return inputs / STRIP; }
};

static inline size_t half_block_bytes(Format format) {
  switch (format) {
    case Q4_0: return 256 + 32;
    case Q4_1: return 256 + 64;
    case Q8_0: return 512 + 32;
    default: return 1024;
  }
}

static inline const uint8_t *strip_data(const Matrix &matrix, int strip) {
  return matrix.data + (size_t)strip * matrix.blocks() * 2 * half_block_bytes(matrix.format);
}

// Queries of one key-value head and one row of the batch, and a segment of the row's slots. What they find there is
// partial: for each tile of 16 queries their sums of values (16, head_size), then each one's highest score, then each
// one's sum of weights. Segments begin at fixed slots, so that results do not depend on what else a step holds.
const int SEGMENT = 8;  // pages
const int TOGETHER = 8;  // tiles of queries that may share a read of keys and values

struct Attention {
  const bf16 *queries;  // (tiles, 16, head_size)
  int tiles, head_size;
  const int *counts, *slots;    // of each tile: its queries, and the slot from which on none of them sees any
  const uint64_t *const *seen;  // for each query, 16 a tile, bit i: whether it sees slot past + i; it sees all before
  const uint8_t *const *pages;  // of the row's cache
  size_t keys, values;          // where this layer's and head's parts begin in a page
  int past, first_page, end_page;
  float scale;
  float *partial;
  size_t partial_stride;  // from tile to tile
  float *scratch;         // 16 * (PAGE + PAGE / 2) floats
};

static inline size_t partial_size(int head_size) { return (size_t)16 * (head_size + 2); }

struct Kernels {
  const char *name;
  // Around a thread's share of a step.
  void (*begin)();
  void (*end)();
  // One half block as a tile.
  void (*expand)(Format format, const uint8_t *half, bf16 *tile);
  // output[row * stride + i] = the products of a strip's outputs i with the rows.
  // `tiles` has room for a whole strip: 2 * inputs / 32 tiles.
  void (*multiply)(const Matrix &matrix, int strip, const bf16 *panels, int rows, float *output, int stride, bf16 *tiles);
  void (*attend)(const Attention &attention);
  // One query's segments, `stride` floats apart, as its final values. `query` is its place in the tile.
  void (*combine)(const float *partial, size_t stride, int segments, int query, int head_size, float scale, float *values);
  // x / rms(x) * weight, into a row of panels and, where asked for, as floats.
  void (*normalise)(const float *x, const float *weight, float epsilon, int width, bf16 *panels, int row, float *plain);
  // The place of a number in panels.
  size_t (*panel_place)(int row, int input, int inputs);
  // Turn the pairs (i, i + half) of a head by the angles of a position.
  void (*rotate)(const float *head, const float *cosine, const float *sine, int half, bf16 *output);
  void (*add)(float *x, const float *y, int count);  // count in whole sixteens
  // 16 numbers into a row of panels from `input` on: as they are, or silu(gate) * up.
  void (*round)(const float *x, bf16 *panels, int row, int input, int inputs);
  void (*gate)(const float *gate, const float *up, bf16 *panels, int row, int input, int inputs);
  // y = weight x + bias, in floats; for injections. Bias may be null.
  void (*transform)(const float *weight, const float *bias, const float *x, int width, float *y);
  // Take the logits of 32 tokens, of which the first `count` exist, into a sorted list of the `ranks` largest. Tokens
  // must come in ascending order; of equal ones the first stays.
  void (*rank)(const float *logits, int count, int first_token, int ranks, int32_t *ids, float *best);
};

// Null where the level was not compiled.
const Kernels *scalar_kernels();
const Kernels *avx2_kernels();
const Kernels *avx512_kernels();
const Kernels *amx_kernels();
