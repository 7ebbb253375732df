#define LK_GATED_TABLE kAvx2Gated
#include "gated_activation.inl"
