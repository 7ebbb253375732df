#define LK_ISA "avx512"
#define LK_TABLE kAvx512
#include "dropout_lora.inl"
