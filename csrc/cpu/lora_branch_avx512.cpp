#define LK_ISA "avx512"
#define LK_TABLE kAvx512
#define LK_PACKED_TABLE kAvx512Packed
#define LK_GATED_TABLE kAvx512Gated
#include "lora_branch.inl"
