"""Triton kernels, one file per op; installed as ``lora_kernels.triton_kernels``."""
