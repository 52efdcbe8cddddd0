// The kernels of block-sparse attention for x86 processors with AVX2 and FMA.

#include "attention_kernels.h"

#ifdef SPION_DS_X86_KERNELS
// Standard headers come before the pragma: what they define is shared with the rest of the library.
#include <immintrin.h>

#include <cstring>

#pragma GCC target("avx2,fma,f16c")
#define SPION_DS_VECTOR_BYTES 32
#include "attention_table.h"

namespace spion_ds {
const Kernels kAvx2Kernels = this_instruction_set();
}  // namespace spion_ds
#endif
