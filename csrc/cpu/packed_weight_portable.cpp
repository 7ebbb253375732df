#define LK_PACKED_TABLE kPortablePacked
#include "packed_weight.inl"
