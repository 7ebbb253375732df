#define LK_ISA "portable"
#define LK_TABLE kPortable
#define LK_PACKED_TABLE kPortablePacked
#include "lora_branch.inl"
