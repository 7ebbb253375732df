// What the plans of all ops are made of: the launch that a problem leads to, without a GPU, from the functions that the
// launch itself uses, as Python objects. Each op plans its launches in a file of its own, where the fields of its
// Params stand, too: a tool that runs a kernel without compiling this code (a simulator, a profiler) reads them by
// name.
#pragma once

#include <Python.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../launch/kernel_info.h"
#include "../params/common.h"

namespace lk {

// ------------------------------------------------------------------------------------------- fields of a Params

struct Field {
  const char* name;
  size_t offset, size;
};

struct Anything {
  template <class T>
  constexpr operator T() const;
};

// Whether a struct can be initialised with this many values: no more than it has fields.
template <class Params, size_t... I>
consteval bool holds(std::index_sequence<I...>) {
  return requires { Params{((void)I, Anything{})...}; };
}

// Whether every field of Params is listed, once and in order.
template <class Params, size_t kCount>
consteval bool lists_all(const std::array<Field, kCount>& fields) {
  for (size_t i = 1; i < kCount; ++i) {
    if (fields[i].offset < fields[i - 1].offset + fields[i - 1].size) return false;
  }
  return holds<Params>(std::make_index_sequence<kCount>{}) && !holds<Params>(std::make_index_sequence<kCount + 1>{});
}

#define LK_FIELD(name) \
  Field { #name, offsetof(Params, name), sizeof(Params::name) }

// Params that hold other structs list the members of these. Their count is not known to the language; but a member
// that is missing, other than at the end or in front of padding, leaves a gap.
template <class Params, size_t kCount>
consteval bool leaves_no_gap(const std::array<Field, kCount>& fields) {
  size_t end = 0;
  for (const Field& f : fields) {
    if (f.offset != (end + f.size - 1) / f.size * f.size) return false;
    end = f.offset + f.size;
  }
  return (end + alignof(Params) - 1) / alignof(Params) * alignof(Params) == sizeof(Params);
}

// The fields of a struct that begins with another one.
template <size_t kFirst, size_t kMore>
consteval std::array<Field, kFirst + kMore> joined(const std::array<Field, kFirst>& first,
                                                   const std::array<Field, kMore>& more) {
  std::array<Field, kFirst + kMore> all{};
  for (size_t i = 0; i < kFirst; ++i) all[i] = first[i];
  for (size_t i = 0; i < kMore; ++i) all[kFirst + i] = more[i];
  return all;
}

// ------------------------------------------------------------------------------------------------------ a plan

struct Plan {
  const char* schedule;
  std::string reason;
  KernelInfo kernel;
  int64_t blocks, workspace_bytes;
  size_t params_size;
  std::span<const Field> fields;
};

// The format of the command `lora-kernels plan`.
PyObject* to_python(const Plan& plan);

// Steals `item`; false if it or the list is missing.
bool append(PyObject* list, PyObject* item);

// A list that steals the items; null, with a Python error, if one is missing.
PyObject* list_of(std::initializer_list<PyObject*> items);

constexpr int64_t kBytesWord = 4;  // a counter, a float

// Null, with a Python error.
PyObject* too_many_tiles();

// False with a Python error, where a number that a config divides by is less than 1.
bool is_positive(const char* argument, int64_t number);

// False with a Python error. `fp32` is what the op calls float32.
bool parse_type(const char* argument, const char* text, FloatType& type, const char* fp32 = "fp32");

// ---------------------------------------------------------------------------------------------- ops in the module

// A function of the module that plans a problem given by keywords.
PyMethodDef planner(const char* name, PyCFunctionWithKeywords plan, const char* doc);

// What an op has in the module: its planners, and every kernel that its launches choose from. Each op's file defines
// one, and nothing else lists the ops.
class PlannedOp {
 public:
  PlannedOp(std::initializer_list<PyMethodDef> planners, std::vector<KernelInfo> (*kernels)());
};

// The functions of all ops, and `kernels`.
PyMethodDef* plan_methods();

}  // namespace lk
