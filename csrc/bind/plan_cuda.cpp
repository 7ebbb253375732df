// Plans: the launch that a problem leads to, without a GPU, from the functions that the launch itself uses.
#include <cstring>
#include <span>

#include "../launch/launch.h"
#include "../param_fields.h"
#include "plan.h"

namespace lk {
namespace {

struct Plan {
  const char *schedule, *reason;
  KernelInfo kernel;
  int64_t blocks, workspace_bytes;
  size_t params_size;
  std::span<const Field> fields;
};

// Steals `item`; false if it or the list is missing.
bool append(PyObject* list, PyObject* item) {
  const bool done = list != nullptr && item != nullptr && PyList_Append(list, item) == 0;
  Py_XDECREF(item);
  return done;
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

// The format of the command `lora-kernels plan`.
PyObject* to_python(const Plan& p) {
  return Py_BuildValue("{s:s,s:s,s:s,s:[L,i,i],s:[i,i,i],s:[i,i,i],s:i,s:L,s:{s:n,s:N}}",  //
                       "schedule", p.schedule,                                             //
                       "reason", p.reason,                                                 //
                       "kernel", p.kernel.name.c_str(),                                    //
                       "grid", static_cast<long long>(p.blocks), 1, 1,                     //
                       "block", p.kernel.threads, 1, 1,                                    //
                       "cluster", 1, 1, 1,                                                 //
                       "dynamic_smem", p.kernel.shared_bytes,                              //
                       "workspace_bytes", static_cast<long long>(p.workspace_bytes),       //
                       "params", "size", static_cast<Py_ssize_t>(p.params_size),           //
                       "fields", to_python(p.fields));
}

using DescribeLoraLinear = KernelInfo (*)(const LoraLinearConfig&);

PyObject* plan_lora_linear(PyObject*, PyObject* args, PyObject* keywords) {
  const char* const names[] = {"dtype", "m", "n", "k", "rank", "rows_aligned", "sms", "shared_per_block", nullptr};
  const char* dtype;
  long long m, n, k, rank;
  int rows_aligned;
  DeviceLimits device;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLpii", const_cast<char**>(names), &dtype, &m, &n, &k, &rank,
                                   &rows_aligned, &device.sms, &device.shared_per_block)) {
    return nullptr;
  }
  DescribeLoraLinear describe;
  if (std::strcmp(dtype, "bf16") == 0) {
    describe = describe_lora_linear_bf16;
  } else if (std::strcmp(dtype, "fp16") == 0) {
    describe = describe_lora_linear_fp16;
  } else {
    return PyErr_Format(PyExc_ValueError, "dtype must be bf16 or fp16, got %s", dtype);
  }
  const LoraLinearConfig config = lora_linear_config(m, n, rank, rows_aligned != 0 && whole_chunks(n, k, rank), device);
  if (config.blocks > INT32_MAX) return PyErr_Format(PyExc_ValueError, "tickets are 32 bits wide: too many tiles");
  return to_python(Plan{.schedule = "ticketed",
                        .reason = config.reason,
                        .kernel = describe(config),
                        .blocks = config.blocks,
                        .workspace_bytes = config.counters * static_cast<int64_t>(sizeof(uint32_t)),
                        .params_size = sizeof(LoraLinearParams),
                        .fields = LoraLinearFields::kFields});
}

// Calls f(KernelInfo) for every kernel, some more than once.
template <class F>
void for_each_kernel(const F& f) {
  f(describe_dropout_mask());
  for (const DescribeLoraLinear describe : {describe_lora_linear_bf16, describe_lora_linear_fp16}) {
    for (const LoraTile tile : {LoraTile::kLarge, LoraTile::kSmall}) {
      for (const bool aligned : {true, false}) {
        for (const int rank_tile : {16, 64}) {
          LoraLinearConfig config{};
          config.tile = tile;
          config.aligned = aligned;
          config.rank_tile = rank_tile;
          f(describe(config));
        }
      }
    }
  }
}

PyObject* kernels(PyObject*, PyObject*) {
  PyObject* found = PyDict_New();
  if (found == nullptr) return nullptr;
  for_each_kernel([&](const KernelInfo& kernel) {
    PyObject* value = Py_BuildValue("(ii)", kernel.threads, kernel.shared_bytes);
    if (value != nullptr) PyDict_SetItemString(found, kernel.name.c_str(), value);
    Py_XDECREF(value);
  });
  if (PyErr_Occurred()) Py_CLEAR(found);
  return found;
}

}  // namespace

PyMethodDef plan_methods[] = {
    {"plan_lora_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plan_lora_linear)),
     METH_VARARGS | METH_KEYWORDS, "The launch of lora_linear for a problem and a device, as a dict."},
    {"kernels", kernels, METH_NOARGS, "Every kernel's mangled name -> (threads, bytes of dynamic shared memory)."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace lk
