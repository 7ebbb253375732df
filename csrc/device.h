// The sole include of a kernel: CUDA under nvcc, the emulator's twin under a host compiler.
//
// A kernel reaches the machine only through the functions of ptx/ (or of their twins, which have the same names), so
// that the emulator sees every access to shared and global memory. Nothing here or in a kernel includes torch.
#pragma once

#include "host_device.h"

#if defined(__CUDACC__)
#define LK_DEVICE __device__ __forceinline__
#define LK_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define LK_UNROLL _Pragma("unroll")
#define LK_NO_UNROLL _Pragma("unroll 1")
#include "ptx/core.h"
#else
#define LK_DEVICE inline
#define LK_KERNEL(threads, min_blocks) inline void
#define LK_UNROLL
#define LK_NO_UNROLL
#include "emu/ptx/core.h"
#endif
