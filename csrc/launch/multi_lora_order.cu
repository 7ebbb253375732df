#include "../kernels/multi_lora_order.cuh"
#include "multi_lora_linear.h"
#include "variant.h"

namespace lk {

cudaError_t launch_multi_lora_order(const MultiLoraOrderParams& p, cudaStream_t stream) {
  return launch_variant<MultiLoraOrder>(&multi_lora_order_kernel, p.count, p, stream);
}

KernelInfo describe_multi_lora_order() {
  return {
      .name = "_ZN2lk" + mangled_identifier("multi_lora_order_kernel") + "ENS_" + mangled_in_lk<MultiLoraOrderParams>(),
      .threads = MultiLoraOrder::kThreads,
      .shared_bytes = MultiLoraOrder::kSharedBytes};
}

}  // namespace lk
