// The adapters' geometry, with all layers in one launch per stage (several for very many layers):
// 1. partial: products over stretches of the features -> workspace, (n, n) each, n = K·r;
// 2. trace: T or D of the parts' sums; weigh: W = (U ⊗ 1) ∘ G, in place of the first part;
// 3. apply: dA_cat = W_B A_cat, dB_cat = B_cat W_A, and SVGD's mixed gradients on top.
// Everything is in float64, on tensor cores: a float32 product on the ordinary units is not faster.
//
// Kernels get their description of the layers by value: there is no copy to wait for, and a
// captured graph keeps it.
#include "geometry.h"
#include "geometry_stages.h"
#include "group.h"

namespace multilora {
namespace {

using namespace stages;

struct TraceLayer {
  Gram gram_A, gram_B;
  int rank;
  double scaling;
  void* out;
};

struct TraceBatch {
  static constexpr int kMost = kParameters / sizeof(TraceLayer);
  int particles;
  bool distance;
  TraceLayer layers[kMost];
};

// Each block computes a row of T or D, and each warp an element. Grid: K, layers.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    lora_gram_trace_kernel(const __grid_constant__ TraceBatch batch) {
  MULTILORA_DYNAMIC_SHARED(shared);
  double* norms = reinterpret_cast<double*>(shared);
  const TraceLayer& layer = batch.layers[blockIdx.y];
  const Gram gram_A = layer.gram_A, gram_B = layer.gram_B;
  int particles = batch.particles, rank = layer.rank, i = blockIdx.x, warp = threadIdx.x / 32;
  double scale = layer.scaling * layer.scaling;
  Out* row = static_cast<Out*>(layer.out) + int64_t(i) * particles;
  Lanes lanes(32);
  // Distances need the norms first.
  for (int pass = batch.distance ? 0 : 1; pass < 2; ++pass) {
    for (int j = warp; j < particles; j += kWarps) {
      // (i, j) and (j, i) must get the same sum.
      int low = pass == 0 || j < i ? j : i, high = pass == 0 || j > i ? j : i;
      double value = trace(lanes, gram_A, gram_B, rank, low, high);
      if (pass == 1 && batch.distance) value = i == j ? 0 : distance(norms[i], norms[j], value);
      if (lanes.rank() > 0) continue;
      if (pass == 0) {
        norms[j] = value;
      } else {
        row[j] = Out(scale * value);
      }
    }
    __syncthreads();
  }
}

struct WeighItem {
  Gram gram;
  const double* upstream;
  int rank;
  double scaling;
};

struct WeighBatch {
  static constexpr int kMost = kParameters / sizeof(WeighItem);
  int particles;
  WeighItem items[kMost];
};

// Grid: elements of W, items.
__global__ void __launch_bounds__(kThreads)
    lora_gram_weigh_kernel(const __grid_constant__ WeighBatch batch) {
  const WeighItem& item = batch.items[blockIdx.y];
  int n = int(item.gram.side);
  int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= int64_t(n) * n) return;
  int row = int(index / n), col = int(index % n);
  double U = pull(item.upstream, batch.particles, item.scaling, row / item.rank, col / item.rank);
  // Nobody else reads or writes this element.
  const_cast<double*>(item.gram.parts)[index] = U * item.gram.at(row, col);
}

static_assert(sizeof(TraceBatch) <= 4096 && sizeof(WeighBatch) <= 4096);

int64_t square(int64_t n) { return n * n; }

// The features of a part: enough parts to fill a GPU, and no more, because every part is written
// and read again.
int64_t chunk_of(int particles, const std::vector<Layer>& layers) {
  constexpr int64_t kBlocks = 4096, kLeast = 256;
  int64_t work = 0;
  for (const Layer& layer : layers) {
    int64_t tiles = tiles_of(particles, layer);
    work += (layer.factors[0].d + layer.factors[1].d) * tiles * (tiles + 1) / 2;
  }
  int64_t chunk = ceil_div(work / kBlocks, kTile) * kTile;
  return chunk < kLeast ? kLeast : chunk;
}

template <class Out>
void traces(const Adapters& adapters, const std::vector<Layer>& layers,
            const std::vector<Gram>& grams, Stream stream) {
  TraceBatch batch;
  batch.particles = adapters.particles;
  batch.distance = adapters.distance;
  dim3 grid(adapters.particles, 0, 1);
  auto flush = [&] {
    launch(lora_gram_trace_kernel<Out>, grid, dim3(kThreads), sizeof(double) * adapters.particles,
           stream, batch);
    grid.y = 0;
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    batch.layers[grid.y++] = {grams[2 * i], grams[2 * i + 1], layer.rank, layer.scaling,
                              layer.traces};
    if (grid.y == TraceBatch::kMost) flush();
  }
  flush();
}

void weigh(const Adapters& adapters, const std::vector<Layer>& layers,
           const std::vector<Gram>& grams, Stream stream) {
  WeighBatch batch;
  batch.particles = adapters.particles;
  dim3 grid(0, 0, 1);
  auto flush = [&] {
    launch(lora_gram_weigh_kernel, grid, dim3(kThreads), 0, stream, batch);
    grid = dim3(0, 0, 1);
  };
  for (size_t i = 0; i < grams.size(); ++i) {
    const Layer& layer = layers[i / 2];
    batch.items[grid.y++] = {grams[i], layer.upstream, layer.rank, layer.scaling};
    raise(grid.x, ceil_div(square(grams[i].side), kThreads));
    if (grid.y == WeighBatch::kMost) flush();
  }
  flush();
}

std::vector<Gram> grams_of(int particles, const std::vector<Layer>& layers, double* workspace,
                           int64_t chunk) {
  std::vector<Gram> grams;
  for (const Layer& layer : layers) {
    for (const Factor& factor : layer.factors) {
      int64_t n = int64_t(particles) * layer.rank;
      grams.push_back({workspace, parts_of(factor.d, chunk), n});
      workspace += grams.back().count * square(n);
    }
  }
  return grams;
}

}  // namespace

int64_t geometry_workspace(int particles, const std::vector<Layer>& layers) {
  int64_t size = 0;
  for (const Gram& gram : grams_of(particles, layers, nullptr, chunk_of(particles, layers))) {
    size += gram.count * square(gram.side);
  }
  return size;
}

void geometry(const Adapters& adapters, const std::vector<Layer>& layers, double* workspace,
              Stream stream) {
  int64_t chunk = chunk_of(adapters.particles, layers);
  std::vector<Gram> grams = grams_of(adapters.particles, layers, workspace, chunk);
  partial(adapters, layers, chunk, grams, stream);
  if (layers[0].traces) {
    auto chosen = adapters.dtype == DType::f64 ? traces<double> : traces<float>;
    chosen(adapters, layers, grams, stream);
  } else {
    weigh(adapters, layers, grams, stream);
    apply(adapters, layers, grams, stream);
  }
}

}  // namespace multilora
