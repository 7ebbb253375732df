// What would be launched, as Python objects.
#pragma once

#include <Python.h>

namespace lk {

extern PyMethodDef plan_methods[];

}  // namespace lk
