"""Triton kernels, one file per op; installed as ``lora_kernels.triton_kernels``.

They import the package by its name: mypy reads this folder where it stands, which is not below ``lora_kernels``.
"""
