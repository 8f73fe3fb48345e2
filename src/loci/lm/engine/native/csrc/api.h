/* The C interface: models (weights) and sessions (caches, threads). No global state; a model may serve several sessions,
   a session one caller at a time. Functions that can fail return 0 or a code that `loci_reason` explains. Arrays belong
   to the caller and are read or written during the call only. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define LOCI_API extern "C" __attribute__((visibility("default")))

enum {
  LOCI_DONE = 0,
  LOCI_NO_MEMORY = 1,
  LOCI_BAD_SHAPE = 2,
  LOCI_BAD_LEVEL = 3,
  LOCI_BAD_MATRIX = 4,
  LOCI_BAD_ROW = 5,
  LOCI_BAD_TREE = 6,
  LOCI_BAD_TOKEN = 7,
  LOCI_BAD_EMBEDS = 8,
  LOCI_TOO_LONG = 9,
  LOCI_BAD_LAYER = 10,
  LOCI_BAD_RANKS = 11,
  LOCI_BAD_PATH = 12,
  LOCI_BAD_INJECTION = 13,
  LOCI_NO_THREADS = 14,
  LOCI_TOO_MANY = 15,
};

struct LociShape {
  int32_t layers, width, heads, kv_heads, head_size, inner, vocabulary;
  float epsilon, scale; /* of the norms; of the scores */
  int32_t tied;         /* the head is the embedding */
};

enum { LOCI_QKV = 0, LOCI_OUT = 1, LOCI_GATE_UP = 2, LOCI_DOWN = 3, LOCI_HEAD = 4, LOCI_EMBEDDING = 5 };
enum { LOCI_FIRST_NORM = 0, LOCI_SECOND_NORM = 1, LOCI_QKV_BIAS = 2, LOCI_LAST_NORM = 3 };

struct LociModel;
struct LociSession;

LOCI_API const char *loci_reason(int code);
/* Bits of the levels that were compiled and that this processor and system allow: 1 << level. */
LOCI_API int loci_levels(void);

LOCI_API int loci_model_new(const struct LociShape *shape, struct LociModel **model);
LOCI_API void loci_model_free(struct LociModel *model);
/* Say the format of a matrix, before its rows are given. */
LOCI_API int loci_model_matrix(struct LociModel *model, int which, int layer, int format);
/* Give rows of a matrix in their GGUF blocks, or as bf16: row i goes to output places[i]. */
LOCI_API int loci_model_rows(struct LociModel *model, int which, int layer, const void *rows, int64_t row_bytes,
                             int count, const int32_t *places);
/* How many weights differ from these rows, floats (wide) or bf16; packed ones are rounded to bf16 for the latter. */
LOCI_API int loci_model_matches(struct LociModel *model, int which, int layer, const void *rows, int wide, int count,
                                const int32_t *places, int32_t *differing);
LOCI_API int loci_model_vector(struct LociModel *model, int which, int layer, const float *values, int count);
LOCI_API size_t loci_model_bytes(const struct LociModel *model);

LOCI_API int loci_session_new(const struct LociModel *model, int level, int threads, struct LociSession **session);
LOCI_API void loci_session_free(struct LociSession *session);
/* Have this many rows; new ones are empty. */
LOCI_API int loci_session_rows(struct LociSession *session, int rows);
/* Rows become these old ones, in this order; each may be named once. */
LOCI_API int loci_session_keep(struct LociSession *session, const int32_t *rows, int count);
/* Free what a row holds beyond `length` slots. */
LOCI_API int loci_session_trim(struct LociSession *session, int row, int length);
/* Bring the slots past + path[i] to past + i. Paths rise. */
LOCI_API int loci_session_move(struct LociSession *session, int row, int past, const int32_t *path, int count);
LOCI_API size_t loci_session_bytes(const struct LociSession *session);

/* Before `layer` (at `layers`: before the last norm), state(node) = weight state(source) + bias (+ state(source)). */
struct LociInjection {
  int32_t layer, node, source, residual;
  const float *weight, *bias;
};

struct LociStep {
  int32_t rows;
  const int32_t *nodes, *past; /* of each row */
  const int32_t *tokens;       /* of all nodes, row after row; -1: the next of `embeds` */
  const int32_t *parents;      /* within the row, -1 for a root */
  const float *embeds;
  int32_t embed_count;
  const float *cosines, *sines; /* (positions, head_size / 2) */
  int32_t positions;
  int32_t hidden_count; /* layers asked for: 0 the embedding, ..., `layers` after the last norm */
  const int32_t *hidden_layers;
  float *hidden; /* (hidden_count, all nodes, width) */
  int32_t ranks; /* 0: the head is not computed */
  int32_t *top_ids;
  float *top_logits; /* (all nodes, ranks) */
  float *logits;     /* (all nodes, vocabulary), or null */
  int32_t injection_count;
  const struct LociInjection *injections;
};

LOCI_API int loci_session_step(struct LociSession *session, const struct LociStep *step);

/* For tests: single kernels of a level. */
LOCI_API int loci_try_expand(int level, int format, const void *half_block, uint16_t *tile);
LOCI_API int loci_try_multiply(const struct LociModel *model, int level, int which, int layer, int strip,
                               const float *x, int rows, float *output);
LOCI_API int loci_try_attend(int level, int head_size, int count, int past, int nodes, const uint64_t *seen,
                             const float *queries, const float *keys, const float *values, float scale, float *output);
LOCI_API int loci_try_elementwise(int level, int what, int count, const float *x, const float *y, const float *z,
                                  float *output);
LOCI_API int loci_try_rank(int level, int count, int ranks, const float *logits, int32_t *ids, float *best);
