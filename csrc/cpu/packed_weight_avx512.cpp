#define LK_PACKED_TABLE kAvx512Packed
#include "packed_weight.inl"
