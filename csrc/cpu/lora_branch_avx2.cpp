#define LK_ISA "avx2"
#define LK_TABLE kAvx2
#define LK_PACKED_TABLE kAvx2Packed
#define LK_GATED_TABLE kAvx2Gated
#include "lora_branch.inl"
