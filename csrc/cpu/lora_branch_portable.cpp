#define LK_ISA "portable"
#define LK_TABLE kPortable
#include "lora_branch.inl"
