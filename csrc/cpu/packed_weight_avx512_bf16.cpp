#define LK_PACKED_TABLE kAvx512Bf16Packed
#include "packed_weight.inl"
