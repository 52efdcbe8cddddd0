// The kernels of block-sparse attention for any processor: vectors of four floats.

#include <cstdint>
#include <cstring>

#define SPION_DS_VECTOR_BYTES 16
#include "attention_table.h"

namespace spion_ds {
const Kernels kBaselineKernels = this_instruction_set();
}  // namespace spion_ds
