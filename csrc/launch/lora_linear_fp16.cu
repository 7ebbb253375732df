#include "lora_linear.h"

namespace lk {

cudaError_t launch_lora_linear_fp16(const LoraLinearParams& p, const LoraLinearConfig& config, cudaStream_t stream) {
  return launch_lora_linear<Float16>(p, config, stream);
}

KernelInfo describe_lora_linear_fp16(const LoraLinearConfig& config) { return describe_lora_linear<Float16>(config); }

}  // namespace lk
