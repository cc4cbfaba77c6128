// Adapter geometry on the CPU: how the work is divided.
//
// How the features of a factor are cut into parts depends on their number alone, and partial sums
// are added in order, so that results do not depend on the number of threads.
#include "geometry.h"

#include <omp.h>

#include <new>

#include "geometry_kernels.h"
#include "memory.h"

namespace multilora {
namespace {

// The features of a part: a whole number of panels of most sizes.
constexpr int64_t kPart = 960;
// Fewer multiplications than this take one thread about 20 microseconds.
constexpr double kTiny = 1e6;

// Memory for `count` doubles, aligned to the vectors of every level.
Memory allocate_doubles(int64_t count) {
  Memory memory = allocate(count * int64_t(sizeof(double)), 64);
  if (!memory) throw std::bad_alloc();
  return memory;
}

// There is at least one part: a factor without features still has a Gram matrix, of zeros.
int64_t parts_of(const Factor& factor) { return factor.d > 0 ? ceil_div(factor.d, kPart) : 1; }

// One layer's stages and workspace: both Gram matrices in parts, then the weights that are computed
// from them for the gradient of each factor.
class Work {
 public:
  Work(const Adapters& adapters, const Layer& layer)
      : adapters_(adapters),
        layer_(layer),
        side_(gram_side(adapters.particles, layer.rank)),
        parts_A_(parts_of(layer.factors[0])),
        parts_(parts_A_ + parts_of(layer.factors[1])) {}

  int64_t size() const { return parts_ * side_ * side_ + 2 * weights_size(); }
  double products() const {
    return double(side_) * side_ * (layer_.factors[0].d + layer_.factors[1].d);
  }

  // The number of units of a stage that can run at the same time; the stages follow one another.
  int64_t units(int stage) const { return stage == 1 ? 1 : parts_; }

  void run(int stage, int64_t unit, double* space, double* scratch) const {
    const GeometryKernels& kernels = MULTILORA_PICK(geometry_kernels);
    int64_t matrix = side_ * side_;
    if (stage == 1) return join(kernels, space, scratch);
    int which = unit >= parts_A_;
    const Factor& factor = layer_.factors[which];
    int64_t first = (unit - which * parts_A_) * kPart;
    int64_t last = first + kPart < factor.d ? first + kPart : factor.d;
    if (stage == 0) {
      kernels.gram(adapters_, layer_, which, first, last, space + unit * matrix, scratch);
    } else {
      double* weight = weight_of(which, space);
      kernels.apply(adapters_, layer_, which, first, last, weight, weight + matrix, scratch);
    }
  }

 private:
  // A matrix, and the norms of K particles, K <= side.
  int64_t weights_size() const { return side_ * side_ + side_; }
  double* weight_of(int which, double* space) const {
    return space + parts_ * side_ * side_ + which * weights_size();
  }

  // Turns the Gram matrices' parts into the traces or into the weights.
  void join(const GeometryKernels& kernels, double* space, double* scratch) const {
    int64_t matrix = side_ * side_;
    Gram grams[2] = {{space, 1, side_}, {space + parts_A_ * matrix, 1, side_}};
    kernels.gather(space, parts_A_, side_);
    kernels.gather(space + parts_A_ * matrix, parts_ - parts_A_, side_);
    if (layer_.traces) return kernels.trace(adapters_, layer_, grams[0], grams[1], scratch);
    for (int which = 0; which < 2; ++which) {
      double* weight = weight_of(which, space);
      kernels.weigh(adapters_, layer_, grams[1 - which], grams[which], weight, weight + matrix,
                    scratch);
    }
  }

  const Adapters& adapters_;
  const Layer& layer_;
  int64_t side_, parts_A_, parts_;
};

}  // namespace

void geometry(const Adapters& adapters, const std::vector<Layer>& layers, int threads) {
  std::vector<Work> works;
  int64_t all = 0, largest = 0, scratch = 0;
  double products = 0;
  for (const Layer& layer : layers) {
    const Work& work = works.emplace_back(adapters, layer);
    int64_t own = scratch_size(gram_side(adapters.particles, layer.rank));
    all += work.size();
    if (work.size() > largest) largest = work.size();
    if (own > scratch) scratch = own;
    products += work.products();
  }
  if (products < kTiny) threads = 1;
  int stages = layers[0].traces ? 2 : 3;
  int count = int(works.size());
  if (threads == 1 || count >= 4 * threads) {
    // Each thread takes whole layers and runs all stages while a layer's factors are in its caches.
    Memory memory = allocate_doubles(threads * (largest + scratch));
    double* space = static_cast<double*>(memory.get());
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int layer = 0; layer < count; ++layer) {
      double* mine = space + omp_get_thread_num() * (largest + scratch);
      for (int stage = 0; stage < stages; ++stage) {
        for (int64_t unit = 0; unit < works[layer].units(stage); ++unit) {
          works[layer].run(stage, unit, mine, mine + largest);
        }
      }
    }
    return;
  }
  Memory memory = allocate_doubles(all + threads * scratch);
  double* space = static_cast<double*>(memory.get());
  for (int stage = 0; stage < stages; ++stage) {
    struct Unit {
      const Work* work;
      int64_t unit;
      double* space;
    };
    std::vector<Unit> units;
    double* place = space;
    for (const Work& work : works) {
      for (int64_t unit = 0; unit < work.units(stage); ++unit) {
        units.push_back({&work, unit, place});
      }
      place += work.size();
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < units.size(); ++i) {
      double* mine = space + all + omp_get_thread_num() * scratch;
      units[i].work->run(stage, units[i].unit, units[i].space, mine);
    }
  }
}

}  // namespace multilora
