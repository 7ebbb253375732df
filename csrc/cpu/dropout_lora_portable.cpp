#define LK_ISA "portable"
#define LK_TABLE kPortable
#include "dropout_lora.inl"
