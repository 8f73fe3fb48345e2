// The weights of a Llama-family model, packed for all levels of kernels.
#pragma once

#include <memory>
#include <vector>

#include "api.h"
#include "kernels.h"

// Memory that begins on a cache line and with zeros, freed by itself.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  // Room that begins on a huge page, where the system gives them; it holds anything.
  static Memory huge(size_t bytes);
  uint8_t *bytes() const { return data_.get(); }
  template <typename Number>
  Number *as() const {
    return reinterpret_cast<Number *>(data_.get());
  }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t *data) const;
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

struct Layer {
  Matrix qkv, out, gate_up, down;
  std::vector<float> first_norm, second_norm, bias;
};

struct LociModel {
  LociShape shape;
  std::vector<Layer> layers;
  Matrix head, embedding;
  std::vector<float> last_norm;
  std::vector<Memory> rooms;  // of all matrices, one after the other: the processor finds fewer, larger pages faster
  size_t used = 0;            // of the last room
  size_t held = 0;            // of all

  int group() const { return shape.heads / shape.kv_heads; }
  int qkv_heads() const { return shape.heads + 2 * shape.kv_heads; }
  Matrix *matrix(int which, int layer);
  uint8_t *room(size_t bytes);
  const Matrix &table() const { return shape.tied ? head : embedding; }
};

const Kernels *kernels_of(int level);
int available_levels();
// One output's weights as floats: an embedding.
void read_row(const Matrix &matrix, int output, float *x);
