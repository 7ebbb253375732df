// What every module over torch includes and takes longest to compile: once for all of them, before everything else.
// Without `#pragma once`, which compilers warn of where a header is compiled by itself.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
