#define LK_ISA "avx512"
#define LK_TABLE kAvx512
#include "lora_branch.inl"
