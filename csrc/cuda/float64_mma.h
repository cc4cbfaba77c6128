// The float64 product of tensor cores.
#pragma once

#include "platform.h"

namespace multilora {

// c (8, 8) += a (8, 4) b (4, 8) by a warp. Lane l holds a[l / 4, l % 4], b[l % 4, l / 4] and
// c[l / 4, l % 4 · 2 + {0, 1}].
#ifdef MULTILORA_EMULATE
inline void multiply_add(double (&c)[2], double a, double b) {
  static double left[32][32], right[32][32];
  int warp = emulate::warp(), lane = emulate::lane();
  left[warp][lane] = a;
  right[warp][lane] = b;
  __syncwarp();
  for (int e = 0; e < 2; ++e) {
    for (int k = 0; k < 4; ++k) {
      c[e] += left[warp][lane / 4 * 4 + k] * right[warp][(lane % 4 * 2 + e) * 4 + k];
    }
  }
  __syncwarp();
}
#else
__device__ inline void multiply_add(double (&c)[2], double a, double b) {
  // Volatile, so that it stays where all of the warp comes by.
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}
#endif

}  // namespace multilora
