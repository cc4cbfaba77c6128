// The float64 product of tensor cores.
#pragma once

#include "platform.h"

namespace multilora {

// c (8, 8) += a (8, 4) b (4, 8) by a warp. Lane l holds a[l / 4, l % 4], b[l % 4, l / 4] and
// c[l / 4, l % 4 · 2 + {0, 1}].
__device__ inline void multiply_add(double (&c)[2], double a, double b) {
  // Volatile, so that it stays where all of the warp comes by.
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

}  // namespace multilora
