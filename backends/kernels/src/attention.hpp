// Softmax attention in float32: o = softmax(scale q k^T + mask) v, head by head. Scores of a few queries are all that is kept at a time.
#pragma once
#include "chain.hpp"

namespace structured {

constexpr int64_t MOST_HEADS = 1 << 16;
constexpr int64_t MOST_HEAD_WIDE = 1 << 12;  // numbers of a key or a value
enum AttentionTensor { QUERY, KEY, VALUE, OUTPUT };

struct Attention {
  int64_t heads, shared, key, width;  // `shared`: heads of keys and values
  int64_t causal;                     // query i sees keys up to i
  int64_t zero;                       // queries all of whose scores are -inf give 0, else NaN
  int64_t turned;                     // bit by tensor: (batch, time, heads, width) rather than (batch, heads, time, width)
  double scale;

  bool sound() const {
    for (int64_t count : {heads, shared})
      if (count < 1 || count > MOST_HEADS) return false;
    for (int64_t wide : {key, width})
      if (wide < 1 || wide > MOST_HEAD_WIDE) return false;
    return heads % shared == 0 && (causal | zero) >> 1 == 0 && turned >> 4 == 0;
  }
  int64_t heads_of(int tensor) const { return tensor == KEY || tensor == VALUE ? shared : heads; }
  int64_t width_of(int tensor) const { return tensor == QUERY || tensor == KEY ? key : width; }
  bool is_turned(int tensor) const { return turned >> tensor & 1; }
};

// What a call is made with; the mask is float and added, its strides are 0 where it is the same.
struct Attended {
  int64_t batch, time, keys;
  const float *query, *key, *value, *mask;
  int64_t mask_strides[4];
  float* output;
};

// All tensors without gaps; `of` is sound.
void run(const Attention& of, const Attended& given, const Threads& threads);

}  // namespace structured
