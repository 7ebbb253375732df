// `lora_kernels._cuda`: an empty module; loading it registers the CUDA kernels.
#include <Python.h>

PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", "CUDA kernels of lora_kernels.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
