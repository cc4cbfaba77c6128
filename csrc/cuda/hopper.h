// Hopper's instructions: mbarriers, copies of tensor tiles between global and shared memory (TMA),
// and the products of warp groups (wgmma), as PTX for sm_90a.
//
// Elements are two bytes wide throughout: float16 and bfloat16.
#pragma once

#include "platform.h"

// Defined where the target has these instructions. On other targets the kernel only fails.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MULTILORA_HOPPER 1
#endif

#include <cuda.h>

#include <type_traits>

namespace multilora::hopper {

using TensorMap = CUtensorMap;

// Describes a contiguous tensor (sizes[2], sizes[1], sizes[0]) in tiles. Elements outside it read
// as zero and are not written. A row of a tile has box[0] elements, which are 32, 64 or 128 bytes;
// its 16-byte pieces are permuted ("swizzled") within that width in shared memory.
inline TensorMap tensor_map(int device, DType dtype, const void* data, const int64_t (&sizes)[3],
                            const uint32_t (&box)[3]) {
  CurrentDevice current(device);
  // This thread may not have used the device yet: the call gives it the device's context.
  check(cudaSetDevice(device), "choosing a GPU");
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &status),
          "finding cuTensorMapEncodeTiled");
    if (status != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("multilora: the NVIDIA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  const cuuint64_t shape[] = {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]), cuuint64_t(sizes[2])};
  const cuuint64_t strides[] = {2 * shape[0], 2 * shape[0] * shape[1]};
  const cuuint32_t steps[] = {1, 1, 1};
  const uint32_t row = 2 * box[0];
  TensorMap map;
  CUresult status = encode(
      &map,
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(data), shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      row == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
      : row == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                  : CU_TENSOR_MAP_SWIZZLE_32B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("multilora: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(int(status)) + " for a tensor (" +
                             std::to_string(sizes[2]) + ", " + std::to_string(sizes[1]) + ", " +
                             std::to_string(sizes[0]) + ")");
  }
  return map;
}

__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// --- mbarriers: a phase ends when `count` threads have arrived, and all announced bytes ---

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the end of the phase of this parity; the first phase has parity 0.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- copies ---

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts the copy of the tile at these coordinates; its bytes are counted by the barrier.
__device__ __forceinline__ void load_tile(void* to, const TensorMap& map, uint64_t* barrier, int c0,
                                          int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void store_tile(const TensorMap& map, const void* from, int c0, int c1,
                                           int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          &map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most `LEFT` of this thread's store_tile() still read shared memory.
template <int LEFT>
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

// Makes this thread's writes to shared memory visible to the copy engine.
__device__ __forceinline__ void async_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- registers ---

// Stores four 8x8 matrices of 2-byte elements from a warp's fragments to rows of 16 bytes. Lane
// 8i + j passes the address of row j of matrix i; lane l holds two elements, from 2 (l % 4) on, of
// row l / 4.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&fragments)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(fragments[0]), "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
      : "memory");
}

// Sets how many registers each thread of this warp group may use from here on.
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Rounds two floats and packs them, the first one in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t both;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  }
  return both;
}

// --- wgmma ---

// Needed between any other use of the accumulators and the first product.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `LEFT` committed groups of products are under way.
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keeps the compiler from reading the accumulators earlier: the wait itself does not name them.
template <int COUNT>
__device__ __forceinline__ void hold(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// clang-format off
#define MULTILORA_NUMBERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MULTILORA_NUMBERS_128 MULTILORA_NUMBERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MULTILORA_FLOATS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MULTILORA_FLOATS_16(i) \
  MULTILORA_FLOATS_4(i), MULTILORA_FLOATS_4(i + 4), MULTILORA_FLOATS_4(i + 8), \
  MULTILORA_FLOATS_4(i + 12)
#define MULTILORA_FLOATS_64(i) \
  MULTILORA_FLOATS_16(i), MULTILORA_FLOATS_16(i + 16), MULTILORA_FLOATS_16(i + 32), \
  MULTILORA_FLOATS_16(i + 48)
#define MULTILORA_FLOATS_128(i) MULTILORA_FLOATS_64(i), MULTILORA_FLOATS_64(i + 64)
// a, b, p, t: the numbers of the operands after the accumulators.
#define MULTILORA_WGMMA(n, type, half, a_at, b_at, p_at, t_at) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" \
               MULTILORA_NUMBERS_##half "}, %" #a_at ", %" #b_at ", p, 1, 1, 0, %" #t_at ";\n}\n" \
               : MULTILORA_FLOATS_##half(0) \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(B_MN_MAJOR)))
// clang-format on

// d (64, N) = a (64, 16) · b (16, N) + (accumulate ? d : 0), for N = 128 or 256; a and b as
// descriptors. Lane l of warp w holds, in d[4i + 2j + k], row 16w + l / 4 + 8j and column 8i + 2 (l
// % 4) + k.
template <class T, bool B_MN_MAJOR, int HALF_N>
__device__ __forceinline__ void wgmma(float (&d)[HALF_N], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(HALF_N == 64 || HALF_N == 128);
  if constexpr (std::is_same_v<T, bf16>) {
    if constexpr (HALF_N == 64) MULTILORA_WGMMA(128, bf16, 64, 64, 65, 66, 67);
    if constexpr (HALF_N == 128) MULTILORA_WGMMA(256, bf16, 128, 128, 129, 130, 131);
  } else {
    if constexpr (HALF_N == 64) MULTILORA_WGMMA(128, f16, 64, 64, 65, 66, 67);
    if constexpr (HALF_N == 128) MULTILORA_WGMMA(256, f16, 128, 128, 129, 130, 131);
  }
}

#undef MULTILORA_WGMMA
#undef MULTILORA_FLOATS_128
#undef MULTILORA_FLOATS_64
#undef MULTILORA_FLOATS_16
#undef MULTILORA_FLOATS_4
#undef MULTILORA_NUMBERS_128
#undef MULTILORA_NUMBERS_64

// --- the descriptors of wgmma's operands in shared memory ---

// A descriptor has 64 bits: the address, the leading and the stride byte offset, all in units of 16
// bytes, and the swizzle of the rows: 1, 2, 3 for 128, 64, 32 bytes. Tiles start at multiples of
// 1024 bytes.

__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                               uint32_t row_bytes) {
  uint64_t mode = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return uint64_t(address >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         mode << 62;
}

// An operand whose rows run along the depth: row_bytes long, one after another. The stride is from
// 8 rows to the next 8; there is no leading offset.
__device__ __forceinline__ uint64_t k_major(uint32_t address, uint32_t row_bytes) {
  return descriptor(address, 16, 8 * row_bytes, row_bytes);
}

// An operand whose rows run across the depth: blocks of 64 elements (128 bytes) by `depth` rows.
// The stride is from 8 rows to the next 8, the leading offset from a block to the next.
__device__ __forceinline__ uint64_t mn_major(uint32_t address, uint32_t depth) {
  return descriptor(address, 128 * depth, 8 * 128, 128);
}

// The descriptor of the same operand, some units further; only its lower half changes.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t units) {
  return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + units);
}

// The units between one 16 of the depth and the next.
template <bool MN_MAJOR>
constexpr uint32_t kNext16 = (MN_MAJOR ? 16 * 128 : 16 * 2) >> 4;

}  // namespace multilora::hopper
