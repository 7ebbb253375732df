// The functions of the module: those of every op, and the list of all kernels.
#include <cstring>

#include "plan.h"

namespace lk {
namespace {

struct Registry {
  std::vector<PyMethodDef> planners;
  std::vector<std::vector<KernelInfo> (*)()> kernels;
};

// Of any file's initialisation, whichever comes first.
Registry& registry() {
  static Registry all;
  return all;
}

PyObject* to_python(std::span<const Field> fields) {
  PyObject* list = PyList_New(0);
  for (const Field& f : fields) {
    PyObject* field = Py_BuildValue("{s:s,s:n,s:n}", "name", f.name, "offset", static_cast<Py_ssize_t>(f.offset),
                                    "size", static_cast<Py_ssize_t>(f.size));
    if (!append(list, field)) {
      Py_XDECREF(list);
      return nullptr;
    }
  }
  return list;
}

PyObject* kernels(PyObject*, PyObject*) {
  PyObject* found = PyDict_New();
  if (found == nullptr) return nullptr;
  for (const auto& kernels_of_op : registry().kernels) {
    for (const KernelInfo& kernel : kernels_of_op()) {
      PyObject* value = Py_BuildValue("(ii)", kernel.threads, kernel.shared_bytes);
      if (value != nullptr) PyDict_SetItemString(found, kernel.name.c_str(), value);
      Py_XDECREF(value);
    }
  }
  if (PyErr_Occurred()) Py_CLEAR(found);
  return found;
}

}  // namespace

PyObject* to_python(const Plan& p) {
  return Py_BuildValue("{s:s,s:s,s:s,s:[L,i,i],s:[i,i,i],s:[i,i,i],s:i,s:L,s:{s:n,s:N}}",  //
                       "schedule", p.schedule,                                             //
                       "reason", p.reason.c_str(),                                         //
                       "kernel", p.kernel.name.c_str(),                                    //
                       "grid", static_cast<long long>(p.blocks), 1, 1,                     //
                       "block", p.kernel.threads, 1, 1,                                    //
                       "cluster", p.kernel.cluster, 1, 1,                                  //
                       "dynamic_smem", p.kernel.shared_bytes,                              //
                       "workspace_bytes", static_cast<long long>(p.workspace_bytes),       //
                       "params", "size", static_cast<Py_ssize_t>(p.params_size),           //
                       "fields", to_python(p.fields));
}

bool append(PyObject* list, PyObject* item) {
  const bool done = list != nullptr && item != nullptr && PyList_Append(list, item) == 0;
  Py_XDECREF(item);
  return done;
}

PyObject* list_of(std::initializer_list<PyObject*> items) {
  PyObject* list = PyList_New(0);
  bool done = true;
  for (PyObject* item : items) done = append(list, item) && done;
  if (!done) Py_CLEAR(list);
  return list;
}

PyObject* too_many_tiles() { return PyErr_Format(PyExc_ValueError, "tickets are 32 bits wide: too many tiles"); }

bool is_positive(const char* argument, int64_t number) {
  if (number >= 1) return true;
  PyErr_Format(PyExc_ValueError, "%s must be at least 1, got %lld", argument, static_cast<long long>(number));
  return false;
}

bool parse_type(const char* argument, const char* text, FloatType& type, const char* fp32) {
  const std::pair<const char*, FloatType> types[] = {
      {fp32, FloatType::kFloat32}, {"bf16", FloatType::kBFloat16}, {"fp16", FloatType::kFloat16}};
  for (const auto& [name, known] : types) {
    type = known;
    if (std::strcmp(text, name) == 0) return true;
  }
  PyErr_Format(PyExc_ValueError, "%s must be bf16, fp16 or %s, got %s", argument, fp32, text);
  return false;
}

PyMethodDef planner(const char* name, PyCFunctionWithKeywords plan, const char* doc) {
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plan));
  return {name, function, METH_VARARGS | METH_KEYWORDS, doc};
}

PlannedOp::PlannedOp(std::initializer_list<PyMethodDef> planners, std::vector<KernelInfo> (*kernels)()) {
  registry().planners.insert(registry().planners.end(), planners);
  registry().kernels.push_back(kernels);
}

PyMethodDef* plan_methods() {
  static std::vector<PyMethodDef> all = [] {
    std::vector<PyMethodDef> methods = registry().planners;
    methods.push_back(
        {"kernels", kernels, METH_NOARGS, "Every kernel's mangled name -> (threads, bytes of dynamic shared memory)."});
    methods.push_back({nullptr, nullptr, 0, nullptr});
    return methods;
  }();
  return all.data();
}

}  // namespace lk
