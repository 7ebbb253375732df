"""Every reason for which a fast path is not taken, in one place."""

from __future__ import annotations

import enum


class Reason(str, enum.Enum):
    """Why a call or a layer was not served by the first choice.

    The value is what ``lk.stats()`` and reports show. Members compare equal to their string.
    """

    # A backend cannot serve a call (dispatch.py).
    EXTENSION_NOT_BUILT = "extension not built"
    TRITON_NOT_INSTALLED = "triton not installed"
    NO_KERNEL = "no kernel for this op"
    TORCH_DECODE = "no kernel decodes this layout: plain torch code does"
    DTYPE = "dtype not served"
    LAYOUT = "tensor layout not served"
    FP32_STRICT = "strict fp32: no tensor-core kernel"
    RANK = "rank above 256"
    MEMBERS = "more members than a launch takes"
    SIZE = "more rows, columns or tiles than 32 bits count"
    ARCHITECTURE = "GPU older than sm_80"
    DRIVER = "driver older than the CUDA toolkit of the extension"
    NOT_COMPILED = "extension not compiled for this GPU"
    CUDA_ERROR = "the extension's CUDA does not work on this GPU"
    MEASURED_TRITON = "Triton was measured to be faster here"
    TRITON_TOO_OLD = "Triton older than 3.6"
    NOT_INTERPRETED = "Triton needs a GPU, or TRITON_INTERPRET=1 and use_backend('triton')"

    # A layer keeps its own forward (integrations).
    LAYER_TYPE = "layer type not served"
    DISABLED = "adapters disabled"
    MERGED = "adapter merged"
    NO_ACTIVE_ADAPTER = "no active adapter on this layer"
    VARIANT = "LoRA variant"
    DORA = "DoRA in a form the op does not compute"
    DORA_CACHING = "DoRA caching is on, which is PEFT's"
    FAN_IN_FAN_OUT = "fan_in_fan_out (Conv1D)"
    LORA_BIAS = "bias in lora_B"
    TENSOR_SCALING = "tensor-valued scaling"
    SCALING = "scaling is not finite"
    INFERENCE_TENSOR = "base weight made in inference mode"
    ADAPTER_NAMES = "adapter_names (mixed batch) in a form that is not served"
    DROPOUTS = "adapters of one batch drop in different ways"
    ADAPTER_HOOKS = "hooks on lora_A, lora_B, dropout or the base layer"
    ADAPTER_MODULES = "lora_A, lora_B or dropout is not the plain module"
    TARGET_PARAMETERS = "target_parameters of a module that is neither a plain nn.Linear nor declared experts"
    PROXY_REPLACED = "somebody has replaced what makes PEFT's target_parameters"
    EXPERTS_IMPLEMENTATION = "experts_implementation is not one of transformers' own"
    BASE_LAYER = "base layer is not a plain nn.Linear or nn.Embedding"
    BASE_REQUIRES_GRAD = "base weight requires grad"
    DTENSOR = "DTensor or tensor subclass"
    ACTIVATIONS = "activations are quantised, too"
    INT8_EVAL = "bitsandbytes rounds activations here"
    REPACKED = "weight repacked by bitsandbytes for this CPU"
    KERNEL_BYTES = "weight may have been repacked for a kernel of its library"
    FORMAT = "quantised in a format that is not served"
    BLOCKS = "blocks of scales run over row ends, or are of an odd size"
    DISPLACED = "weight or bias is not a parameter of its module"
    META = "meta tensor"
    PARAMETRIZED = "parametrized weight"
    INSTANCE_FORWARD = "forward replaced on the instance"
    PARENT_READS = "the parent may read the weight itself instead of calling the layer"
    SHARED = "one layer under several names"
    MIXED_DTYPES = "dtypes of input, base and adapter do not fit"
    EXTRA_ARGUMENTS = "extra forward arguments"
    TRANSFORM = "inside a functorch transform or forward-mode AD"
    DEVICES = "tensors on several devices"
    TASK_IDS = "task_ids missing, or not one integer per sample"
    MODEL_CACHE = "the model's cache is of its own kind"
    PACK_APART = "the layers of a pack were not called with one tensor, one after the other"
    PACK_DORA = "DoRA in a pack of layers"
    PACK_QUANTIZED = "quantised weights in a pack of layers"
    PACK_DROPOUTS = "layers of one MLP drop in different ways"
    SIDE_BY_SIDE = "several adapters that drop for themselves, in a pack of layers"
    NOT_GATED = "not down(activation(gate(x)) * up(x)), or of an activation that is not served"
    BIAS_REQUIRES_GRAD = "a bias of the MLP requires grad"
    HEAD_DROPOUT = "dropout on the adapter of the head"
    LOGITS = "logits are asked for"
    LOSS_FUNCTION = "the loss is not transformers' ForCausalLMLoss"
    LOSS_FORWARD = "forward is not just a backbone, a head and its loss"
    LOSS_CONFIG = "the config's bound or factor of the logits is not what was tried"
    FAST_PRODUCT = "torch multiplies this dtype fast here"

    def __str__(self) -> str:
        return self.value
