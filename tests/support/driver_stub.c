// libcuda.so.1 without a GPU: as much of the CUDA driver as Triton's launcher calls. Every call succeeds; a launch
// copies the kernel's parameters to where the test finds them.
#include <cuda.h>
#include <string.h>

enum { kMostParameters = 128, kMostBytes = 128 };  // a CUtensorMap is the largest parameter

int parameter_count;                   // of the kernel that is launched next, and the bytes of each
int parameter_bytes[kMostParameters];  // a launch does not say
unsigned char parameters[kMostParameters][kMostBytes];
unsigned int grid[3];
int launch_count;

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "the stub of the driver reports no errors";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value =
      attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 227 << 10;  // the shared memory of a block, or more than enough
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice* device) { return cuDeviceGet(device, 0); }

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)1;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// Memory of the host passes for the device's.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  const cuuint64_t fields[16] = {(cuuint64_t)address, rank, sizes[0], sizes[1], strides[0], box[1]};
  memcpy(map, fields, sizeof fields);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  grid[0] = config->gridDimX;
  grid[1] = config->gridDimY;
  grid[2] = config->gridDimZ;
  for (int i = 0; i < parameter_count; ++i) memcpy(parameters[i], arguments[i], parameter_bytes[i]);
  ++launch_count;
  return CUDA_SUCCESS;
}
