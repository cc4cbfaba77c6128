// The parts that the stages of adapter geometry share: how the work is divided, and how a factor is
// copied to shared memory and back.
#pragma once

#include <vector>

#include "geometry.h"
#include "platform.h"

namespace multilora::stages {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// The rows, and the features, that are processed at a time.
constexpr int kTile = 32;
// The stride of a feature in a panel in shared memory, with which a product's lanes hit all banks.
constexpr int kStride = kTile + 4;
constexpr int kPanel = kTile * kStride;
// Kernels take at most 4 KB of parameters.
constexpr int kParameters = 4096 - 64;

// The first stage. grams: one for each layer's lora_A and lora_B, in parts of `chunk` features.
void partial(const Adapters& adapters, const std::vector<Layer>& layers, int64_t chunk,
             const std::vector<Gram>& grams, Stream stream);
// The last stage. grams: the weighed matrices, each in place of its first part.
void apply(const Adapters& adapters, const std::vector<Layer>& layers,
           const std::vector<Gram>& grams, Stream stream);

MULTILORA_HD int parts_of(int64_t d, int64_t chunk) {
  // There is at least one part: a factor without features still has a Gram matrix, of zeros.
  return d > 0 ? int(ceil_div(d, chunk)) : 1;
}

inline int tiles_of(int particles, const Layer& layer) {
  return ceil_div(particles * layer.rank, kTile);
}

template <class Largest, class Value>
void raise(Largest& largest, Value value) {
  if (Largest(value) > largest) largest = Largest(value);
}

// The elements of one factor, addressed by row i·r + a of A_cat or B_catᵀ, and by feature.
struct Elements {
  int64_t d;
  int rank, rows;
  bool is_B, vector;  // vector: four neighbours can be moved at once

  __device__ int64_t at(int row, int64_t feature) const {
    if (!is_B) return row * d + feature;
    return (row / rank * d + feature) * rank + row % rank;
  }
};

template <class T>
struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) Vec4 {
  T values[4];
};

// A thread loads this many pieces of a panel of kTile features by kTile rows, four neighbours each.
constexpr int kLoads = kTile * kTile / 4 / kThreads;

struct PanelLoad {
  int row, feature;  // within the panel
  int panel_step;    // between the four in shared memory
  int64_t step;      // and in the factor
  int64_t place;     // of the first one, in the factor
  int valid;         // how many of the four exist

  // The panel starts at (row0, feature0); features from `stop` on do not exist.
  __device__ PanelLoad(const Elements& elements, int which, int row0, int64_t feature0,
                       int64_t stop) {
    int index = threadIdx.x + which * kThreads;
    // The four are neighbours along the rows where rows are adjacent, else along the features.
    bool by_row = elements.is_B && elements.vector;
    if (by_row) {
      row = index % 8 * 4;
      feature = index / 8;
    } else {
      // A warp takes 16 rows by 8 features: whole sectors of global, all banks of shared memory.
      row = index % 16 + index / 32 % 2 * 16;
      feature = index / 16 % 2 * 4 + index / 64 * 8;
    }
    panel_step = by_row ? 1 : kStride;
    step = elements.is_B && !elements.vector ? elements.rank : 1;
    place = elements.at(row0 + row, feature0 + feature);
    int64_t left = by_row ? elements.rows - row0 - row : stop - feature0 - feature;
    bool none = by_row ? feature0 + feature >= stop : row0 + row >= elements.rows;
    valid = none || left < 0 ? 0 : left < 4 ? int(left) : 4;
  }

  __device__ double* in(double* panel) const { return panel + feature * kStride + row; }
};

template <class T>
__device__ Vec4<T> read(const T* x, const PanelLoad& piece, int64_t place, bool vector) {
  Vec4<T> vec = {};
  if (vector && piece.valid == 4) return *reinterpret_cast<const Vec4<T>*>(x + place);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    if (q < piece.valid) vec.values[q] = x[place + q * piece.step];
  }
  return vec;
}

inline Elements elements_of(int particles, const Layer& layer, const Factor& factor, size_t size) {
  Elements elements{factor.d, layer.rank, particles * layer.rank, factor.is_B, false};
  uintptr_t together = reinterpret_cast<uintptr_t>(factor.x) |
                       reinterpret_cast<uintptr_t>(factor.grad) |
                       reinterpret_cast<uintptr_t>(factor.out);
  bool aligned = together % (4 * size > 16 ? 16 : 4 * size) == 0;
  elements.vector = aligned && (factor.is_B ? layer.rank : factor.d) % 4 == 0;
  return elements;
}

}  // namespace multilora::stages
