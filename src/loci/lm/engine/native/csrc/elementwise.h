// What happens between the products: norms, rotary positions, the gate, sums. Each has its plain form beside it.
#pragma once

#include <math.h>

#include "kernels.h"
#include "panels.h"
#include "simd.h"

static inline void normalise_scalar(const float *x, const float *weight, float epsilon, int width, bf16 *panels,
                                    int row, float *plain) {
  float squares = 0.0f;
  for (int i = 0; i < width; i++) squares += x[i] * x[i];
  float factor = 1.0f / sqrtf(squares / (float)width + epsilon);
  for (int i = 0; i < width; i++) {
    float value = x[i] * factor * weight[i];
    panels[panel_place(row, i, width)] = to_bf16(value);
    if (plain) plain[i] = value;
  }
}

static inline void rotate_scalar(const float *head, const float *cosine, const float *sine, int half, bf16 *output) {
  for (int i = 0; i < half; i++) {
    output[i] = to_bf16(head[i] * cosine[i] - head[i + half] * sine[i]);
    output[i + half] = to_bf16(head[i + half] * cosine[i] + head[i] * sine[i]);
  }
}

static inline void add_scalar(float *x, const float *y, int count) {
  for (int i = 0; i < count; i++) x[i] += y[i];
}

static inline void round_scalar(const float *x, bf16 *panels, int row, int input, int inputs) {
  for (int i = 0; i < 16; i++) panels[panel_place(row, input + i, inputs)] = to_bf16(x[i]);
}

static inline void gate_scalar(const float *gate, const float *up, bf16 *panels, int row, int input, int inputs) {
  for (int i = 0; i < 16; i++)
    panels[panel_place(row, input + i, inputs)] = to_bf16(gate[i] / (1.0f + expf(-gate[i])) * up[i]);
}

static inline void transform_scalar(const float *weight, const float *bias, const float *x, int width, float *y) {
  for (int output = 0; output < width; output++) {
    float total = bias ? bias[output] : 0.0f;
    for (int i = 0; i < width; i++) total += weight[(size_t)output * width + i] * x[i];
    y[output] = total;
  }
}

#if LOCI_LEVEL > LOCI_SCALAR

static inline void normalise_fast(const float *x, const float *weight, float epsilon, int width, bf16 *panels, int row,
                                  float *plain) {
  Floats squares[2] = {every(0.0f), every(0.0f)};
  for (int i = 0; i < width; i += 32)
    for (int part = 0; part < 2; part++) {
      Floats value = load(x + i + part * 16);
      squares[part] = multiply_add(value, value, squares[part]);
    }
  Floats factor = every(1.0f / sqrtf(sum(squares[0] + squares[1]) / (float)width + epsilon));
  for (int i = 0; i < width; i += 16) {
    Floats value = load(x + i) * factor * load(weight + i);
    put(panels, row, i, width, value);
    if (plain) store(plain + i, value);
  }
}

static inline void rotate_fast(const float *head, const float *cosine, const float *sine, int half, bf16 *output) {
  for (int i = 0; i < half; i += 16) {
    Floats low = load(head + i), high = load(head + half + i), c = load(cosine + i), s = load(sine + i);
    store_bf16(output + i, low * c - high * s);
    store_bf16(output + half + i, multiply_add(low, s, high * c));
  }
}

static inline void add_fast(float *x, const float *y, int count) {
  for (int i = 0; i < count; i += 16) store(x + i, load(x + i) + load(y + i));
}

static inline void round_fast(const float *x, bf16 *panels, int row, int input, int inputs) {
  put(panels, row, input, inputs, load(x));
}

static inline void gate_fast(const float *gate, const float *up, bf16 *panels, int row, int input, int inputs) {
  Floats value = load(gate);
  Floats silu = value / (every(1.0f) + exponential(smaller(every(0.0f) - value, every(88.0f))));
  put(panels, row, input, inputs, silu * load(up));
}

static inline void transform_fast(const float *weight, const float *bias, const float *x, int width, float *y) {
  for (int output = 0; output < width; output++, weight += width) {
    Floats total = every(0.0f);
    for (int i = 0; i < width; i += 16) total = multiply_add(load(weight + i), load(x + i), total);
    y[output] = sum(total) + (bias ? bias[output] : 0.0f);
  }
}

#endif
