// Gram matrices of the factors in parts, each of which is a product over a range of the features.
#include "float64_mma.h"
#include "geometry_stages.h"

namespace multilora::stages {
namespace {

struct GramItem {
  const void* x;
  double* parts;
  Elements elements;
};

struct GramBatch {
  static constexpr int kMost = kParameters / sizeof(GramItem);
  int64_t chunk;  // the features of a part
  GramItem items[kMost];
};

// Grid: parts, pairs of row tiles, items. The number of blocks that a processor must hold keeps the
// compiler from aiming at more and spilling registers.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 3 : 4)
    lora_gram_partial_kernel(const __grid_constant__ GramBatch batch) {
  MULTILORA_SHARED(double, panels, 2 * kPanel);
  const GramItem& item = batch.items[blockIdx.z];
  const Elements elements = item.elements;
  const T* x = static_cast<const T*>(item.x);
  int part = blockIdx.y, tiles = ceil_div(elements.rows, kTile);
  // Only the pairs of tiles on and above the diagonal are computed.
  int row = 0, col = blockIdx.x;
  for (; row < tiles && col >= tiles - row; ++row) col -= tiles - row;
  if (row >= tiles || part >= parts_of(elements.d, batch.chunk)) return;
  bool diagonal = col == 0;
  row *= kTile;
  col = row + col * kTile;
  int64_t first = part * batch.chunk;
  int64_t stop = first + batch.chunk < elements.d ? first + batch.chunk : elements.d;

  double *left = panels, *right = diagonal ? panels : panels + kPanel;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sides = diagonal ? 1 : 2;
  constexpr int kRowTiles = kTile / kMmaRows, kColTiles = kTile / 8;
  double sums[kRowTiles][kColTiles][Mma::kC] = {};
  Vec4<T> values[2][kLoads];
  auto fetch = [&](int64_t at) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        if (side >= sides) continue;
        PanelLoad piece(elements, s, side ? col : row, at, stop);
        values[side][s] = read(x, piece, piece.place, elements.vector);
      }
    }
  };
  if (first < stop) fetch(first);
  for (int64_t at = first; at < stop; at += kTile) {
    __syncthreads();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        if (side >= sides) continue;
        PanelLoad piece(elements, s, side ? col : row, at, stop);
        double* to = piece.in(side ? right : left);
#pragma unroll
        for (int q = 0; q < 4; ++q) to[q * piece.panel_step] = load(values[side][s].values[q]);
      }
    }
    __syncthreads();
    // The next panels are loaded while the products run.
    if (at + kTile < stop) fetch(at + kTile);
    // The warps divide the features between them, a product's depth at a time.
#pragma unroll
    for (int step = warp; step < kTile / kMmaDepth; step += kWarps) {
      double a[kRowTiles][Mma::kA], b[kColTiles][Mma::kB];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < Mma::kA; ++e) {
          int feature = step * kMmaDepth + Mma::a_depth(lane, e);
          a[i][e] = left[feature * kStride + i * kMmaRows + Mma::a_row(lane, e)];
        }
      }
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
        for (int e = 0; e < Mma::kB; ++e) {
          int feature = step * kMmaDepth + Mma::b_depth(lane, e);
          b[j][e] = right[feature * kStride + j * 8 + Mma::b_col(lane)];
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) multiply_add(sums[i][j], a[i], b[j]);
      }
    }
  }

  // Add up the warps' sums in their order.
  for (int turn = 0; turn < kWarps; ++turn) {
    __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
        for (int e = 0; e < Mma::kC; ++e) {
          int at_row = i * kMmaRows + Mma::c_row(lane, e);
          double* place = panels + at_row * kStride + j * 8 + Mma::c_col(lane, e);
          *place = turn ? *place + sums[i][j][e] : sums[i][j][e];
        }
      }
    }
  }
  __syncthreads();
  int64_t n = elements.rows;
  double* gram = item.parts + part * n * n;
  for (int i = warp; i < kTile; i += kWarps) {
    if (row + i < n && col + lane < n) {
      gram[(row + i) * n + col + lane] = panels[i * kStride + lane];
    }
    // Write the other side of the diagonal too. A tile that has columns here has all of its rows.
    if (!diagonal && col + i < n) gram[(col + i) * n + row + lane] = panels[lane * kStride + i];
  }
}

static_assert(sizeof(GramBatch) <= 4096);

template <class T>
void partial_of(const Adapters& adapters, const std::vector<Layer>& layers, int64_t chunk,
                const std::vector<Gram>& grams, Stream stream) {
  GramBatch batch;
  batch.chunk = chunk;
  dim3 grid(0, 0, 0);
  auto flush = [&] {
    launch(lora_gram_partial_kernel<T>, grid, dim3(kThreads), 0, stream, batch);
    grid = dim3(0, 0, 0);
  };
  for (size_t i = 0; i < grams.size(); ++i) {
    const Layer& layer = layers[i / 2];
    const Factor& factor = layer.factors[i % 2];
    int tiles = tiles_of(adapters.particles, layer);
    batch.items[grid.z++] = {factor.x, const_cast<double*>(grams[i].parts),
                             elements_of(adapters.particles, layer, factor, sizeof(T))};
    raise(grid.x, tiles * (tiles + 1) / 2);
    raise(grid.y, grams[i].count);
    if (grid.z == GramBatch::kMost) flush();
  }
  flush();
}

}  // namespace

void partial(const Adapters& adapters, const std::vector<Layer>& layers, int64_t chunk,
             const std::vector<Gram>& grams, Stream stream) {
  auto chosen = adapters.dtype == DType::f32   ? partial_of<float>
                : adapters.dtype == DType::f64 ? partial_of<double>
                : adapters.dtype == DType::f16 ? partial_of<f16>
                                               : partial_of<bf16>;
  chosen(adapters, layers, chunk, grams, stream);
}

}  // namespace multilora::stages
