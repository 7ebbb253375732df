#define LK_PACKED_TABLE kAvx2Packed
#include "packed_weight.inl"
