// Recurrences over tokens, in float32 and one step after the other; the state of a task stays in the first cache.
//
//   entries   h_t = a_t h_{t-1} + b_t for each of heads * width numbers; y_t = h_t, or with a query c_t of `width` numbers y_t[r] = h_t[r] . c_t
//   matrices  S (key, width) of each head: S <- e^{g_t} S, then for each factor S <- S + k w^T with w = v, or w = beta (v - S^T k) for the
//             delta rule; y_t = scale S^T q
//
// Columns of S do not meet, nor do entries of h: tasks are panels of columns of one head, or of entries, through all tokens.
#pragma once
#include "chain.hpp"

namespace structured {

enum RecurrenceKind : int64_t { ENTRIES, MATRICES };
enum Decay : int64_t { NO_DECAY, BY_HEAD, BY_KEY };
constexpr int64_t MOST_WIDE = 1 << 20;  // of any size, and of a state
constexpr int64_t MOST_KEY = 4096;
constexpr int MOST_INPUTS = 6;

struct Recurrence {
  int64_t kind, heads, key, width, queries, keys, factors, delta, decay, stored, read, carried;
  double scale;  // of queries

  bool sound() const {
    const int64_t sizes[] = {heads, key, width, queries, keys, factors};
    for (int64_t size : sizes)
      if (size < 1 || size > MOST_WIDE) return false;
    const int64_t flags[] = {kind, delta, stored, read, carried};
    for (int64_t flag : flags)
      if (flag < 0 || flag > 1) return false;
    if (key > MOST_KEY || decay < NO_DECAY || decay > BY_KEY || (stored && !decay)) return false;
    if (heads * key > MOST_WIDE || heads * key * width > MOST_WIDE || factors > MOST_WIDE / (heads * std::max(key, width))) return false;
    if (heads % keys || (queries < heads ? heads % queries : queries % heads)) return false;
    return queries <= MOST_WIDE / std::max(key, width) && keys * key <= MOST_WIDE;
  }
  int64_t group() const { return std::max<int64_t>(1, queries / heads); }
  int64_t state() const { return heads * width * (kind == MATRICES ? key : 1); }
  int64_t decays() const { return decay == BY_KEY ? heads * key : decay == BY_HEAD ? heads : 0; }
  int64_t outputs() const { return kind == MATRICES ? heads * group() * width : read ? heads : state(); }

  struct Input {
    int64_t numbers;  // of a token, or of the whole
    bool sequence, once;  // `once`: not for each element of the batch
  };
  // In the order of the call; gives how many.
  int inputs(Input* to) const {
    int count = 0;
    auto sequence = [&](int64_t numbers) { to[count++] = {numbers, true, false}; };
    if (kind == ENTRIES) {
      sequence(state()), sequence(state());
      if (read) sequence(width);
    } else {
      sequence(queries * key), sequence(factors * keys * key), sequence(factors * heads * width);
      if (decay && !stored) sequence(decays());
      if (delta) sequence(factors * heads);
    }
    if (carried) to[count++] = {state(), false, false};
    if (stored) to[count++] = {decays(), false, true};
    return count;
  }
};

// out[0] (batch, time, outputs), out[1] (batch, state) of the inputs, all without gaps; `of` is sound.
void run(const Recurrence& of, const float* const* in, float* const* out, int64_t batch, int64_t time, const Threads& threads);

}  // namespace structured
