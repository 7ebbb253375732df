// `lora_kernels._C`: loading it registers the CPU kernels. Its one attribute, `isa`, names the table that was chosen.
#include <Python.h>

#include "../cpu/kernels.h"

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "CPU kernels of lora_kernels.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "isa", lk::cpu::kernels().isa) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
