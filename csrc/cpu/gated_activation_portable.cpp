#define LK_GATED_TABLE kPortableGated
#include "gated_activation.inl"
