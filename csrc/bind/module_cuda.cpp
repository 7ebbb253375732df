// `lora_kernels._cuda`: loading it registers the CUDA kernels. Its functions describe them, and need no GPU, but for
// `usable`, which asks the current one.
#include <Python.h>

#include "../launch/usable.h"
#include "../plan/plan.h"

namespace {

PyObject* usable(PyObject*, PyObject*) {
  lk::Usability answer;
  Py_BEGIN_ALLOW_THREADS;
  answer = lk::usability();  // the driver may have PTX to compile
  Py_END_ALLOW_THREADS;
  return Py_BuildValue("(ss)", answer.problem, answer.detail.c_str());
}

PyMethodDef usable_methods[] = {
    {"usable", usable, METH_NOARGS,
     "Whether the current GPU runs the kernels: (\"\", \"\"), or (\"driver\", \"architecture\" or \"other\", what CUDA "
     "says)."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

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
  PyObject* created = PyModule_Create(&module);
  if (created != nullptr && PyModule_AddFunctions(created, usable_methods) != 0) Py_CLEAR(created);
  return created;
}
