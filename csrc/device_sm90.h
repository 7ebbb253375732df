// The include of a kernel for sm_90a: what device.h has, and warpgroups, barriers in memory, clusters and engines
// beside the threads.
#pragma once

#include "device.h"
#include "params/tensor_map.h"

#if defined(__CUDACC__)
#include "ptx/cluster.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#else
#include "emu/ptx/cluster.h"
#include "emu/ptx/mbarrier.h"
#include "emu/ptx/tma.h"
#include "emu/ptx/wgmma.h"
#endif
