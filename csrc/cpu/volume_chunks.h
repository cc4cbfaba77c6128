// The scratch memory of the volume's kernels.
#pragma once

#include "simd.h"

namespace multilora::MULTILORA_LEVEL {

MULTILORA_HD int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// The vectors per particle in a chunk of classes. A chunk takes 16 KiB, half of the first-level
// cache, or more, so that the work at its end stays cheap. Where the matrix is over the classes, it
// takes all of them.
MULTILORA_HD int64_t chunk_vectors(int64_t K, int64_t C, int lanes) {
  int64_t all = ceil_div(C, lanes);
  if (K >= C) return all;
  int64_t fitting = 16384 / MULTILORA_VECTOR_BYTES / K, smallest = 512 / MULTILORA_VECTOR_BYTES;
  return min(all, fitting > smallest ? fitting : smallest);
}

// Arrays that lie one after another in the scratch memory.
struct Scratch {
  char* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(memory + used);
    used += ceil_div(count * int64_t(sizeof(T)), MULTILORA_VECTOR_BYTES) * MULTILORA_VECTOR_BYTES;
    return array;
  }
};

// Copies the logits (K, C) of an example to contiguous float64.
template <class T>
void widen_rows(const T* logits, int64_t stride_k, int64_t K, int64_t C, double* wide) {
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t c = 0; c < C; ++c) wide[i * C + c] = load(logits[i * stride_k + c]);
  }
}

// A chunk of the classes of all particles.
template <class A>
struct Chunk {
  int64_t vectors;  // per particle
  Vec<A>* e;        // (K, vectors)
  A* tops;          // (K)
  double* shrunk;   // (K)

  Chunk(Scratch& scratch, int64_t K, int64_t C)
      : vectors(chunk_vectors(K, C, Vec<A>::lanes)),
        e(scratch.take<Vec<A>>(K * vectors)),
        tops(scratch.take<A>(K)),
        shrunk(scratch.take<double>(K)) {}
};

}  // namespace multilora::MULTILORA_LEVEL
