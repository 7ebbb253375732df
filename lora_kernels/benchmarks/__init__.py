"""What ``lora-kernels bench`` measures: a layer, a block, a model, prompts, each beside stock PEFT."""
