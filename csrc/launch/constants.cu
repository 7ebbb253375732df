#include "launch.h"

namespace lk {
namespace {

__device__ const float one = 1.0f;

}  // namespace

cudaError_t one_on_device(const float** address) {
  return cudaGetSymbolAddress(const_cast<void**>(reinterpret_cast<const void**>(address)), one);
}

}  // namespace lk
