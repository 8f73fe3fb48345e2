#include "model.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cpuid.h>
#include <cstdlib>
#include <cstring>
#include <new>

#define LOCI_LEVEL 0
#include "blocks.h"

static const size_t LINE = 64, HUGE_PAGE = 2u << 20, ROOM = 32u << 20;

static size_t up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

Memory::Memory(size_t bytes) : size_(up(bytes, LINE)) {
  const size_t line = size_ < HUGE_PAGE ? LINE : HUGE_PAGE;
  data_.reset(static_cast<uint8_t *>(aligned_alloc(line, size_ + LINE)));
  if (!data_) throw std::bad_alloc();
  if (line == HUGE_PAGE) madvise(data_.get(), size_, MADV_HUGEPAGE);  // for the whole ones among its pages
  memset(data_.get(), 0, size_);
}

Memory Memory::huge(size_t bytes) {
  Memory made;
  made.size_ = up(bytes, HUGE_PAGE);
  made.data_.reset(static_cast<uint8_t *>(aligned_alloc(HUGE_PAGE, made.size_)));
  if (!made.data_) throw std::bad_alloc();
  madvise(made.data_.get(), made.size_, MADV_HUGEPAGE);
  return made;
}

void Memory::Free::operator()(uint8_t *data) const { free(data); }

// The system gives a process the tiles only when it asks.
static bool amx_allowed() {
  const int request_feature = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_feature, tile_data) == 0;
}

int available_levels() {
  static const int levels = [] {
    int found = 1;
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && avx2_kernels()) found |= 2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && avx512_kernels()) found |= 4;
    unsigned features = 0, more = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) features = d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) more = a;
    const bool tiles = (features >> 22 & 1) && (features >> 24 & 1), bf16_conversion = more >> 5 & 1;
    if (avx512 && tiles && bf16_conversion && amx_kernels() && amx_allowed()) found |= 8;
    return found;
  }();
  return levels;
}

const Kernels *kernels_of(int level) {
  if (level < 0 || level > 3 || !(available_levels() >> level & 1)) return nullptr;
  const Kernels *(*const makers[])() = {scalar_kernels, avx2_kernels, avx512_kernels, amx_kernels};
  return makers[level]();
}

Matrix *LociModel::matrix(int which, int layer) {
  if (which == LOCI_HEAD) return layer == 0 ? &head : nullptr;
  if (which == LOCI_EMBEDDING) return layer == 0 && !shape.tied ? &embedding : nullptr;
  if (layer < 0 || layer >= shape.layers) return nullptr;
  Layer &found = layers[layer];
  switch (which) {
    case LOCI_QKV: return &found.qkv;
    case LOCI_OUT: return &found.out;
    case LOCI_GATE_UP: return &found.gate_up;
    case LOCI_DOWN: return &found.down;
    default: return nullptr;
  }
}

uint8_t *LociModel::room(size_t bytes) {
  bytes = up(bytes, LINE);
  if (rooms.empty() || rooms.back().size() - used < bytes) {
    rooms.push_back(Memory::huge(bytes > ROOM ? bytes : ROOM));
    used = 0;
  }
  uint8_t *place = rooms.back().bytes() + used;
  memset(place, 0, bytes);
  used += bytes;
  held += bytes;
  return place;
}

void read_row(const Matrix &matrix, int output, float *x) {
  const size_t bytes = half_block_bytes(matrix.format);
  const uint8_t *half = strip_data(matrix, output / STRIP) + output % STRIP / 16 * bytes;
  const int place = output % 16;
  for (int block = 0; block < matrix.blocks(); block++, half += 2 * bytes, x += STRIP) {
    if (matrix.format == BF16) {
      for (int input = 0; input < STRIP; input++) x[input] = weight_of(BF16, half, place, input);
      continue;
    }
    const fp16 *scales = (const fp16 *)(half + (matrix.format == Q8_0 ? 512 : 256));
    const float scale = from_fp16(scales[place]);
    if (matrix.format == Q8_0) {
      const int8_t *numbers = (const int8_t *)half + place * STRIP;
      for (int input = 0; input < STRIP; input++) x[input] = (float)numbers[input] * scale;
      continue;
    }
    const float minimum = matrix.format == Q4_1 ? from_fp16(scales[16 + place]) : -8.0f * scale;
    const uint8_t *numbers = half + place / 2 * STRIP;
    const int shift = place % 2 * 4;
    for (int input = 0; input < STRIP; input++) x[input] = (float)(numbers[input] >> shift & 15) * scale + minimum;
  }
}

// One row of a matrix into its place among the strips.
static void pack_row(const Matrix &matrix, int output, const uint8_t *row) {
  const size_t bytes = half_block_bytes(matrix.format);
  uint8_t *half = matrix.data + (size_t)(output / STRIP) * matrix.blocks() * 2 * bytes + output % STRIP / 16 * bytes;
  const int place = output % 16;
  for (int block = 0; block < matrix.blocks(); block++, half += 2 * bytes) {
    if (matrix.format == BF16) {
      memcpy(half + place * STRIP * sizeof(bf16), row, STRIP * sizeof(bf16));
      row += STRIP * sizeof(bf16);
      continue;
    }
    if (matrix.format == Q8_0) {
      memcpy(half + 512 + place * 2, row, 2);
      memcpy(half + place * STRIP, row + 2, STRIP);
      row += 34;
      continue;
    }
    memcpy(half + 256 + place * 2, row, 2);
    if (matrix.format == Q4_1) memcpy(half + 288 + place * 2, row + 2, 2);
    const uint8_t *numbers = row + (matrix.format == Q4_1 ? 4 : 2);  // weight i below weight i + 16 in one byte
    uint8_t *to = half + place / 2 * STRIP;
    for (int input = 0; input < STRIP; input++) {
      const int number = input < 16 ? numbers[input] & 15 : numbers[input - 16] >> 4;
      to[input] = (uint8_t)(place % 2 ? (to[input] & 15) | number << 4 : (to[input] & 0xf0) | number);
    }
    row += matrix.format == Q4_1 ? 20 : 18;
  }
}

static int64_t row_size(const Matrix &matrix) {
  switch (matrix.format) {
    case Q4_0: return (int64_t)matrix.blocks() * 18;
    case Q4_1: return (int64_t)matrix.blocks() * 20;
    case Q8_0: return (int64_t)matrix.blocks() * 34;
    default: return (int64_t)matrix.inputs * 2;
  }
}

static bool whole(int number, int of) { return number > 0 && number % of == 0; }

int loci_levels(void) { return available_levels(); }

int loci_model_new(const LociShape *given, LociModel **model) {
  const LociShape shape = *given;
  if (shape.layers < 1 || !whole(shape.width, 32) || !whole(shape.inner, 32) || !whole(shape.head_size, 32) ||
      shape.head_size > MAX_HEAD_SIZE ||
      shape.kv_heads < 1 || !whole(shape.heads, shape.kv_heads) || shape.vocabulary < 1)
    return LOCI_BAD_SHAPE;
  try {
    std::unique_ptr<LociModel> made(new LociModel{});
    made->shape = shape;
    made->layers.resize(shape.layers);
    const int rows = (shape.vocabulary + STRIP - 1) / STRIP * STRIP, all = shape.heads * shape.head_size;
    made->head = made->embedding = {BF16, rows, shape.width, nullptr};
    for (Layer &layer : made->layers) {
      layer.qkv = {BF16, made->qkv_heads() * shape.head_size, shape.width, nullptr};
      layer.out = {BF16, shape.width, all, nullptr};
      layer.gate_up = {BF16, 2 * shape.inner, shape.width, nullptr};
      layer.down = {BF16, shape.width, shape.inner, nullptr};
    }
    *model = made.release();
  } catch (const std::bad_alloc &) {
    return LOCI_NO_MEMORY;
  }
  return LOCI_DONE;
}

void loci_model_free(LociModel *model) { delete model; }

int loci_model_matrix(LociModel *model, int which, int layer, int format) {
  Matrix *matrix = model->matrix(which, layer);
  if (!matrix || matrix->data || format < Q4_0 || format > BF16) return LOCI_BAD_MATRIX;
  matrix->format = (Format)format;
  try {
    const size_t blocks = (size_t)matrix->strips() * matrix->blocks();
    matrix->data = model->room(blocks * 2 * half_block_bytes(matrix->format));
  } catch (const std::bad_alloc &) {
    return LOCI_NO_MEMORY;
  }
  return LOCI_DONE;
}

int loci_model_rows(LociModel *model, int which, int layer, const void *rows, int64_t row_bytes, int count,
                    const int32_t *places) {
  Matrix *matrix = model->matrix(which, layer);
  if (!matrix || !matrix->data || row_bytes != row_size(*matrix)) return LOCI_BAD_MATRIX;
  for (int row = 0; row < count; row++)
    if (places[row] < 0 || places[row] >= matrix->outputs) return LOCI_BAD_MATRIX;
  for (int row = 0; row < count; row++) pack_row(*matrix, places[row], (const uint8_t *)rows + row * row_bytes);
  return LOCI_DONE;
}

int loci_model_matches(LociModel *model, int which, int layer, const void *rows, int wide, int count,
                       const int32_t *places, int32_t *differing) {
  Matrix *matrix = model->matrix(which, layer);
  if (!matrix || !matrix->data) return LOCI_BAD_MATRIX;
  *differing = 0;
  try {
    std::vector<float> row(matrix->inputs);
    for (int i = 0; i < count; i++) {
      if (places[i] < 0 || places[i] >= matrix->outputs) return LOCI_BAD_MATRIX;
      read_row(*matrix, places[i], row.data());
      const size_t first = (size_t)i * matrix->inputs;
      for (int input = 0; input < matrix->inputs; input++)
        *differing += wide ? row[input] != ((const float *)rows)[first + input]
                           : from_bf16(to_bf16(row[input])) != from_bf16(((const bf16 *)rows)[first + input]);
    }
  } catch (const std::bad_alloc &) {
    return LOCI_NO_MEMORY;
  }
  return LOCI_DONE;
}

int loci_model_vector(LociModel *model, int which, int layer, const float *values, int count) {
  if (which != LOCI_LAST_NORM && (layer < 0 || layer >= model->shape.layers)) return LOCI_BAD_LAYER;
  const int expected = which == LOCI_QKV_BIAS ? model->qkv_heads() * model->shape.head_size : model->shape.width;
  if (which < LOCI_FIRST_NORM || which > LOCI_LAST_NORM || count != expected) return LOCI_BAD_SHAPE;
  std::vector<float> &vector = which == LOCI_LAST_NORM      ? model->last_norm
                               : which == LOCI_FIRST_NORM ? model->layers[layer].first_norm
                               : which == LOCI_SECOND_NORM ? model->layers[layer].second_norm
                                                           : model->layers[layer].bias;
  try {
    vector.assign(values, values + count);
  } catch (const std::bad_alloc &) {
    return LOCI_NO_MEMORY;
  }
  return LOCI_DONE;
}

size_t loci_model_bytes(const LociModel *model) {
  size_t bytes = model->held + model->last_norm.size() * sizeof(float);
  for (const Layer &layer : model->layers)
    bytes += (layer.first_norm.size() + layer.second_norm.size() + layer.bias.size()) * sizeof(float);
  return bytes;
}
