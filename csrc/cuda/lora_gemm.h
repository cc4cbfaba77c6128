// The large product of the LoRA linear on Hopper: y and dX.
#pragma once

#include "../common.h"
#include "stream.h"

namespace multilora {

// Y_k = X_k W' + bias + S_k Q_k'. All tensors are contiguous float16 or bfloat16 and start at
// multiples of 16 bytes; depth, cols and rank are multiples of 8. Q includes the scaling.
struct LoraGemm {
  DType dtype;
  bool w_depth_first;
  int tile_cols;     // 128 or 256: the width of a tile
  int processors;    // how many blocks run at a time
  const void* x;     // (particles, rows, depth)
  const void* w;     // (cols, depth), or (depth, cols) where w_depth_first
  const void* s;     // (particles, rows, rank)
  const void* q;     // (particles, cols, rank), or (particles, rank, cols) where w_depth_first
  const void* bias;  // (cols), or null
  void* y;           // (particles, rows, cols)
  int64_t particles, rows, depth, cols, rank;
};

void lora_gemm(const LoraGemm& problem, Stream stream);

}  // namespace multilora
