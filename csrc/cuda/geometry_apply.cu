// The factors' gradients: dA_cat = W_B A_cat and dB_cat = B_cat W_A, plus SVGD's mixed gradients.
#include "float64_mma.h"
#include "geometry_stages.h"

namespace multilora::stages {
namespace {

struct ApplyItem {
  const void* x;
  const double* weight;
  const void* grad;
  const double* mix;
  void* out;
  Elements elements;
};

struct ApplyBatch {
  static constexpr int kMost = kParameters / sizeof(ApplyItem);
  int particles;
  bool mix_is_full;
  ApplyItem items[kMost];
};

// The features that a block writes.
constexpr int kApply = 2 * kTile;

// Grid: ranges of features, row tiles, items. The number of blocks that a processor must hold keeps
// the compiler from aiming at more and spilling registers.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    lora_gram_apply_kernel(const __grid_constant__ ApplyBatch batch) {
  MULTILORA_SHARED(double, panels, 2 * kPanel);
  MULTILORA_SHARED(double, weights, kPanel);
  const ApplyItem& item = batch.items[blockIdx.z];
  const Elements elements = item.elements;
  const T* x = static_cast<const T*>(item.x);
  int row = blockIdx.y * kTile, n = elements.rows;
  int64_t first = int64_t(blockIdx.x) * kApply;
  if (row >= n || first >= elements.d) return;

  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Each warp has two groups of eight features.
  constexpr int kRowTiles = kTile / kMmaRows, kGroups = 2;
  double sums[kRowTiles][kGroups][Mma::kC] = {};
  for (int k = 0; k < n; k += kTile) {
    __syncthreads();
#pragma unroll
    for (int s = 0; s < 2 * kLoads; ++s) {
      int panel = s / kLoads;
      PanelLoad piece(elements, s % kLoads, k, first + panel * kTile, elements.d);
      Vec4<T> values = read(x, piece, piece.place, elements.vector);
      double* to = piece.in(panels + panel * kPanel);
#pragma unroll
      for (int q = 0; q < 4; ++q) to[q * piece.panel_step] = load(values.values[q]);
    }
    // W is symmetric; its rows are contiguous.
    for (int i = warp; i < kTile; i += kWarps) {
      bool inside = k + i < n && row + lane < n;
      weights[i * kStride + lane] = inside ? item.weight[int64_t(k + i) * n + row + lane] : 0;
    }
    __syncthreads();
    const double* features = panels + warp / 2 * kPanel + warp % 2 * 8 * kGroups * kStride;
#pragma unroll
    for (int step = 0; step < kTile / kMmaDepth; ++step) {
      double a[kRowTiles][Mma::kA], b[kGroups][Mma::kB];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < Mma::kA; ++e) {
          int depth = step * kMmaDepth + Mma::a_depth(lane, e);
          a[i][e] = weights[depth * kStride + i * kMmaRows + Mma::a_row(lane, e)];
        }
      }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int e = 0; e < Mma::kB; ++e) {
          int depth = step * kMmaDepth + Mma::b_depth(lane, e);
          b[j][e] = features[(8 * j + Mma::b_col(lane)) * kStride + depth];
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) multiply_add(sums[i][j], a[i], b[j]);
      }
    }
  }

  // Shared memory brings the result into the order in which the factor is stored.
  __syncthreads();
  double* result = panels + warp / 2 * kPanel + warp % 2 * 8 * kGroups * kStride;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int e = 0; e < Mma::kC; ++e) {
        int feature = 8 * j + Mma::c_col(lane, e);
        result[feature * kStride + i * kMmaRows + Mma::c_row(lane, e)] = sums[i][j][e];
      }
    }
  }
  __syncthreads();
  const T* grad = static_cast<const T*>(item.grad);
  T* out = static_cast<T*>(item.out);
  for (int s = 0; s < 2 * kLoads; ++s) {
    int panel = s / kLoads;
    PanelLoad piece(elements, s % kLoads, row, first + panel * kTile, elements.d);
    if (piece.valid == 0) continue;
    const double* from = piece.in(panels + panel * kPanel);
    double values[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) values[q] = from[q * piece.panel_step];
    if (grad) {
      // Mix in this element of all particles' gradients, or of this particle's alone: multiplying
      // the others by zero would spread a NaN.
      int i = (row + piece.row) / elements.rank;
      int begin = batch.mix_is_full ? 0 : i, end = batch.mix_is_full ? batch.particles : i + 1;
      const double* mix = batch.mix_is_full ? item.mix + int64_t(i) * batch.particles : item.mix;
      for (int j = begin; j < end; ++j) {
        int64_t place = piece.place + (j - i) * elements.rank * elements.d;
        Vec4<T> others = read(grad, piece, place, elements.vector);
#pragma unroll
        for (int q = 0; q < 4; ++q) values[q] += mix[j] * load(others.values[q]);
      }
    }
    Vec4<T> rounded = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) store(&rounded.values[q], values[q]);
    if (elements.vector && piece.valid == 4) {
      *reinterpret_cast<Vec4<T>*>(out + piece.place) = rounded;
      continue;
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q < piece.valid) out[piece.place + q * piece.step] = rounded.values[q];
    }
  }
}

static_assert(sizeof(ApplyBatch) <= 4096);

template <class T>
void apply_of(const Adapters& adapters, const std::vector<Layer>& layers,
              const std::vector<Gram>& grams, Stream stream) {
  ApplyBatch batch;
  batch.particles = adapters.particles;
  batch.mix_is_full = adapters.mix_is_full;
  dim3 grid(0, 0, 0);
  auto flush = [&] {
    launch(lora_gram_apply_kernel<T>, grid, dim3(kThreads), 0, stream, batch);
    grid = dim3(0, 0, 0);
  };
  for (size_t i = 0; i < grams.size(); ++i) {
    const Layer& layer = layers[i / 2];
    const Factor& factor = layer.factors[i % 2];
    // The gradient of lora_A takes the products of lora_B, and the other way round.
    batch.items[grid.z++] = {
        factor.x,  grams[i ^ 1].parts, factor.grad,
        layer.mix, factor.out,         elements_of(adapters.particles, layer, factor, sizeof(T))};
    raise(grid.x, ceil_div(factor.d, kApply));
    raise(grid.y, tiles_of(adapters.particles, layer));
    if (grid.z == ApplyBatch::kMost) flush();
  }
  flush();
}

}  // namespace

void apply(const Adapters& adapters, const std::vector<Layer>& layers,
           const std::vector<Gram>& grams, Stream stream) {
  auto chosen = adapters.dtype == DType::f32   ? apply_of<float>
                : adapters.dtype == DType::f64 ? apply_of<double>
                : adapters.dtype == DType::f16 ? apply_of<f16>
                                               : apply_of<bf16>;
  chosen(adapters, layers, grams, stream);
}

}  // namespace multilora::stages
