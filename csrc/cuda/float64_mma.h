// The float64 product of tensor cores.
#pragma once

#include "platform.h"

namespace multilora {

// c (kMmaRows, 8) += a (kMmaRows, kMmaDepth) b (kMmaDepth, 8) by a warp. Hopper has an instruction
// of twice the rows and twice the depth.
#if __CUDA_ARCH__ >= 900
#define MULTILORA_LARGE_FLOAT64_MMA 1
constexpr int kMmaRows = 16, kMmaDepth = 8;
#else
constexpr int kMmaRows = 8, kMmaDepth = 4;
#endif

// The numbers of one product that a lane holds. a and b consist of pieces of 8 by 4 and 4 by 8,
// with one number of each per lane, rows first; c of pieces of 8 by 8, with two neighbours per
// lane.
struct Mma {
  static constexpr int kPieces = kMmaRows / 8;
  static constexpr int kA = kPieces * kMmaDepth / 4, kB = kMmaDepth / 4, kC = 2 * kPieces;

  // The place of the i-th number in a, b and c.
  __device__ static int a_row(int lane, int i) { return lane / 4 + i % kPieces * 8; }
  __device__ static int a_depth(int lane, int i) { return lane % 4 + i / kPieces * 4; }
  __device__ static int b_depth(int lane, int i) { return lane % 4 + i * 4; }
  __device__ static int b_col(int lane) { return lane / 4; }
  __device__ static int c_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
  __device__ static int c_col(int lane, int i) { return lane % 4 * 2 + i % 2; }
};

__device__ inline void multiply_add(double (&c)[Mma::kC], const double (&a)[Mma::kA],
                                    const double (&b)[Mma::kB]) {
  // It is volatile so that it stays where the whole warp executes it.
#ifdef MULTILORA_LARGE_FLOAT64_MMA
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a[0]), "d"(b[0]));
#endif
}

}  // namespace multilora
