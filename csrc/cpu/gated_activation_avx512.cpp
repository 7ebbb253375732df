#define LK_GATED_TABLE kAvx512Gated
#include "gated_activation.inl"
