#define LK_ISA "portable"
#define LK_TABLE kPortable
#define LK_PACKED_TABLE kPortablePacked
#define LK_GATED_TABLE kPortableGated
#include "lora_branch.inl"
