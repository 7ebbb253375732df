// `lora_kernels._C`: loading it registers the CPU kernels. `isa` names the table of kernels that was chosen; `onednn`
// is 1 where schedule "onednn" can run.
#include <Python.h>

#include "../cpu/kernels.h"
#include "cpu_gemm.h"

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "CPU kernels of lora_kernels.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "isa", lk::cpu::kernels().isa) == 0 &&
      PyModule_AddIntConstant(module, "onednn", lk::has_onednn()) == 0)
    return module;
  Py_DECREF(module);
  return nullptr;
}
