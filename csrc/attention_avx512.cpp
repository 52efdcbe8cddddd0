// The kernels of block-sparse attention for x86 processors with AVX-512 (F, BW, DQ, VL).

#include "attention_kernels.h"

#ifdef SPION_DS_X86_KERNELS
// Standard headers come before the pragma: what they define is shared with the rest of the library.
#include <immintrin.h>

#include <cstring>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define SPION_DS_VECTOR_BYTES 64
#include "attention_table.h"

namespace spion_ds {
const Kernels kAvx512Kernels = this_instruction_set();
}  // namespace spion_ds
#endif
