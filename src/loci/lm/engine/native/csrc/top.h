// The most probable tokens of a node, kept while the head's strips pass by.
#pragma once

#include "kernels.h"
#include "simd.h"

static inline void insert(float logit, int32_t id, int ranks, int32_t *ids, float *best) {
  int place = ranks - 1;
  for (; place > 0 && best[place - 1] < logit; place--) best[place] = best[place - 1], ids[place] = ids[place - 1];
  best[place] = logit, ids[place] = id;
}

static inline void rank_scalar(const float *logits, int count, int first_token, int ranks, int32_t *ids, float *best) {
  for (int i = 0; i < count; i++)
    if (logits[i] > best[ranks - 1]) insert(logits[i], first_token + i, ranks, ids, best);
}

#if LOCI_LEVEL > LOCI_SCALAR

static inline void rank_fast(const float *logits, int count, int first_token, int ranks, int32_t *ids, float *best) {
  const Floats least = every(best[ranks - 1]);
  uint32_t candidates = above(load(logits), least) | above(load(logits + 16), least) << 16;
  if (count < 32) candidates &= (1u << count) - 1;
  for (; candidates; candidates &= candidates - 1) {
    int i = __builtin_ctz(candidates);
    if (logits[i] > best[ranks - 1]) insert(logits[i], first_token + i, ranks, ids, best);
  }
}

#endif
