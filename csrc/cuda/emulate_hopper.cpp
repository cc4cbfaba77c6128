// Hopper's instructions behind emulate_hopper.h.
#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <vector>

#include "hopper.h"

namespace multilora::hopper {
namespace {

// Dynamic shared memory begins behind what the system reserves, and ends with the 227 KB of a
// block.
constexpr uint32_t kFirst = 1024, kEnd = kFirst + 227 * 1024;

[[noreturn]] void broken(const std::string& rule) {
  throw std::runtime_error("emulation: " + rule + ", in thread " +
                           std::to_string(emulate::linear_thread()) + " of block " +
                           std::to_string(blockIdx.x));
}

void require(bool holds, const char* rule) {
  if (!holds) broken(rule);
}

// Addresses in shared memory.
struct Range {
  uint32_t begin, end;
  bool overlaps(Range other) const { return begin < other.end && other.begin < end; }
};

struct Load {
  TensorMap map;
  uint32_t to;
  uint64_t* barrier;
  int64_t at[3];
};

struct Store {
  TensorMap map;
  uint32_t from;
  int64_t at[3];
  std::vector<unsigned char> seen;  // the tile at the time of the instruction
};

struct Thread {
  std::deque<std::vector<Product>> groups;  // committed
  std::vector<Product> open;                // not yet committed
  std::vector<float> sums;                  // the accumulators while products are under way
  bool fenced = false;
  size_t issued = 0;
  std::deque<Store> stores;
  std::vector<Range> unfenced;  // written, and not yet shown to the copy engine
};

struct Block {
  std::vector<Load> loads;
  std::map<int, Thread> threads;
  // What the first thread of a warp group to come by has issued: the others must do the same.
  std::map<int, std::vector<Product>> products;
};

Block& block() {
  static Block state;
  static unsigned char mark;
  emulate::fresh(&mark, 1);
  if (mark == 0xff) {
    mark = 0;
    state = Block();
  }
  return state;
}

Thread& me() { return block().threads[emulate::linear_thread()]; }

unsigned char* at_address(uint32_t address) {
  require(address >= kFirst && address < kEnd, "an address outside of shared memory");
  return emulate::dynamic_shared() + (address - kFirst);
}

// The pieces of 16 bytes within `row_bytes` are permuted by the bits of the address above them,
// three for 128 bytes, two for 64, one for 32: the pattern is a property of the address alone.
uint32_t swizzle(uint32_t address, uint32_t row_bytes) {
  return address ^ ((address >> 7 & (row_bytes / 16 - 1)) << 4);
}

// --- mbarriers: all of the state is in the 64 bits ---

struct State {
  uint64_t parity : 1, pending : 20, count : 20, bytes : 22, unused : 1;
};
static_assert(sizeof(State) == 8);
// The bytes may arrive before they are announced.
constexpr uint64_t kNoBytes = uint64_t(1) << 20;

State state_of(const uint64_t* barrier) {
  require(*barrier != ~uint64_t(0), "an mbarrier that is not initialised");
  require(reinterpret_cast<uintptr_t>(barrier) % 8 == 0, "an mbarrier that is not aligned");
  return bits_as<State>(*barrier);
}

void update(uint64_t* barrier, State state) {
  require(state.bytes < 2 * kNoBytes, "too many bytes for an mbarrier");
  if (state.pending == 0 && state.bytes == kNoBytes) {
    state.parity ^= 1;
    state.pending = state.count;
  }
  *barrier = bits_as<uint64_t>(state);
  emulate::progressed();
}

// --- copies ---

uint32_t row_bytes(const TensorMap& map) { return 2 * map.box[0]; }
uint32_t tile_bytes(const TensorMap& map) { return row_bytes(map) * map.box[1] * map.box[2]; }

// Calls visit(global, shared) for all elements of a tile, with null for those outside of the
// tensor.
template <class Visit>
void each_element(const TensorMap& map, uint32_t shared, const int64_t (&at)[3], Visit visit) {
  uint32_t address = shared;
  for (int64_t z = at[2]; z < at[2] + map.box[2]; ++z) {
    for (int64_t y = at[1]; y < at[1] + map.box[1]; ++y) {
      bool row_inside = z >= 0 && z < map.sizes[2] && y >= 0 && y < map.sizes[1];
      for (int64_t x = at[0]; x < at[0] + map.box[0]; ++x, address += 2) {
        bool inside = row_inside && x >= 0 && x < map.sizes[0];
        unsigned char* global = map.data + z * map.strides[2] + y * map.strides[1] + 2 * x;
        visit(inside ? global : nullptr, at_address(swizzle(address, row_bytes(map))));
      }
    }
  }
}

void perform(const Load& load) {
  each_element(load.map, load.to, load.at, [](const unsigned char* global, unsigned char* shared) {
    if (global != nullptr) {
      std::memcpy(shared, global, 2);
    } else {
      std::memset(shared, 0, 2);
    }
  });
  State state = state_of(load.barrier);
  state.bytes -= tile_bytes(load.map);
  update(load.barrier, state);
}

void perform(const Store& store) {
  // An early overwrite, or a write that the store did not wait for.
  require(std::memcmp(store.seen.data(), at_address(store.from), store.seen.size()) == 0,
          "shared memory changed under a store");
  each_element(store.map, store.from, store.at, [](unsigned char* global, unsigned char* shared) {
    if (global != nullptr) std::memcpy(global, shared, 2);
  });
}

// --- products ---

struct Operand {
  uint32_t start, leading, stride, row_bytes;

  explicit Operand(uint64_t descriptor) {
    // Bits 13-0, 29-16 and 45-32 in units of 16 bytes, 51-49 the base offset, 63-62 the mode.
    const uint32_t rows[] = {16, 128, 64, 32};
    start = uint32_t(descriptor & 0x3fff) << 4;
    leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
    stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    row_bytes = rows[descriptor >> 62];
    require((descriptor & 0x3ff1c000c000c000) == 0, "a descriptor with reserved bits");
    require((descriptor >> 49 & 7) == 0, "a base offset, for patterns off their boundary");
  }

  // Where element `depth` of row or column `across` is. The layouts are the ISA's canonical ones,
  // in which pieces of 16 bytes, 8 elements, are the unit.
  uint32_t address(uint32_t across, uint32_t depth, bool mn_major) const {
    uint32_t offset, pieces = row_bytes / 16;
    if (!mn_major) {
      offset = across % 8 * row_bytes + across / 8 * stride + depth % 8 * 2;
      offset += depth / 8 * (row_bytes == 16 ? leading : 16);
    } else if (row_bytes == 16) {
      offset = across % 8 * 2 + across / 8 * stride + depth % 8 * 16 + depth / 8 * leading;
    } else {
      offset = across % 8 * 2 + across / 8 % pieces * 16 + across / 8 / pieces * leading;
      offset += depth % 8 * row_bytes + depth / 8 * stride;
    }
    return swizzle(start + offset, row_bytes);
  }

  // All that it reads, to whole rows.
  Range range(uint32_t across, bool mn_major) const {
    uint32_t last = 0;
    for (uint32_t i = 0; i < across; i += 8) last = std::max(last, address(i + 7, 15, mn_major));
    return {start / 128 * 128, std::max(start + 256, last / 128 * 128 + 128)};
  }
};

template <class T>
float element(const Operand& operand, uint32_t across, uint32_t depth, bool mn_major) {
  T value;
  std::memcpy(&value, at_address(operand.address(across, depth, mn_major)), 2);
  return load(value);
}

// This thread's part of the product.
template <class T>
void multiply(const Product& p, float* d) {
  const Operand a(p.a), b(p.b);
  const int lane = emulate::lane(), warp = emulate::warp() % 4;
  float rows[2][16], column[16];
  for (int j = 0; j < 2; ++j) {
    for (int k = 0; k < 16; ++k) {
      rows[j][k] = element<T>(a, 16 * warp + lane / 4 + 8 * j, k, false);
    }
  }
  for (int i = 0; i < p.cols / 8; ++i) {
    for (int odd = 0; odd < 2; ++odd) {
      for (int k = 0; k < 16; ++k) {
        column[k] = element<T>(b, 8 * i + 2 * (lane % 4) + odd, k, p.b_mn_major);
      }
      for (int j = 0; j < 2; ++j) {
        float& sum = d[4 * i + 2 * j + odd];
        if (!p.accumulate) sum = 0;
        for (int k = 0; k < 16; ++k) sum += rows[j][k] * column[k];
      }
    }
  }
}

}  // namespace

TensorMap tensor_map(int, DType, const void* data, const int64_t (&sizes)[3],
                     const uint32_t (&box)[3]) {
  TensorMap map;
  map.data = static_cast<unsigned char*>(const_cast<void*>(data));
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "a tensor that does not start at 16 bytes");
  int64_t stride = 2;
  for (int i = 0; i < 3; ++i) {
    require(sizes[i] >= 1 && sizes[i] <= int64_t(1) << 32, "a tensor map of this size");
    require(box[i] >= 1 && box[i] <= 256, "a box of this size");
    require(i == 0 || (stride % 16 == 0 && stride < int64_t(1) << 40), "a stride of this size");
    map.sizes[i] = sizes[i];
    map.strides[i] = stride;
    map.box[i] = box[i];
    stride *= sizes[i];
  }
  require(box[0] == 16 || box[0] == 32 || box[0] == 64, "a box that is not as wide as its swizzle");
  return map;
}

uint32_t shared_address(const void* place) {
  auto offset = static_cast<const unsigned char*>(place) - emulate::dynamic_shared();
  require(offset >= 0 && offset < kEnd - kFirst, "a pointer outside of shared memory");
  return kFirst + uint32_t(offset);
}

void barrier_init(uint64_t* barrier, uint32_t count) {
  require(count >= 1 && count < 1 << 20, "the count of an mbarrier");
  *barrier = bits_as<uint64_t>(State{0, count, count, kNoBytes, 0});
}

void barrier_arrive(uint64_t* barrier) { barrier_arrive_expect(barrier, 0); }

void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  State state = state_of(barrier);
  require(state.pending > 0, "more arrivals than an mbarrier counts");
  state.bytes += bytes;
  state.pending -= 1;
  update(barrier, state);
}

void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (state_of(barrier).parity == (parity & 1)) {
    std::vector<Load>& loads = block().loads;
    size_t i = 0;
    while (i < loads.size() && loads[i].barrier != barrier) ++i;
    if (i == loads.size()) {
      emulate::yield();
      continue;
    }
    Load load = loads[i];
    loads.erase(loads.begin() + i);
    perform(load);
  }
}

void load_tile(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2) {
  Load load{map, shared_address(to), barrier, {c0, c1, c2}};
  require(load.to % 128 == 0, "a tile that does not start at 128 bytes");
  state_of(barrier);
  Range range{load.to, load.to + tile_bytes(map)};
  const auto read_by = [&](const Product& p) {
    return Operand(p.a).range(64, false).overlaps(range) ||
           Operand(p.b).range(p.cols, p.b_mn_major).overlaps(range);
  };
  for (const auto& [number, thread] : block().threads) {
    for (const Product& p : thread.open) require(!read_by(p), "a load over an operand in use");
    for (const auto& group : thread.groups) {
      for (const Product& p : group) require(!read_by(p), "a load over an operand in use");
    }
  }
  for (const Load& other : block().loads) {
    require(!range.overlaps({other.to, other.to + tile_bytes(other.map)}), "a load over a load");
  }
  std::memset(at_address(load.to), 0xff, tile_bytes(map));
  block().loads.push_back(load);
  emulate::progressed();
}

void store_tile(const TensorMap& map, const void* from, int c0, int c1, int c2) {
  Store store{map, shared_address(from), {c0, c1, c2}, {}};
  require(store.from % 128 == 0, "a tile that does not start at 128 bytes");
  Range range{store.from, store.from + tile_bytes(map)};
  for (const auto& [number, thread] : block().threads) {
    for (Range written : thread.unfenced) {
      require(!written.overlaps(range), "a store of what a thread wrote without an async_fence()");
    }
  }
  const unsigned char* tile = at_address(store.from);
  store.seen.assign(tile, tile + tile_bytes(map));
  me().stores.push_back(std::move(store));
  emulate::progressed();
}

void store_wait_for(size_t left) {
  for (auto& stores = me().stores; stores.size() > left; stores.pop_front()) {
    perform(stores.front());
  }
}

void async_fence() { me().unfenced.clear(); }

void store_matrices(void* row, const uint32_t (&fragments)[4]) {
  require(shared_address(row) % 16 == 0, "a row that does not start at 16 bytes");
  const int lane = emulate::lane();
  for (int i = 0; i < 4; ++i) {
    auto* place = static_cast<unsigned char*>(__shfl_sync(~0u, row, 8 * i + lane / 4));
    place += lane % 4 * 4;
    std::memcpy(place, &fragments[i], 4);
    me().unfenced.push_back({shared_address(place), shared_address(place) + 4});
  }
}

void wgmma_fence() { me().fenced = true; }

void wgmma_issue(const Product& product) {
  Thread& thread = me();
  require(thread.fenced, "a wgmma without a fence after other uses of the accumulators");
  std::vector<Product>& products = block().products[emulate::linear_thread() / 128];
  if (thread.issued == products.size()) products.push_back(product);
  const Product& first = products[thread.issued++];
  require(first.a == product.a && first.b == product.b && first.accumulate == product.accumulate,
          "different wgmmas in one warp group");
  if (thread.open.empty() && thread.groups.empty()) {
    thread.sums.assign(product.d, product.d + product.cols / 2);
    std::fill_n(product.d, product.cols / 2, std::numeric_limits<float>::quiet_NaN());
  } else {
    const Product& last = thread.open.empty() ? thread.groups.back().back() : thread.open.back();
    require(last.d == product.d, "other accumulators while wgmmas are under way");
  }
  thread.open.push_back(product);
}

void wgmma_commit() {
  Thread& thread = me();
  require(!thread.open.empty(), "an empty group of wgmmas");
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void wgmma_wait_for(size_t left) {
  Thread& thread = me();
  float* d = nullptr;
  for (; thread.groups.size() > left; thread.groups.pop_front()) {
    for (const Product& p : thread.groups.front()) {
      d = p.d;
      if (p.dtype == DType::bf16) {
        multiply<bf16>(p, thread.sums.data());
      } else {
        multiply<f16>(p, thread.sums.data());
      }
    }
  }
  if (d == nullptr || !thread.groups.empty() || !thread.open.empty()) return;
  std::copy(thread.sums.begin(), thread.sums.end(), d);
  thread.fenced = false;
}

}  // namespace multilora::hopper
