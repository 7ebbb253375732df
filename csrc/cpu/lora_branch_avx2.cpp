#define LK_ISA "avx2"
#define LK_TABLE kAvx2
#include "lora_branch.inl"
