// The CUDA runtime as far as multilora._C_cuda uses it, without a GPU: a launch is checked as a GPU
// would check it and handed to a function of the tests (native.py), which executes the kernel.
//
// Linked into the module in place of libcudart.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

struct Function {
  const char* name;
  int shared_limit;
};

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};

// grid and block: x, y, z of both. Returns 0, or 1 with a message.
using Launcher = int (*)(const char* kernel, const unsigned* grid_and_block, size_t shared_bytes,
                         void** arguments, char* message, size_t size);

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}

Launcher launcher = nullptr;
// The chip's limits of a block's shared memory: at most, and without opting in.
size_t most_shared = 0;
constexpr int kShared = 48 * 1024;
thread_local Configuration configuration;
thread_local int device = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local char message[4096];

cudaError_t failed(cudaError_t status, const std::string& why) {
  strncpy(message, why.c_str(), sizeof(message) - 1);
  return last = status;
}

cudaError_t launch(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  auto found = functions().find(host);
  if (found == functions().end()) return failed(cudaErrorInvalidDeviceFunction, "no such kernel");
  const Function& function = found->second;
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  for (unsigned size : sizes) {
    if (size == 0) return failed(cudaErrorInvalidConfiguration, "an empty grid or block");
  }
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    return failed(cudaErrorInvalidConfiguration, "a grid that is too large");
  }
  if (uint64_t(block.x) * block.y * block.z > 1024 || block.z > 64) {
    return failed(cudaErrorInvalidConfiguration, "a block that is too large");
  }
  if (shared_bytes > size_t(function.shared_limit)) {
    return failed(cudaErrorInvalidValue, "more shared memory than was reserved");
  }
  message[0] = 0;
  if (launcher(function.name, sizes, shared_bytes, arguments, message, sizeof(message))) {
    return last = cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// How cuTensorMapEncodeTiled is laid out here, for native.py; the driver's own layout is secret.
struct Map {
  char magic[8];
  uint64_t address;
  uint64_t sizes[3], strides[2];
  uint32_t box[3], swizzle_bytes, element_bytes;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

// The rules are those in the driver's documentation, for what the kernels use: three dimensions,
// two bytes an element, a swizzle.
CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  Map map{};
  memcpy(map.magic, "tensormp", sizeof(map.magic));
  map.address = reinterpret_cast<uintptr_t>(address);
  map.swizzle_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                      : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                      : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                             : 0;
  map.element_bytes = 2;
  bool half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  bool good = half && rank == 3 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && map.address % 16 == 0 &&
              reinterpret_cast<uintptr_t>(out) % 64 == 0;
  for (int i = 0; good && i < 3; ++i) {
    good = sizes[i] > 0 && sizes[i] <= uint64_t(1) << 32 && box[i] > 0 && box[i] <= 256 &&
           steps[i] == 1;
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
  }
  for (int i = 0; good && i < 2; ++i) {
    good = strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40;
    map.strides[i] = strides[i];
  }
  uint32_t row = good ? 2 * box[0] : 0;
  if (!good || row % 16 || map.swizzle_bytes == 0 || row > map.swizzle_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  memset(out, 0, sizeof(*out));
  memcpy(out, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace

// --- for the tests ---

EXPORTED void tests_run_on(Launcher with, size_t shared_bytes) {
  launcher = with;
  most_shared = shared_bytes;
}

EXPORTED void tests_kernels(void (*see)(const char* name)) {
  for (const auto& [host, function] : functions()) see(function.name);
}

// --- what nvcc's code and the module call ---

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  functions()[host] = {name, kShared};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                     struct CUstream_st* stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared_bytes);
}

// Up to CUDA 12.
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  return launch(host, grid, block, arguments, shared_bytes);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  auto found = functions().find(host);
  bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (found == functions().end() || !known || value < 0 || size_t(value) > most_shared) {
    return failed(cudaErrorInvalidValue, "more shared memory than a block can have");
  }
  found->second.shared_limit = value;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int chosen) {
  device = chosen;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  cudaError_t status = last;
  last = cudaSuccess;
  return status;
}

const char* cudaGetErrorString(cudaError_t) { return message; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
