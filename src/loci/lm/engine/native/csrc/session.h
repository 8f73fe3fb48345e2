// A session: the caches of its rows, its threads, and one step's work. Kernels of any level read the same packed model.
#pragma once

#include <vector>

#include "model.h"
#include "team.h"

// The keys and values of one row, in pages of 128 slots that hold all layers and heads. It grows without being copied.
struct Cache {
  std::vector<Memory> memory;
  std::vector<const uint8_t *> pages;

  void grow(int slots, size_t page_bytes);
  void trim(int slots);
};

// 16 queries of one row (a query: node * group + head) and, in turn, of every key-value head.
struct QueryTile {
  int row, first, count, slots;  // it sees none of the slots from `slots` on

  int segments() const { return (slots + SEGMENT * PAGE - 1) / (SEGMENT * PAGE); }
};

// A share of the attention: some tiles of one row, one segment of its slots.
struct Share {
  int first_tile, tiles, segment;
};

struct LociSession {
  LociSession(const LociModel *model, const Kernels *kernels, int threads)
      : model(model), kernels(kernels), team(threads) {}

  size_t page_bytes() const { return part_bytes() * 2 * model->shape.kv_heads * model->shape.layers; }
  size_t part_bytes() const { return (size_t)PAGE * model->shape.head_size * sizeof(bf16); }
  size_t keys_place(int layer, int head) const { return ((size_t)layer * model->shape.kv_heads + head) * 2 * part_bytes(); }
  int check(const LociStep &step) const;
  void prepare(const LociStep &step);
  void work(int thread);

  const LociModel *model;
  const Kernels *kernels;
  Team team;
  std::vector<Cache> rows;

  // Of the step in work.
  const LociStep *step = nullptr;
  int nodes = 0;                            // of all rows
  std::vector<int> first_node, first_tile;  // of each row, and one beyond
  std::vector<int> row_of, position, embed_of;  // of each node
  std::vector<uint64_t> seen;               // a node's own and its ancestors' bits, `words` a node
  int words = 0;
  std::vector<QueryTile> tiles;
  std::vector<Share> shares;
  int segments = 0;  // the most that a tile has
  Memory states, normed, inner, queries;    // floats; panels; panels; (kv head, tile, 16, head size)
  Memory partials;                          // (kv head, tile, segment)
  struct Scratch {
    Memory output, tiles, attention, top_ids, top_logits;
  };
  std::vector<Scratch> scratch;  // of each thread

 private:
  void share_attention();
  void embed(int node);
  bool injected_at(int layer) const;
  void inject(const LociInjection &injection);
  void normalise(int layer, int node);
  void project(int layer, int head, Scratch &own);
  void attend(int layer, int kv_head, const Share &share, Scratch &own);
  void combine(int kv_head, int number, Scratch &own);
  float *partial(int kv_head, int tile, int segment) const;
  void add_product(const Matrix &matrix, int strip, Scratch &own);
  void gate(int layer, int strip, Scratch &own);
  void rank(int strip, Scratch &own);
  void merge_ranks(int node);
};
