// `lora_kernels._cuda`: loading it registers the CUDA kernels. Its functions describe them; none needs a GPU.
#include <Python.h>

#include "../plan/plan.h"

PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_cuda",
                               "CUDA kernels of lora_kernels.",
                               -1,
                               lk::plan_methods(),
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
