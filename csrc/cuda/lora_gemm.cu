// One GEMM over the virtual concatenation [X | S] · [W | Q]': the low-rank product is one more step
// on the same accumulators, so that Y is written once and never read. dX = [dY | dS] · [W ; A] is
// the same kernel with W and Q read in the other operand order.
//
// Persistent blocks of three warp groups loop over tiles of 128 rows (of one particle) x TILE_COLS
// columns. One thread of the first group, the producer, keeps a ring of stages filled: each holds
// 64 of the depth of X and W, as TMA copies that a "full" barrier counts. The two other groups, the
// consumers, multiply 64 rows each, with all accumulators in registers, and always have one stage
// of wgmmas under way while they issue the next one. A stage whose products are done goes back to
// the producer through an "empty" barrier. After the depth come the rank's steps, through the same
// ring, from S and Q, with rows only as long as the rank needs. The producer does not stop at the
// end of a tile: while the consumers round, stage and store one tile, the ring fills with the next
// one.
//
// Elements outside a tensor are loaded as zero and not stored, so tiles at the edges need no extra
// code, and rows of another particle are never touched.
#include <initializer_list>

#include "hopper.h"
#include "lora_gemm.h"

namespace multilora {
namespace {

using hopper::TensorMap;

constexpr int kTileRows = 128;
constexpr int kDepth = 64;
constexpr int kGroup = 128;  // the threads of a warp group
constexpr int kShared = 227 * 1024;

// The layout of shared memory. Every tile starts at a multiple of 1024 bytes, where the swizzling
// pattern begins.
template <int TILE_COLS>
struct Layout {
  static constexpr int kX = kTileRows * kDepth * 2;
  static constexpr int kStage = kX + TILE_COLS * kDepth * 2;
  // Each consumer warp stages its 16 rows in two buffers of 64 columns.
  static constexpr int kBuffer = 16 * 64 * 2;
  static constexpr int kStaging = 8 * 2 * kBuffer;
  static constexpr int kBarriers = 256;
  static constexpr int kStages = (kShared - kStaging - kBarriers) / kStage;
  static constexpr int kBytes = kStages * kStage + kStaging + kBarriers;
};

struct Arguments {
  TensorMap x, w, s, q, y;
  const void* bias;
  int cols;
  int strips, strips_each;  // of kTileRows rows: of all particles, of one
  int tiles_across, tiles;
  int depth_steps, rank_steps;
  int rank_depth;  // what a rank step loads: 16, 32 or 64
};

struct Tile {
  int particle, row, col;
};

// The tiles of a band of 16 strips come together, column by column, so that W's columns are in the
// L2 cache.
template <int TILE_COLS>
__device__ __forceinline__ Tile tile_at(const Arguments& g, int index) {
  constexpr int kBand = 16;
  if (index >= g.tiles) return {0, 0, 0};
  int band = index / (kBand * g.tiles_across), within = index % (kBand * g.tiles_across);
  int height = g.strips - band * kBand < kBand ? g.strips - band * kBand : kBand;
  int strip = band * kBand + within % height;
  return {strip / g.strips_each, strip % g.strips_each * kTileRows, within / height * TILE_COLS};
}

// A place in the ring, and the parity of the number of passes through it.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Loads columns of W or Q and a piece of their depth in the order that wgmma needs: rows along the
// depth, or, where the columns are contiguous, blocks of 64 columns.
template <bool DEPTH_FIRST, int TILE_COLS>
__device__ __forceinline__ void load_columns(unsigned char* to, const TensorMap& map,
                                             uint64_t* full, int col, int start, int depth,
                                             int particle) {
  if constexpr (DEPTH_FIRST) {
#pragma unroll
    for (int block = 0; block < TILE_COLS / 64; ++block) {
      hopper::load_tile(to + block * 128 * depth, map, full, col + block * 64, start, particle);
    }
  } else {
    hopper::load_tile(to, map, full, start, col, particle);
  }
}

template <bool DEPTH_FIRST, int TILE_COLS>
__device__ __forceinline__ void produce(const Arguments& g, unsigned char* stages, uint64_t* full,
                                        uint64_t* empty) {
  using L = Layout<TILE_COLS>;
  Ring<L::kStages> at;
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    Tile tile = tile_at<TILE_COLS>(g, index);
    for (int step = 0; step < g.depth_steps + g.rank_steps; ++step) {
      bool low_rank = step >= g.depth_steps;
      int depth = low_rank ? g.rank_depth : kDepth;
      int start = (low_rank ? step - g.depth_steps : step) * kDepth;
      unsigned char* x = stages + at.stage * L::kStage;
      uint64_t* barrier = full + at.stage;
      // At first the ring is empty: a barrier reports the phase before its first one as complete.
      hopper::barrier_wait(empty + at.stage, at.parity ^ 1);
      hopper::barrier_arrive_expect(barrier, (kTileRows + TILE_COLS) * depth * 2);
      hopper::load_tile(x, low_rank ? g.s : g.x, barrier, start, tile.row, tile.particle);
      load_columns<DEPTH_FIRST, TILE_COLS>(x + L::kX, low_rank ? g.q : g.w, barrier, tile.col,
                                           start, depth, low_rank ? tile.particle : 0);
      at.advance();
    }
  }
}

// Loads the bias of the columns whose sums this thread holds, in pairs.
template <int TILE_COLS>
__device__ __forceinline__ void load_bias(const Arguments& g, int col,
                                          uint32_t (&bias)[TILE_COLS / 8]) {
  const int first = col + 2 * (threadIdx.x % 4), left = g.bias != nullptr ? g.cols - first : 0;
  const uint32_t* pairs = static_cast<const uint32_t*>(g.bias) + first / 2;
#pragma unroll
  for (int i = 0; i < TILE_COLS / 8; ++i) bias[i] = 8 * i < left ? __ldg(pairs + 4 * i) : 0;
}

template <class T>
__device__ __forceinline__ float half_of(uint32_t pair, int which) {
  return load(T{static_cast<uint16_t>(pair >> 16 * which)});
}

// Adds the bias, rounds, and copies through shared memory to Y, 64 columns at a time. Each warp
// does this by itself.
template <class T, int TILE_COLS>
__device__ __forceinline__ void finish(const Arguments& g, Tile tile, int warp,
                                       const float (&sums)[TILE_COLS / 2],
                                       const uint32_t (&bias)[TILE_COLS / 8],
                                       unsigned char* staging) {
  const int lane = threadIdx.x % 32, row = lane % 16;
  const int warp_row = tile.row + warp * 16;
#pragma unroll
  for (int block = 0; block < TILE_COLS / 64; ++block) {
    unsigned char* buffer = staging + block % 2 * Layout<TILE_COLS>::kBuffer;
    // Wait until the store before the last one has read this buffer.
    if (lane == 0) hopper::store_wait<1>();
    __syncwarp();
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      uint32_t rounded[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // store_matrices() takes the upper and lower 8 rows of 8 columns, then of the next 8.
        int eighth = block * 8 + part * 2 + i / 2, at = 4 * eighth + 2 * (i % 2);
        rounded[i] = hopper::pack<T>(sums[at] + half_of<T>(bias[eighth], 0),
                                     sums[at + 1] + half_of<T>(bias[eighth], 1));
      }
      int piece = part * 2 + lane / 16;
      hopper::store_matrices(buffer + row * 128 + (piece ^ row % 8) * 16, rounded);
    }
    hopper::async_fence();
    __syncwarp();
    if (lane == 0) {
      hopper::store_tile(g.y, buffer, tile.col + block * 64, warp_row, tile.particle);
    }
  }
}

// Issues the products of one stage: 16 of the depth each.
template <class T, bool DEPTH_FIRST, int COUNT, int HALF_COLS>
__device__ __forceinline__ void multiply(float (&sums)[HALF_COLS], uint64_t x, uint64_t w,
                                         uint32_t offset, bool accumulate) {
  hopper::wgmma_fence();
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    hopper::wgmma<T, DEPTH_FIRST>(sums, hopper::advance(x, offset + k * hopper::kNext16<false>),
                                  hopper::advance(w, offset + k * hopper::kNext16<DEPTH_FIRST>),
                                  k > 0 || accumulate);
  }
  hopper::wgmma_commit();
}

template <class T, bool DEPTH_FIRST, int TILE_COLS>
__device__ __forceinline__ void consume(const Arguments& g, unsigned char* stages,
                                        unsigned char* staging, uint64_t* full, uint64_t* empty) {
  using L = Layout<TILE_COLS>;
  const int thread = threadIdx.x - kGroup, lane = thread % 32, warp = thread / 32;
  const int upper = thread / kGroup * 64;  // this group's first row
  staging += warp * 2 * L::kBuffer;
  const uint32_t x = hopper::shared_address(stages), w = x + L::kX;
  const uint64_t x_depth = hopper::k_major(x + upper * 128, 128);
  const uint64_t w_depth = DEPTH_FIRST ? hopper::mn_major(w, kDepth) : hopper::k_major(w, 128);
  const uint32_t rank_row = 2 * g.rank_depth;
  const uint64_t x_rank = hopper::k_major(x + upper * rank_row, rank_row);
  const uint64_t w_rank =
      DEPTH_FIRST ? hopper::mn_major(w, g.rank_depth) : hopper::k_major(w, rank_row);

  Ring<L::kStages> at;
  float sums[TILE_COLS / 2];
  Tile tile = tile_at<TILE_COLS>(g, blockIdx.x);
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    Tile next{};
    uint32_t bias[TILE_COLS / 8];
    int last = -1;  // the stage whose products are under way
    for (int step = 0; step < g.depth_steps + g.rank_steps; ++step) {
      hopper::barrier_wait(full + at.stage, at.parity);
      const uint32_t offset = at.stage * (L::kStage >> 4);
      if (step < g.depth_steps) {
        multiply<T, DEPTH_FIRST, 4>(sums, x_depth, w_depth, offset, step > 0);
      } else if (g.rank_depth == 16) {
        multiply<T, DEPTH_FIRST, 1>(sums, x_rank, w_rank, offset, true);
      } else if (g.rank_depth == 32) {
        multiply<T, DEPTH_FIRST, 2>(sums, x_rank, w_rank, offset, true);
      } else {
        multiply<T, DEPTH_FIRST, 4>(sums, x_rank, w_rank, offset, true);
      }
      if (step == 0) {
        // Do all other work while products are under way.
        load_bias<TILE_COLS>(g, tile.col, bias);
        next = tile_at<TILE_COLS>(g, index + gridDim.x);
      }
      // Each warp arrives by itself: it sees its own products end, not those of the other warps.
      hopper::wgmma_wait<1>();
      if (lane == 0 && last >= 0) hopper::barrier_arrive(empty + last);
      last = at.stage;
      at.advance();
    }
    hopper::wgmma_wait<0>();
    hopper::hold(sums);
    if (lane == 0) hopper::barrier_arrive(empty + last);
    finish<T, TILE_COLS>(g, tile, warp, sums, bias, staging);
    tile = next;
  }
  // Shared memory must outlive the copies from it.
  if (lane == 0) hopper::store_wait<0>();
}

template <class T, bool DEPTH_FIRST, int TILE_COLS>
__global__ void __launch_bounds__(3 * kGroup, 1)
    lora_gemm_kernel(const __grid_constant__ Arguments g) {
#ifdef MULTILORA_HOPPER
  using L = Layout<TILE_COLS>;
  MULTILORA_DYNAMIC_SHARED(stages);
  unsigned char* staging = stages + L::kStages * L::kStage;
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + L::kStaging);
  uint64_t* empty = full + L::kStages;
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&g.x, &g.w, &g.s, &g.q, &g.y}) hopper::prefetch(*map);
    for (int stage = 0; stage < L::kStages; ++stage) {
      hopper::barrier_init(full + stage, 1);
      hopper::barrier_init(empty + stage, 2 * kGroup / 32);
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();
  // 128 x 40 + 256 x 232 registers are as many as the 384 x 168 of the launch.
  if (threadIdx.x < kGroup) {
    hopper::fewer_registers<40>();
    if (threadIdx.x == 0) produce<DEPTH_FIRST, TILE_COLS>(g, stages, full, empty);
  } else {
    hopper::more_registers<232>();
    consume<T, DEPTH_FIRST, TILE_COLS>(g, stages, staging, full, empty);
  }
#else
  fail("lora_gemm runs on compute capability 9.0 only");
#endif
}

template <class T, bool DEPTH_FIRST, int TILE_COLS>
void run(const LoraGemm& p, Stream stream) {
  const auto tiles_across = ceil_div(p.cols, TILE_COLS), strips_each = ceil_div(p.rows, kTileRows);
  const auto tiles = tiles_across * strips_each * p.particles;
  if (tiles > INT32_MAX / 2) throw std::runtime_error("multilora: lora_gemm has too many tiles");
  Arguments g;
  // Short rows for small ranks: the copies then write, and the products read, less.
  const uint32_t rank_depth = p.rank <= 16 ? 16 : p.rank <= 32 ? 32 : 64;
  const uint32_t across = TILE_COLS;
  const auto map = [&](const void* data, int64_t planes, int64_t rows, int64_t columns,
                       uint32_t box_rows, uint32_t box_columns) {
    return hopper::tensor_map(stream.device, p.dtype, data, {columns, rows, planes},
                              {box_columns, box_rows, 1});
  };
  g.x = map(p.x, p.particles, p.rows, p.depth, kTileRows, kDepth);
  g.s = map(p.s, p.particles, p.rows, p.rank, kTileRows, rank_depth);
  g.y = map(p.y, p.particles, p.rows, p.cols, 16, 64);
  if (DEPTH_FIRST) {
    g.w = map(p.w, 1, p.depth, p.cols, kDepth, 64);
    g.q = map(p.q, p.particles, p.rank, p.cols, rank_depth, 64);
  } else {
    g.w = map(p.w, 1, p.cols, p.depth, across, kDepth);
    g.q = map(p.q, p.particles, p.cols, p.rank, across, rank_depth);
  }
  g.bias = p.bias;
  g.cols = int(p.cols);
  g.strips_each = int(strips_each);
  g.strips = int(strips_each * p.particles);
  g.tiles_across = int(tiles_across);
  g.tiles = int(tiles);
  g.depth_steps = int(ceil_div(p.depth, kDepth));
  g.rank_steps = int(ceil_div(p.rank, kDepth));
  g.rank_depth = int(rank_depth);
  launch(lora_gemm_kernel<T, DEPTH_FIRST, TILE_COLS>,
         dim3(unsigned(tiles < p.processors ? tiles : p.processors)), dim3(3 * kGroup),
         Layout<TILE_COLS>::kBytes, stream, g);
}

template <class T, bool DEPTH_FIRST>
void run_tile(const LoraGemm& p, Stream stream) {
  if (p.tile_cols == 256) return run<T, DEPTH_FIRST, 256>(p, stream);
  run<T, DEPTH_FIRST, 128>(p, stream);
}

template <class T>
void run_order(const LoraGemm& p, Stream stream) {
  if (p.w_depth_first) return run_tile<T, true>(p, stream);
  run_tile<T, false>(p, stream);
}

}  // namespace

void lora_gemm(const LoraGemm& problem, Stream stream) {
  if (problem.dtype == DType::bf16) return run_order<bf16>(problem, stream);
  run_order<f16>(problem, stream);
}

}  // namespace multilora
