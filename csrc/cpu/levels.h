// The CPU's instruction sets. A file *_kernels.cpp is compiled once for each of them, with
// -DMULTILORA_LEVEL=<name>, and keeps all that it defines in the namespace multilora::<name>: the
// linker must never take a function for one level from another.
#pragma once

namespace multilora {

enum class Level : int { scalar = 0, avx2 = 1, avx512 = 2 };

// The one that is used, set by the bindings before the first kernel.
extern Level level;

}  // namespace multilora

// The bytes of a vector at the level that is being compiled.
#if defined(__AVX512F__)
#define MULTILORA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MULTILORA_VECTOR_BYTES 32
#else
#define MULTILORA_VECTOR_BYTES 16
#endif

// The level's table of kernels, of one type and name in the namespaces of all levels.
#if defined(__x86_64__)
#define MULTILORA_PICK(table)                                              \
  (multilora::level == multilora::Level::avx512 ? multilora::avx512::table \
   : multilora::level == multilora::Level::avx2 ? multilora::avx2::table   \
                                                : multilora::scalar::table)
#define MULTILORA_EACH_LEVEL(declaration) \
  namespace scalar { declaration; }       \
  namespace avx2 { declaration; }         \
  namespace avx512 { declaration; }
#else
#define MULTILORA_PICK(table) multilora::scalar::table
#define MULTILORA_EACH_LEVEL(declaration) \
  namespace scalar { declaration; }
#endif
