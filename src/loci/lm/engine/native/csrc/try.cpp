// Single kernels of a level behind the C interface, so that tests can compare each with the scalar one.
#include <cstring>
#include <new>
#include <vector>

#include "model.h"

#define LOCI_LEVEL 0
#include "attention.h"

int loci_try_expand(int level, int format, const void *half_block, uint16_t *tile) {
  const Kernels *kernels = kernels_of(level);
  if (!kernels) return LOCI_BAD_LEVEL;
  if (format < Q4_0 || format > BF16) return LOCI_BAD_MATRIX;
  kernels->begin();
  kernels->expand((Format)format, (const uint8_t *)half_block, tile);
  kernels->end();
  return LOCI_DONE;
}

int loci_try_multiply(const LociModel *model, int level, int which, int layer, int strip, const float *x, int rows,
                      float *output) {
  const Kernels *kernels = kernels_of(level);
  const Matrix *matrix = const_cast<LociModel *>(model)->matrix(which, layer);
  if (!kernels) return LOCI_BAD_LEVEL;
  if (!matrix || !matrix->data || strip < 0 || strip >= matrix->strips() || rows < 1) return LOCI_BAD_MATRIX;
  const int whole = (rows + 15) / 16 * 16;
  Memory panels((size_t)whole * matrix->inputs * sizeof(bf16)), tiles((size_t)matrix->blocks() * 2 * TILE * sizeof(bf16));
  kernels->begin();
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < matrix->inputs; i += 16)
      kernels->round(x + (size_t)row * matrix->inputs + i, panels.as<bf16>(), row, i, matrix->inputs);
  kernels->multiply(*matrix, strip, panels.as<bf16>(), rows, output, STRIP, tiles.as<bf16>());
  kernels->end();
  return LOCI_DONE;
}

// `count` queries; keys and values are (past + nodes, head_size); `seen` holds two words a query, the second empty.
int loci_try_attend(int level, int head_size, int count, int past, int nodes, const uint64_t *seen,
                    const float *queries, const float *keys, const float *values, float scale, float *output) {
  const Kernels *kernels = kernels_of(level);
  if (!kernels) return LOCI_BAD_LEVEL;
  if (head_size < 32 || head_size % 32 || count < 1 || count > 16 || nodes < 1 || nodes > 64) return LOCI_BAD_SHAPE;
  const int slots = past + nodes, pages = (slots + PAGE - 1) / PAGE;
  const size_t part = (size_t)PAGE * head_size * sizeof(bf16);
  Memory cache(2 * part * pages), all((size_t)16 * head_size * sizeof(bf16));
  std::vector<const uint8_t *> places;
  for (int page = 0; page < pages; page++) places.push_back(cache.bytes() + 2 * part * page);
  for (int slot = 0; slot < slots; slot++)
    for (int i = 0; i < head_size; i++) {
      bf16 *page = (bf16 *)places[slot / PAGE];
      page[key_place(slot % PAGE, i, head_size)] = to_bf16(keys[(size_t)slot * head_size + i]);
      page[part / 2 + value_place(slot % PAGE, i, head_size)] = to_bf16(values[(size_t)slot * head_size + i]);
    }
  for (int i = 0; i < count * head_size; i++) all.as<bf16>()[i] = to_bf16(queries[i]);
  const uint64_t *bits[16];
  for (int query = 0; query < count; query++) bits[query] = seen + 2 * query;
  const int segments = (pages + SEGMENT - 1) / SEGMENT;
  const size_t size = partial_size(head_size);
  Memory partials(size * segments * sizeof(float)), scratch((size_t)16 * (PAGE + PAGE / 2) * sizeof(float));
  kernels->begin();
  for (int segment = 0; segment < segments; segment++) {
    const int first = segment * SEGMENT, end = first + SEGMENT < pages ? first + SEGMENT : pages;
    kernels->attend({all.as<bf16>(), 1, head_size, &count, &slots, bits, places.data(), 0, part, past, first, end, scale,
                     partials.as<float>() + segment * size, 0, scratch.as<float>()});
  }
  for (int query = 0; query < count; query++)
    kernels->combine(partials.as<float>(), size, segments, query, head_size, scale, output + query * head_size);
  kernels->end();
  return LOCI_DONE;
}

// what: 0 the norm of x by the weight y; 1 the head x turned by the cosines y and sines z; 2 silu(x) * y; 3 x + y;
// 4 the matrix z times x, plus y; 5 x rounded. `count` is the length of x, a multiple of 32. What goes into panels is read
// back from the last of 16 rows.
int loci_try_elementwise(int level, int what, int count, const float *x, const float *y, const float *z, float *output) {
  const Kernels *kernels = kernels_of(level);
  if (!kernels) return LOCI_BAD_LEVEL;
  if (count < 32 || count % 32) return LOCI_BAD_SHAPE;
  std::vector<bf16> rounded(16 * (size_t)count);
  kernels->begin();
  if (what == 0) {
    kernels->normalise(x, y, 1e-5f, count, rounded.data(), 15, output);
  } else if (what == 1) {
    kernels->rotate(x, y, z, count / 2, rounded.data());
  } else if (what == 2 || what == 5) {
    for (int i = 0; i < count; i += 16)
      what == 2 ? kernels->gate(x + i, y + i, rounded.data(), 15, i, count)
                : kernels->round(x + i, rounded.data(), 15, i, count);
  } else if (what == 3) {
    memcpy(output, x, (size_t)count * sizeof(float));
    kernels->add(output, y, count);
  } else {
    kernels->transform(z, y, x, count, output);
  }
  kernels->end();
  if (what == 1)
    for (int i = 0; i < count; i++) output[i] = from_bf16(rounded[i]);
  if (what == 2 || what == 5)
    for (int i = 0; i < count; i++) output[i] = from_bf16(rounded[kernels->panel_place(15, i, count)]);
  return LOCI_DONE;
}

int loci_try_rank(int level, int count, int ranks, const float *logits, int32_t *ids, float *best) {
  const Kernels *kernels = kernels_of(level);
  if (!kernels) return LOCI_BAD_LEVEL;
  if (ranks < 1 || ranks > count) return LOCI_BAD_RANKS;
  for (int i = 0; i < ranks; i++) ids[i] = 0, best[i] = -__builtin_inff();
  float strip[STRIP];
  for (int first = 0; first < count; first += STRIP) {
    const int some = count - first < STRIP ? count - first : STRIP;
    memset(strip, 0, sizeof strip);
    memcpy(strip, logits + first, (size_t)some * sizeof(float));
    kernels->rank(strip, some, first, ranks, ids, best);
  }
  return LOCI_DONE;
}
