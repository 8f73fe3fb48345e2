#include "session.h"

#include <climits>
#include <cstring>
#include <new>
#include <system_error>

#define LOCI_LEVEL 0
#include "attention.h"

// Nodes of one step, all rows together: bounds what a step allocates.
static const int MAX_NODES = 4096;
static const int MAX_THREADS = 256;


void Cache::grow(int slots, size_t page_bytes) {
  while ((int)pages.size() * PAGE < slots) {
    memory.emplace_back(page_bytes);
    pages.push_back(memory.back().bytes());
  }
}

void Cache::trim(int slots) {
  size_t kept = ((size_t)slots + PAGE - 1) / PAGE;
  if (kept >= pages.size()) return;
  memory.resize(kept);
  pages.resize(kept);
}

static void have(Memory &memory, size_t bytes) {
  if (memory.size() < bytes) {
    memory = Memory();  // the old one goes first
    memory = Memory(bytes);
  }
}

int LociSession::check(const LociStep &given) const {
  const LociShape &shape = model->shape;
  if (given.rows != (int)rows.size()) return LOCI_BAD_ROW;
  if (given.ranks < 0 || given.ranks > shape.vocabulary || given.ranks > 1024) return LOCI_BAD_RANKS;
  if (given.ranks && (!given.top_ids || !given.top_logits)) return LOCI_BAD_RANKS;
  if (given.logits && !given.ranks) return LOCI_BAD_RANKS;
  for (int i = 0; i < given.hidden_count; i++)
    if (given.hidden_layers[i] < 0 || given.hidden_layers[i] > shape.layers) return LOCI_BAD_LAYER;
  int total = 0, embeds = 0;
  for (int row = 0; row < given.rows; row++) {
    const int count = given.nodes[row], past = given.past[row];
    if (count < 0 || past < 0) return LOCI_BAD_TREE;
    if (count > MAX_NODES - total) return LOCI_TOO_MANY;
    // Positions are at most past + count - 1; a tree is as deep as a chain at worst.
    if (past > given.positions - count) return LOCI_TOO_LONG;
    if ((int64_t)past > (int64_t)rows[row].pages.size() * PAGE) return LOCI_BAD_ROW;
    for (int node = 0; node < count; node++) {
      const int parent = given.parents[total + node], token = given.tokens[total + node];
      if (node == 0 ? parent != -1 : parent < 0 || parent >= node) return LOCI_BAD_TREE;
      if (token < -1 || token >= shape.vocabulary) return LOCI_BAD_TOKEN;
      if (token == -1) embeds++;
    }
    total += count;
  }
  if (embeds != given.embed_count || (embeds && !given.embeds)) return LOCI_BAD_EMBEDS;
  for (int i = 0; i < given.injection_count; i++) {
    const LociInjection &one = given.injections[i];
    if (one.layer < 0 || one.layer > shape.layers || one.node < 0 || one.node >= total || one.source < 0 ||
        one.source >= total || !one.weight)
      return LOCI_BAD_INJECTION;
  }
  return LOCI_DONE;
}

void LociSession::prepare(const LociStep &given) {
  const LociShape &shape = model->shape;
  const int group = model->group();
  step = &given;
  first_node.assign(1, 0);
  first_tile.assign(1, 0);
  tiles.clear();
  int most = 0;
  for (int row = 0; row < given.rows; row++) {
    const int count = given.nodes[row];
    if (count > most) most = count;
    for (int first = 0; first < count * group; first += 16) {
      const int queries = count * group - first < 16 ? count * group - first : 16;
      // Nodes see no later ones.
      tiles.push_back({row, first, queries, given.past[row] + (first + queries - 1) / group + 1});
    }
    first_node.push_back(first_node.back() + count);
    first_tile.push_back((int)tiles.size());
    rows[row].grow(given.past[row] + count, page_bytes());
  }
  share_attention();
  nodes = first_node.back();
  words = (most + 63) / 64 + 1;  // an empty word at the end
  seen.assign((size_t)nodes * words, 0);
  row_of.resize(nodes);
  position.resize(nodes);
  embed_of.assign(nodes, -1);
  int embeds = 0;
  for (int row = 0; row < given.rows; row++)
    for (int node = 0; node < given.nodes[row]; node++) {
      const int place = first_node[row] + node, parent = given.parents[place];
      uint64_t *bits = &seen[(size_t)place * words];
      row_of[place] = row;
      position[place] = given.past[row];
      if (parent >= 0) {
        memcpy(bits, &seen[(size_t)(first_node[row] + parent) * words], (size_t)words * sizeof(uint64_t));
        position[place] = position[first_node[row] + parent] + 1;
      }
      bits[node / 64] |= (uint64_t)1 << (node % 64);
      if (given.tokens[place] == -1) embed_of[place] = embeds++;
    }
  const size_t whole = (size_t)(nodes + 15) / 16 * 16;
  const int all = shape.heads * shape.head_size, widest = shape.inner > all ? shape.inner : all;
  have(states, whole * shape.width * sizeof(float));
  have(normed, whole * shape.width * sizeof(bf16));
  have(inner, whole * widest * sizeof(bf16));
  have(queries, tiles.size() * 16 * shape.kv_heads * shape.head_size * sizeof(bf16));
  have(partials, tiles.size() * shape.kv_heads * segments * partial_size(shape.head_size) * sizeof(float));
  scratch.resize(team.size());
  const int blocks = (widest > shape.width ? widest : shape.width) / STRIP;
  for (Scratch &own : scratch) {
    have(own.output, whole * (shape.head_size > STRIP ? shape.head_size : STRIP) * sizeof(float));
    have(own.tiles, (size_t)blocks * 2 * TILE * sizeof(bf16));
    have(own.attention, (size_t)16 * (PAGE + PAGE / 2) * sizeof(float) + (size_t)shape.head_size * sizeof(float));
    have(own.top_ids, (size_t)nodes * given.ranks * sizeof(int32_t));
    have(own.top_logits, (size_t)nodes * given.ranks * sizeof(float));
    float *best = own.top_logits.as<float>();
    for (size_t i = 0; i < (size_t)nodes * given.ranks; i++) best[i] = -__builtin_inff();
    if (given.ranks) memset(own.top_ids.bytes(), 0, (size_t)nodes * given.ranks * sizeof(int32_t));
  }
}

// Tiles of a row that go together read its keys and values once; more shares keep more threads busy.
void LociSession::share_attention() {
  shares.clear();
  segments = 0;
  int all = 0;
  for (const QueryTile &tile : tiles) {
    all += tile.segments() * model->shape.kv_heads;
    if (tile.segments() > segments) segments = tile.segments();
  }
  const int fair = all / (2 * team.size()), most = fair < 1 ? 1 : fair < TOGETHER ? fair : TOGETHER;
  for (int first = 0, end; first < (int)tiles.size(); first = end) {
    for (end = first + 1; end < (int)tiles.size() && end - first < most && tiles[end].row == tiles[first].row;) end++;
    for (int segment = 0; segment < tiles[end - 1].segments(); segment++) shares.push_back({first, end - first, segment});
  }
}

void LociSession::embed(int node) {
  const int width = model->shape.width;
  float *x = states.as<float>() + (size_t)node * width;
  if (embed_of[node] >= 0)
    memcpy(x, step->embeds + (size_t)embed_of[node] * width, (size_t)width * sizeof(float));
  else
    read_row(model->table(), step->tokens[node], x);
}

// A probe's states become a linear image of its token's.
void LociSession::inject(const LociInjection &one) {
  const int width = model->shape.width;
  const float *source = states.as<float>() + (size_t)one.source * width;
  float *x = states.as<float>() + (size_t)one.node * width;
  kernels->transform(one.weight, one.bias, source, width, x);
  if (one.residual) kernels->add(x, source, width);
}

// The norm before a layer's attention; at `layers`, the last one.
void LociSession::normalise(int layer, int node) {
  const LociShape &shape = model->shape;
  const bool last = layer == shape.layers;
  float *plain = nullptr;
  for (int i = 0; last && i < step->hidden_count; i++)
    if (step->hidden_layers[i] == layer) plain = step->hidden + ((size_t)i * nodes + node) * shape.width;
  const std::vector<float> &weight = last ? model->last_norm : model->layers[layer].first_norm;
  const float *x = states.as<float>() + (size_t)node * shape.width;
  kernels->normalise(x, weight.data(), shape.epsilon, shape.width, normed.as<bf16>(), node, plain);
}

// One head of the queries, keys or values, for all nodes: product, position, and its place for the attention.
void LociSession::project(int layer, int head, Scratch &own) {
  const LociShape &shape = model->shape;
  const Layer &weights = model->layers[layer];
  const int size = shape.head_size, strips = size / STRIP, half = size / 2, group = model->group();
  float *output = own.output.as<float>();
  for (int strip = 0; strip < strips; strip++)
    kernels->multiply(weights.qkv, head * strips + strip, normed.as<bf16>(), nodes, output + strip * STRIP, size,
                             own.tiles.as<bf16>());
  bf16 turned[MAX_HEAD_SIZE];
  for (int node = 0; node < nodes; node++) {
    float *x = output + (size_t)node * size;
    if (!weights.bias.empty()) kernels->add(x, &weights.bias[(size_t)head * size], size);
    const float *cosine = step->cosines + (size_t)position[node] * half;
    const float *sine = step->sines + (size_t)position[node] * half;
    const int row = row_of[node];
    if (head < shape.heads) {
      const size_t query = (size_t)(node - first_node[row]) * group + head % group;
      const size_t place = ((size_t)(head / group) * tiles.size() + first_tile[row]) * 16 + query;
      kernels->rotate(x, cosine, sine, half, queries.as<bf16>() + place * size);
      continue;
    }
    const int slot = step->past[row] + node - first_node[row];
    const bool key = head < shape.heads + shape.kv_heads;
    const int kv_head = head - shape.heads - (key ? 0 : shape.kv_heads);
    const size_t part = keys_place(layer, kv_head) + (key ? 0 : part_bytes());
    bf16 *to = (bf16 *)(rows[row].memory[slot / PAGE].bytes() + part);
    if (key) {
      kernels->rotate(x, cosine, sine, half, turned);
      for (int i = 0; i < size; i += 2) memcpy(to + key_place(slot % PAGE, i, size), turned + i, 2 * sizeof(bf16));
    } else {
      for (int i = 0; i < size; i++) to[value_place(slot % PAGE, i, size)] = to_bf16(x[i]);
    }
  }
}

float *LociSession::partial(int kv_head, int tile, int segment) const {
  const size_t place = ((size_t)kv_head * tiles.size() + tile) * segments + segment;
  return partials.as<float>() + place * partial_size(model->shape.head_size);
}

void LociSession::attend(int layer, int kv_head, const Share &share, Scratch &own) {
  const int size = model->shape.head_size, group = model->group(), row = tiles[share.first_tile].row;
  const uint64_t *bits[TOGETHER * 16];
  int counts[TOGETHER], slots[TOGETHER];
  for (int i = 0; i < share.tiles; i++) {
    const QueryTile &tile = tiles[share.first_tile + i];
    counts[i] = tile.count, slots[i] = tile.slots;
    for (int query = 0; query < tile.count; query++)
      bits[i * 16 + query] = &seen[(size_t)(first_node[row] + (tile.first + query) / group) * words];
  }
  Attention call;
  call.queries = queries.as<bf16>() + ((size_t)kv_head * tiles.size() + share.first_tile) * 16 * size;
  call.tiles = share.tiles;
  call.head_size = size;
  call.counts = counts;
  call.slots = slots;
  call.seen = bits;
  call.pages = rows[row].pages.data();
  call.keys = keys_place(layer, kv_head);
  call.values = call.keys + part_bytes();
  call.past = step->past[row];
  call.first_page = share.segment * SEGMENT;
  const int pages = (slots[share.tiles - 1] + PAGE - 1) / PAGE;  // the last tile sees most
  call.end_page = call.first_page + SEGMENT < pages ? call.first_page + SEGMENT : pages;
  call.scale = model->shape.scale;
  call.partial = partial(kv_head, share.first_tile, share.segment);
  call.partial_stride = partial_size(size) * segments;
  call.scratch = own.attention.as<float>();
  kernels->attend(call);
}

// A tile's segments together, as inputs of the next product.
void LociSession::combine(int kv_head, int number, Scratch &own) {
  const QueryTile &tile = tiles[number];
  const int size = model->shape.head_size, group = model->group(), inputs = model->shape.heads * size;
  float *values = own.attention.as<float>();
  for (int query = 0; query < tile.count; query++) {
    kernels->combine(partial(kv_head, number, 0), partial_size(size), tile.segments(), query, size, model->shape.scale,
                     values);
    const int node = first_node[tile.row] + (tile.first + query) / group;
    const int head = kv_head * group + (tile.first + query) % group;
    for (int part = 0; part < size; part += 16)
      kernels->round(values + part, inner.as<bf16>(), node, head * size + part, inputs);
  }
}

// A strip of a product, added to the states.
void LociSession::add_product(const Matrix &matrix, int strip, Scratch &own) {
  float *output = own.output.as<float>(), *x = states.as<float>() + strip * STRIP;
  kernels->multiply(matrix, strip, inner.as<bf16>(), nodes, output, STRIP, own.tiles.as<bf16>());
  for (int node = 0; node < nodes; node++)
    kernels->add(x + (size_t)node * model->shape.width, output + (size_t)node * STRIP, STRIP);
}

// 16 numbers of the inner layer: their gates and their ups stand in one strip.
void LociSession::gate(int layer, int strip, Scratch &own) {
  float *output = own.output.as<float>();
  kernels->multiply(model->layers[layer].gate_up, strip, normed.as<bf16>(), nodes, output, STRIP,
                           own.tiles.as<bf16>());
  for (int node = 0; node < nodes; node++, output += STRIP)
    kernels->gate(output, output + 16, inner.as<bf16>(), node, strip * 16, model->shape.inner);
}

void LociSession::rank(int strip, Scratch &own) {
  const int first = strip * STRIP, left = model->shape.vocabulary - first, count = left < STRIP ? left : STRIP;
  float *output = own.output.as<float>();
  kernels->multiply(model->head, strip, normed.as<bf16>(), nodes, output, STRIP, own.tiles.as<bf16>());
  for (int node = 0; node < nodes; node++, output += STRIP) {
    const size_t list = (size_t)node * step->ranks;
    kernels->rank(output, count, first, step->ranks, own.top_ids.as<int32_t>() + list,
                         own.top_logits.as<float>() + list);
    if (step->logits)
      memcpy(step->logits + (size_t)node * model->shape.vocabulary + first, output, (size_t)count * sizeof(float));
  }
}

// The threads' lists of a node as one: larger logits first, of equal ones the lower token.
void LociSession::merge_ranks(int node) {
  const size_t list = (size_t)node * step->ranks;
  int taken[MAX_THREADS] = {};
  for (int rank = 0; rank < step->ranks; rank++) {
    int from = -1, id = 0;
    float best = 0.0f;
    for (int thread = 0; thread < team.size(); thread++) {
      if (taken[thread] == step->ranks) continue;
      const float logit = scratch[thread].top_logits.as<float>()[list + taken[thread]];
      const int32_t token = scratch[thread].top_ids.as<int32_t>()[list + taken[thread]];
      if (from < 0 || logit > best || (logit == best && token < id)) from = thread, best = logit, id = token;
    }
    taken[from]++;
    step->top_ids[list + rank] = id;
    step->top_logits[list + rank] = best;
  }
}

// Every thread runs this. Between two barriers, threads take what is left to do.
void LociSession::work(int thread) {
  const LociShape &shape = model->shape;
  Scratch &own = scratch[thread];
  int first, end;
  const int several = (nodes + team.size() * 2 - 1) / (team.size() * 2);  // nodes that are worth a claim
  kernels->begin();
  while (team.claim(nodes, several, first, end))
    for (int node = first; node < end; node++) embed(node);
  team.barrier();
  for (int layer = 0; layer <= shape.layers; layer++) {
    for (int i = 0; layer < shape.layers && i < step->hidden_count; i++) {
      if (step->hidden_layers[i] != layer) continue;
      if (thread == 0)
        memcpy(step->hidden + (size_t)i * nodes * shape.width, states.bytes(), (size_t)nodes * shape.width * sizeof(float));
      team.barrier();
    }
    if (injected_at(layer)) {
      while (team.claim(step->injection_count, 1, first, end))
        if (step->injections[first].layer == layer) inject(step->injections[first]);
      team.barrier();
    }
    while (team.claim(nodes, several, first, end))
      for (int node = first; node < end; node++) normalise(layer, node);
    team.barrier();
    if (layer == shape.layers) break;
    const Layer &weights = model->layers[layer];
    while (team.claim(model->qkv_heads(), 1, first, end)) project(layer, first, own);
    team.barrier();
    while (team.claim(shape.kv_heads * (int)shares.size(), 1, first, end))
      attend(layer, first % shape.kv_heads, shares[first / shape.kv_heads], own);
    team.barrier();
    while (team.claim(shape.kv_heads * (int)tiles.size(), 1, first, end))
      combine(first % shape.kv_heads, first / shape.kv_heads, own);
    team.barrier();
    while (team.claim(weights.out.strips(), 2, first, end))
      for (int strip = first; strip < end; strip++) add_product(weights.out, strip, own);
    team.barrier();
    while (team.claim(nodes, several, first, end))
      for (int node = first; node < end; node++)
        kernels->normalise(states.as<float>() + (size_t)node * shape.width, weights.second_norm.data(),
                                  shape.epsilon, shape.width, normed.as<bf16>(), node, nullptr);
    team.barrier();
    while (team.claim(weights.gate_up.strips(), 6, first, end))
      for (int strip = first; strip < end; strip++) gate(layer, strip, own);
    team.barrier();
    while (team.claim(weights.down.strips(), 2, first, end))
      for (int strip = first; strip < end; strip++) add_product(weights.down, strip, own);
    team.barrier();
  }
  if (step->ranks) {
    while (team.claim(model->head.strips(), 32, first, end))
      for (int strip = first; strip < end; strip++) rank(strip, own);
    team.barrier();
    while (team.claim(nodes, several, first, end))
      for (int node = first; node < end; node++) merge_ranks(node);
  }
  kernels->end();
}

bool LociSession::injected_at(int layer) const {
  for (int i = 0; i < step->injection_count; i++)
    if (step->injections[i].layer == layer) return true;
  return false;
}

static bool complete(const LociModel &model) {
  bool all = model.head.data && model.table().data && !model.last_norm.empty();
  for (const Layer &layer : model.layers)
    all = all && layer.qkv.data && layer.out.data && layer.gate_up.data && layer.down.data &&
          !layer.first_norm.empty() && !layer.second_norm.empty();
  return all;
}

int loci_session_new(const LociModel *model, int level, int threads, LociSession **session) {
  if (!complete(*model)) return LOCI_BAD_MATRIX;
  const Kernels *kernels = kernels_of(level);
  if (!kernels) return LOCI_BAD_LEVEL;
  if (threads < 1 || threads > MAX_THREADS) return LOCI_NO_THREADS;
  try {
    *session = new LociSession(model, kernels, threads);
  } catch (const std::bad_alloc &) {
    return LOCI_NO_MEMORY;
  } catch (const std::system_error &) {
    return LOCI_NO_THREADS;
  }
  return LOCI_DONE;
}

void loci_session_free(LociSession *session) { delete session; }

int loci_session_rows(LociSession *session, int rows) {
  if (rows < 0) return LOCI_BAD_ROW;
  try {
    session->rows.resize(rows);
  } catch (const std::bad_alloc &) {
    return LOCI_NO_MEMORY;
  }
  return LOCI_DONE;
}

int loci_session_keep(LociSession *session, const int32_t *rows, int count) {
  const int held = (int)session->rows.size();
  try {
    std::vector<char> named(held, 0);
    for (int i = 0; i < count; i++) {
      if (rows[i] < 0 || rows[i] >= held || named[rows[i]]) return LOCI_BAD_ROW;
      named[rows[i]] = 1;
    }
    std::vector<Cache> kept(count);
    for (int i = 0; i < count; i++) kept[i] = std::move(session->rows[rows[i]]);
    session->rows = std::move(kept);
  } catch (const std::bad_alloc &) {
    return LOCI_NO_MEMORY;
  }
  return LOCI_DONE;
}

int loci_session_trim(LociSession *session, int row, int length) {
  if (row < 0 || row >= (int)session->rows.size() || length < 0) return LOCI_BAD_ROW;
  session->rows[row].trim(length);
  return LOCI_DONE;
}

int loci_session_move(LociSession *session, int row, int past, const int32_t *path, int count) {
  if (row < 0 || row >= (int)session->rows.size() || past < 0) return LOCI_BAD_ROW;
  Cache &cache = session->rows[row];
  const LociShape &shape = session->model->shape;
  const int size = shape.head_size;
  const int64_t room = (int64_t)cache.pages.size() * PAGE;
  for (int i = 0; i < count; i++)
    if (path[i] < i || (i && path[i] <= path[i - 1]) || past + (int64_t)path[i] >= room) return LOCI_BAD_PATH;
  for (int i = 0; i < count; i++) {
    const int from = past + path[i], to = past + i;
    if (from == to) continue;
    for (int layer = 0; layer < shape.layers; layer++)
      for (int head = 0; head < shape.kv_heads; head++) {
        const size_t keys = session->keys_place(layer, head), values = keys + session->part_bytes();
        const uint8_t *source = cache.memory[from / PAGE].bytes();
        uint8_t *target = cache.memory[to / PAGE].bytes();
        for (int j = 0; j < size; j += 2)
          memcpy((bf16 *)(target + keys) + key_place(to % PAGE, j, size),
                 (const bf16 *)(source + keys) + key_place(from % PAGE, j, size), 2 * sizeof(bf16));
        for (int j = 0; j < size; j++)
          ((bf16 *)(target + values))[value_place(to % PAGE, j, size)] =
              ((const bf16 *)(source + values))[value_place(from % PAGE, j, size)];
      }
  }
  return LOCI_DONE;
}

size_t loci_session_bytes(const LociSession *session) {
  size_t pages = 0;
  for (const Cache &cache : session->rows) pages += cache.pages.size();
  return pages * session->page_bytes();
}

int loci_session_step(LociSession *session, const LociStep *step) {
  const int problem = session->check(*step);
  if (problem) return problem;
  try {
    session->prepare(*step);
  } catch (const std::bad_alloc &) {
    return LOCI_NO_MEMORY;
  }
  if (session->nodes)
    session->team.run([](void *what, int thread) { static_cast<LociSession *>(what)->work(thread); }, session);
  session->step = nullptr;
  return LOCI_DONE;
}

const char *loci_reason(int code) {
  switch (code) {
    case LOCI_DONE: return "done";
    case LOCI_NO_MEMORY: return "there is not enough memory";
    case LOCI_BAD_SHAPE: return "sizes that are no multiples of 32, heads that do not share evenly, or a vector of another length";
    case LOCI_BAD_LEVEL: return "an instruction set that this processor or build does not have";
    case LOCI_BAD_MATRIX: return "a matrix that is unknown, incomplete, or of another size";
    case LOCI_BAD_ROW: return "a row that the session does not hold, or another number of rows";
    case LOCI_BAD_TREE: return "a tree whose parents do not stand before their children";
    case LOCI_BAD_TOKEN: return "a token outside the vocabulary";
    case LOCI_BAD_EMBEDS: return "another number of embeddings than of probes";
    case LOCI_TOO_LONG: return "positions beyond the tables of angles";
    case LOCI_BAD_LAYER: return "a layer outside the model";
    case LOCI_BAD_RANKS: return "a number of ranks outside 1 to 1024, or beyond the vocabulary";
    case LOCI_BAD_PATH: return "a path that does not rise, or leaves the step";
    case LOCI_BAD_INJECTION: return "an injection outside the step or the model";
    case LOCI_NO_THREADS: return "a number of threads that the system does not give";
    case LOCI_TOO_MANY: return "more than 4096 nodes in one step";
    default: return "an unknown code";
  }
}
