// The CPU's instruction sets. Each file *_kernels.cpp is compiled once per level, with
// -DMULTILORA_LEVEL=<name>, and defines everything in the namespace multilora::<name>, so that the
// linker never takes one level's function for another's.
#pragma once

namespace multilora {

enum class Level : int { scalar = 0, avx2 = 1, avx512 = 2 };

// The level in use; the bindings set it before the first kernel runs.
extern Level level;

}  // namespace multilora

// The size in bytes of a vector at the level that is being compiled.
#if defined(__AVX512F__)
#define MULTILORA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MULTILORA_VECTOR_BYTES 32
#else
#define MULTILORA_VECTOR_BYTES 16
#endif

// The current level's table of kernels; every level's namespace has one, of the same name and type.
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
