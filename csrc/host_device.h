// What a function is that host and device share. What is the device's alone is in device.h.
#pragma once

#if defined(__CUDACC__)
#define LK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LK_HOST_DEVICE inline
#endif
