// Attention of tiles of 16 queries to pages of one row's cache.
//
// A page holds 128 slots of one layer and key-value head: keys as tiles [slot / 16][dimension / 32], a tile's pairs being
// dimensions and its columns slots; values as tiles [slot / 32][dimension / 16], pairs being slots and columns dimensions.
//
// Source  softmax page by page with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867).
// Ours    all tiles of a row meet a page while it is in the cache; segments of 1,024 slots run side by side and are put
//         together at the end. A page or a segment that a query does not see at all changes nothing, to the bit: sums are
//         multiplied by exactly one or zero. So a node's result does not depend on nodes beside it.
#pragma once

#include <math.h>

#include "kernels.h"
#include "simd.h"
#include "tiles.h"

// Bit i: whether the query sees slot first + i, for 16 slots.
static inline uint32_t visible(const uint64_t *seen, int past, int slots, int first) {
  uint32_t bits = 0xffff;
  if (first + 16 > past) {
    if (first >= past) {
      int place = first - past;
      uint64_t word = seen[place / 64] >> (place % 64);
      // Rows of bits end with an empty word, so that reading one further is allowed.
      if (place % 64 > 48) word |= seen[place / 64 + 1] << (64 - place % 64);
      bits = (uint32_t)word & 0xffff;
    } else {
      int before = past - first;
      bits = ((1u << before) - 1) | ((uint32_t)(seen[0] << before) & 0xffff);
    }
  }
  int left = slots - first;
  if (left < 16) bits &= left <= 0 ? 0 : (1u << left) - 1;
  return bits;
}

static inline size_t key_place(int slot, int dimension, int head_size) {
  return ((size_t)(slot / 16) * (head_size / 32) + dimension / 32) * TILE + dimension % 32 / 2 * 32 + slot % 16 * 2 +
         dimension % 2;
}

static inline size_t value_place(int slot, int dimension, int head_size) {
  return ((size_t)(slot / 32) * (head_size / 16) + dimension / 16) * TILE + slot % 32 / 2 * 32 + dimension % 16 * 2 +
         slot % 2;
}

static inline void attend_scalar(const Attention &call) {
  const int size = call.head_size;
  for (int tile = 0; tile < call.tiles; tile++)
    for (int query = 0; query < call.counts[tile]; query++) {
      float *partial = call.partial + tile * call.partial_stride, *output = partial + query * size;
      const bf16 *x = call.queries + ((size_t)tile * 16 + query) * size;
      float best = HIDDEN, total = 0.0f;
      for (int pass = 0; pass < 2; pass++) {
        if (pass)
          for (int i = 0; i < size; i++) output[i] = 0.0f;
        for (int slot = call.first_page * PAGE; slot < call.end_page * PAGE && slot < call.slots[tile]; slot++) {
          if (!(visible(call.seen[tile * 16 + query], call.past, call.slots[tile], slot) & 1)) continue;
          const uint8_t *page = call.pages[slot / PAGE];
          const bf16 *keys = (const bf16 *)(page + call.keys), *values = (const bf16 *)(page + call.values);
          float score = 0.0f;
          for (int i = 0; i < size; i++) score += from_bf16(x[i]) * from_bf16(keys[key_place(slot % PAGE, i, size)]);
          if (!pass) {
            if (score > best) best = score;
            continue;
          }
          const float weight = expf((score - best) * call.scale);
          total += weight;
          for (int i = 0; i < size; i++)
            output[i] += from_bf16(to_bf16(weight)) * from_bf16(values[value_place(slot % PAGE, i, size)]);
        }
      }
      partial[16 * size + query] = best;
      partial[16 * size + 16 + query] = total;
    }
}

static inline void combine_scalar(const float *partial, size_t stride, int segments, int query, int size, float scale,
                                  float *values) {
  float best = HIDDEN, total = 0.0f;
  for (int segment = 0; segment < segments; segment++) {
    const float highest = partial[segment * stride + 16 * size + query];
    if (highest > best) best = highest;
  }
  for (int i = 0; i < size; i++) values[i] = 0.0f;
  for (int segment = 0; segment < segments; segment++) {
    const float *part = partial + segment * stride, factor = expf((part[16 * size + query] - best) * scale);
    total += part[16 * size + 16 + query] * factor;
    for (int i = 0; i < size; i++) values[i] += part[query * size + i] * factor;
  }
  for (int i = 0; i < size; i++) values[i] /= total;
}

#if LOCI_LEVEL > LOCI_SCALAR

#if LOCI_LEVEL >= LOCI_AMX

static inline void page_scores(const bf16 *queries, int, int size, const bf16 *keys, int tiles, float *scores) {
  const int deep = size / 32;
  for (int tile = 0; tile < tiles; tile += 2, keys += 2 * deep * TILE) {
    tile_zero<0>(), tile_zero<1>();
    for (int part = 0; part < deep; part++) {
      tile_load<4>(queries + part * 32, (size_t)size * 2);
      tile_load<6>(keys + part * TILE, 64);
      tile_load<7>(keys + (deep + part) * TILE, 64);
      tile_multiply<0, 4, 6>();
      tile_multiply<1, 4, 7>();
    }
    tile_store<0>(scores + tile * 16, PAGE * 4);
    tile_store<1>(scores + tile * 16 + 16, PAGE * 4);
  }
}

static inline void page_values(const bf16 *weights, int, int size, const bf16 *values, int tiles, float *sums) {
  for (int part = 0; part < size; part += 32) {
    float *output = sums + part;
    tile_load<0>(output, (size_t)size * 4);
    tile_load<1>(output + 16, (size_t)size * 4);
    for (int tile = 0; tile < tiles; tile += 2) {
      const bf16 *from = values + ((size_t)tile / 2 * (size / 16) + part / 16) * TILE;
      tile_load<4>(weights + tile * 16, PAGE * 2);
      tile_load<6>(from, 64);
      tile_load<7>(from + TILE, 64);
      tile_multiply<0, 4, 6>();
      tile_multiply<1, 4, 7>();
    }
    tile_store<0>(output, (size_t)size * 4);
    tile_store<1>(output + 16, (size_t)size * 4);
  }
}

#else

static inline void page_scores(const bf16 *queries, int count, int size, const bf16 *keys, int tiles, float *scores) {
  for (int query = 0; query < count; query++) {
    const bf16 *x = queries + query * size, *from = keys;
    for (int tile = 0; tile < tiles; tile++) {
      Floats one = every(0.0f), two = every(0.0f), first, second;
      for (int pair = 0; pair < size / 2; pair++, from += 32) {
        load_pairs(from, first, second);
        one = multiply_add(every(from_bf16(x[pair * 2])), first, one);
        two = multiply_add(every(from_bf16(x[pair * 2 + 1])), second, two);
      }
      store(scores + query * PAGE + tile * 16, one + two);
    }
  }
}

static inline void page_values(const bf16 *weights, int count, int size, const bf16 *values, int tiles, float *sums) {
  for (int query = 0; query < count; query++)
    for (int part = 0; part < size; part += 16) {
      float *output = sums + query * size + part;
      Floats one = load(output), two = every(0.0f), first, second;
      for (int tile = 0; tile < tiles; tile += 2) {
        const bf16 *from = values + ((size_t)tile / 2 * (size / 16) + part / 16) * TILE;
        const bf16 *x = weights + query * PAGE + tile * 16;
        for (int pair = 0; pair < 16; pair++, from += 32) {
          load_pairs(from, first, second);
          one = multiply_add(every(from_bf16(x[pair * 2])), first, one);
          two = multiply_add(every(from_bf16(x[pair * 2 + 1])), second, two);
        }
      }
      store(output, one + two);
    }
}

#endif

// The softmax of a page's scores: weights, and the running peaks and sums. In three rounds over the queries, so that one
// query's long chains (a peak, then exponentials) run while the next ones' begin.
template <bool whole>
static inline void weigh(const Attention &call, int tile, int first, int some, float *scores, bf16 *weights, float *sums,
                         float *best, float *total) {
  const int size = call.head_size, count = call.counts[tile], tiles = whole ? PAGE / 16 : some;
  const Floats scale = every(call.scale);
  float highest[16];
  for (int query = 0; query < count; query++) {
    float *row = scores + query * PAGE;
    Floats peak = every(HIDDEN);
    if (first + PAGE > call.past)
      for (int part = 0; part < tiles; part++) {
        const uint32_t bits = visible(call.seen[tile * 16 + query], call.past, call.slots[tile], first + part * 16);
        store(row + part * 16, choose(bits, load(row + part * 16), every(HIDDEN)));
      }
    for (int part = 0; part < tiles; part++) peak = larger(peak, load(row + part * 16));
    highest[query] = largest(peak);
  }
  for (int query = 0; query < count; query++) {
    if (highest[query] <= best[query]) continue;
    const Floats shrink = exponential(every((best[query] - highest[query]) * call.scale));
    float *output = sums + query * size, factor[16];
    for (int i = 0; i < size; i += 16) store(output + i, load(output + i) * shrink);
    store(factor, shrink);
    total[query] *= factor[0];
    best[query] = highest[query];
  }
  for (int query = 0; query < count; query++) {
    const float *row = scores + query * PAGE;
    const Floats shift = every(-best[query] * call.scale);
    Floats all = every(0.0f);
    for (int part = 0; part < tiles; part++) {
      const Floats weight = exponential(multiply_add(load(row + part * 16), scale, shift));
      all = all + weight;
      store_bf16(weights + query * PAGE + part * 16, weight);
    }
    total[query] += sum(all);
  }
}

// One page and one tile of queries.
static inline void attend_page(const Attention &call, int tile, int page, float *sums, float *best, float *total) {
  const int size = call.head_size, count = call.counts[tile], first = page * PAGE, left = call.slots[tile] - first;
  const int tiles = ((left < PAGE ? left : PAGE) + 31) / 32 * 2;
  const uint8_t *data = call.pages[page];
  float *scores = call.scratch;
  bf16 *weights = (bf16 *)(call.scratch + 16 * PAGE);
  page_scores(call.queries + (size_t)tile * 16 * size, count, size, (const bf16 *)(data + call.keys), tiles, scores);
  if (tiles == PAGE / 16)
    weigh<true>(call, tile, first, tiles, scores, weights, sums, best, total);
  else
    weigh<false>(call, tile, first, tiles, scores, weights, sums, best, total);
  page_values(weights, count, size, (const bf16 *)(data + call.values), tiles, sums);
}

static inline void attend_fast(const Attention &call) {
  const int size = call.head_size;
  // Rows of weights that belong to no query count nothing, but must be numbers.
  for (int i = 0; i < 16 * (PAGE + PAGE / 2); i += 16) store(call.scratch + i, every(0.0f));
  for (int tile = 0; tile < call.tiles; tile++) {
    float *sums = call.partial + tile * call.partial_stride;
    for (int i = 0; i < 16 * size; i += 16) store(sums + i, every(0.0f));
    store(sums + 16 * size, every(HIDDEN));
    store(sums + 16 * size + 16, every(0.0f));
  }
  for (int page = call.first_page; page < call.end_page; page++)
    for (int tile = 0; tile < call.tiles; tile++) {
      float *sums = call.partial + tile * call.partial_stride;
      if (page * PAGE < call.slots[tile])
        attend_page(call, tile, page, sums, sums + 16 * size, sums + 16 * size + 16);
    }
}

static inline void combine_fast(const float *partial, size_t stride, int segments, int query, int size, float scale,
                                float *values) {
  float best = HIDDEN;
  for (int segment = 0; segment < segments; segment++) {
    const float highest = partial[segment * stride + 16 * size + query];
    if (highest > best) best = highest;
  }
  Floats total = every(0.0f);
  for (int i = 0; i < size; i += 16) store(values + i, every(0.0f));
  for (int segment = 0; segment < segments; segment++) {
    const float *part = partial + segment * stride;
    const Floats factor = exponential(every((part[16 * size + query] - best) * scale));
    total = multiply_add(every(part[16 * size + 16 + query]), factor, total);
    for (int i = 0; i < size; i += 16)
      store(values + i, multiply_add(load(part + query * size + i), factor, load(values + i)));
  }
  const Floats share = every(1.0f) / total;
  for (int i = 0; i < size; i += 16) store(values + i, load(values + i) * share);
}

#endif
