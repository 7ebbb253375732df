#define LK_ISA "avx512"
#define LK_TABLE kAvx512
#define LK_PACKED_TABLE kAvx512Packed
#include "lora_branch.inl"
