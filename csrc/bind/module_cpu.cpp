// `lora_kernels._C`: loading it registers the CPU kernels. `isa` names the table of kernels that was chosen; `onednn`
// is 1 where schedule "onednn" can run, `amd` on AMD's processors.
#include <Python.h>

#include "../cpu/kernels.h"
#include "cpu_gemm.h"

static bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "CPU kernels of lora_kernels.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "isa", lk::cpu::kernels().isa) == 0 &&
      PyModule_AddIntConstant(module, "onednn", lk::has_onednn()) == 0 &&
      PyModule_AddIntConstant(module, "amd", is_amd()) == 0)
    return module;
  Py_DECREF(module);
  return nullptr;
}
