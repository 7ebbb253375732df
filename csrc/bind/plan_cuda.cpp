// Plans: the launch that a problem leads to, without a GPU, from the functions that the launch itself uses.
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "../launch/launch.h"
#include "../param_fields.h"
#include "plan.h"

namespace lk {
namespace {

struct Plan {
  const char* schedule;
  std::string reason;
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
                       "reason", p.reason.c_str(),                                         //
                       "kernel", p.kernel.name.c_str(),                                    //
                       "grid", static_cast<long long>(p.blocks), 1, 1,                     //
                       "block", p.kernel.threads, 1, 1,                                    //
                       "cluster", 1, 1, 1,                                                 //
                       "dynamic_smem", p.kernel.shared_bytes,                              //
                       "workspace_bytes", static_cast<long long>(p.workspace_bytes),       //
                       "params", "size", static_cast<Py_ssize_t>(p.params_size),           //
                       "fields", to_python(p.fields));
}

constexpr int64_t kBytesWord = 4;  // a counter, a float

// What the problem of an op and the device come as.
struct Problem {
  const char* dtype;
  long long m, n, k, rank;
  int rows_aligned, has_dropout;
  DeviceLimits device;

  int element_bytes() const { return std::strcmp(dtype, "tf32") == 0 ? 4 : 2; }
  bool aligned() const { return rows_aligned != 0 && whole_chunks(n, k, rank, element_bytes()); }

  // f(Element*), or null with a Python error.
  template <class F>
  PyObject* with_element(const F& f) const {
    if (std::strcmp(dtype, "bf16") == 0) return f(static_cast<BFloat16*>(nullptr));
    if (std::strcmp(dtype, "fp16") == 0) return f(static_cast<Float16*>(nullptr));
    if (std::strcmp(dtype, "tf32") == 0) return f(static_cast<TensorFloat32*>(nullptr));
    return PyErr_Format(PyExc_ValueError, "dtype must be bf16, fp16 or tf32, got %s", dtype);
  }
};

bool parse(PyObject* args, PyObject* keywords, Problem& p) {
  const char* const names[] = {"dtype", "m", "n", "k", "rank", "rows_aligned", "has_dropout", "sms", "shared_per_block",
                               nullptr};
  return PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLppii", const_cast<char**>(names), &p.dtype, &p.m, &p.n, &p.k,
                                     &p.rank, &p.rows_aligned, &p.has_dropout, &p.device.sms,
                                     &p.device.shared_per_block);
}

PyObject* too_many_tiles() { return PyErr_Format(PyExc_ValueError, "tickets are 32 bits wide: too many tiles"); }

Plan plan_of(const LoraLinearConfig& config, const KernelInfo& kernel, int64_t more_words = 0) {
  return {.schedule = name_of(config.schedule),
          .reason = std::string(config.reason) + "; " + config.tile_reason,
          .kernel = kernel,
          .blocks = config.blocks,
          .workspace_bytes = (config.counters + config.partials + more_words) * kBytesWord,
          .params_size = sizeof(LoraLinearParams),
          .fields = LoraLinearFields::kFields};
}

PyObject* plan_lora_linear(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  const LoraLinearConfig config =
      lora_linear_config(p.m, p.n, p.k, p.rank, p.element_bytes(), p.aligned(), p.has_dropout != 0, p.device);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return p.with_element([&](auto* e) {
    return to_python(plan_of(config, describe_lora_linear<std::remove_pointer_t<decltype(e)>>(config)));
  });
}

// A list of the two launches.
PyObject* plan_lora_linear_backward(PyObject*, PyObject* args, PyObject* keywords) {
  Problem p;
  if (!parse(args, keywords, p)) return nullptr;
  const LoraBackwardConfig config =
      lora_backward_config(p.m, p.n, p.k, p.rank, p.aligned(), true, true, true, p.device);
  if (config.grad_x.blocks > INT32_MAX || config.grads.blocks > INT32_MAX) return too_many_tiles();
  return p.with_element([&](auto* e) -> PyObject* {
    using Element = std::remove_pointer_t<decltype(e)>;
    const Plan second = {.schedule = "split rows",
                         .reason = config.parts_of_grad_b > 0 ? "parts of dB are there and only summed"
                                                              : "dY is read again: parts of dB would be larger",
                         .kernel = describe_lora_grads<Element>(config.grads),
                         .blocks = config.grads.blocks,
                         .workspace_bytes = (config.grads.counters + config.grads.partials) * kBytesWord,
                         .params_size = sizeof(LoraGradsParams),
                         .fields = LoraGradsFields::kFields};
    PyObject* launches = PyList_New(0);
    if (append(launches, to_python(plan_of(config.grad_x, describe_lora_grad_x<Element>(config.grad_x),
                                           config.partial_grad_b))) &&
        append(launches, to_python(second))) {
      return launches;
    }
    Py_XDECREF(launches);
    return nullptr;
  });
}

// False with a Python error.
bool parse_type(const char* argument, const char* text, FloatType& type) {
  const std::pair<const char*, FloatType> types[] = {
      {"fp32", FloatType::kFloat32}, {"bf16", FloatType::kBFloat16}, {"fp16", FloatType::kFloat16}};
  for (const auto& [name, known] : types) {
    type = known;
    if (std::strcmp(text, name) == 0) return true;
  }
  PyErr_Format(PyExc_ValueError, "%s must be fp32, bf16 or fp16, got %s", argument, text);
  return false;
}

// What the problem of prompt_embedding and the device come as; its grid depends on no device.
struct PromptProblem {
  FloatType type;
  PromptSizes sizes;
  int rows_aligned, looks_for_tokens, need_prompt, need_weight, need_embeds;

  bool aligned() const {
    return rows_aligned != 0 && sizes.hidden * (type == FloatType::kFloat32 ? 4 : 2) % kChunkBytes == 0;
  }
};

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, PromptProblem& p) {
  const char* const names[] = {
      "dtype",        "batch",       "tokens",      "prompt_rows", "hidden",           "tasks", "vocabulary",
      "rows_aligned", "need_prompt", "need_weight", "need_embeds", "looks_for_tokens", "sms",   "shared_per_block",
      nullptr};
  const char* dtype;
  long long batch, tokens, prompt_rows, hidden, tasks, vocabulary;
  int sms, shared_per_block;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLLLLLLpppppii", const_cast<char**>(names), &dtype, &batch, &tokens,
                                   &prompt_rows, &hidden, &tasks, &vocabulary, &p.rows_aligned, &p.need_prompt,
                                   &p.need_weight, &p.need_embeds, &p.looks_for_tokens, &sms, &shared_per_block)) {
    return false;
  }
  p.sizes = {batch, tokens, prompt_rows, hidden, tasks, vocabulary};
  return parse_type("dtype", dtype, p.type);
}

PyObject* plan_prompt_embedding(PyObject*, PyObject* args, PyObject* keywords) {
  PromptProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  const PromptEmbeddingConfig config = prompt_embedding_config(p.sizes, p.aligned(), p.looks_for_tokens != 0);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "gather",
                    .reason = config.reason,
                    .kernel = describe_prompt_embedding(p.type, config.aligned),
                    .blocks = config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(PromptEmbeddingParams),
                    .fields = PromptEmbeddingFields::kFields});
}

PyObject* plan_prompt_embedding_backward(PyObject*, PyObject* args, PyObject* keywords) {
  PromptProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  const PromptBackwardConfig config =
      prompt_backward_config(p.sizes, p.aligned(), p.need_prompt != 0, p.need_weight != 0, p.need_embeds != 0);
  if (config.blocks() > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "row_sum",
                    .reason = "a thread sums over the batch, in its order",
                    .kernel = describe_prompt_embedding_backward(p.type, config.aligned),
                    .blocks = config.blocks(),
                    .workspace_bytes = 0,
                    .params_size = sizeof(PromptEmbeddingBackwardParams),
                    .fields = PromptEmbeddingBackwardFields::kFields});
}

// What the problem of prefix_kv comes as; its grid depends on no device.
struct PrefixProblem {
  FloatType type, prefix_type;
  PrefixSizes sizes;
  bool aligned;
};

// False with a Python error.
bool parse(PyObject* args, PyObject* keywords, PrefixProblem& p) {
  const char* const names[] = {"dtype", "prefix_dtype", "tokens", "layers",           "heads", "head_dim",
                               "batch", "rows_aligned", "sms",    "shared_per_block", nullptr};
  const char *dtype, *prefix_dtype;
  long long tokens, layers, heads, head_dim, batch;
  int rows_aligned, sms, shared_per_block;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "ssLLLLLpii", const_cast<char**>(names), &dtype, &prefix_dtype,
                                   &tokens, &layers, &heads, &head_dim, &batch, &rows_aligned, &sms,
                                   &shared_per_block) ||
      !parse_type("dtype", dtype, p.type) || !parse_type("prefix_dtype", prefix_dtype, p.prefix_type)) {
    return false;
  }
  if (p.prefix_type != p.type && p.prefix_type != FloatType::kFloat32) {
    PyErr_Format(PyExc_ValueError, "prefix_dtype must be %s or fp32, got %s", dtype, prefix_dtype);
    return false;
  }
  p.sizes = {tokens, 2 * layers, heads, head_dim, batch};
  p.aligned = rows_aligned != 0 && head_dim * (p.type == FloatType::kFloat32 ? 4 : 2) % kChunkBytes == 0;
  return true;
}

PyObject* plan_prefix_kv(PyObject*, PyObject* args, PyObject* keywords) {
  PrefixProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  const PrefixConfig config = prefix_config(p.sizes, p.type, p.prefix_type, p.aligned);
  if (config.blocks > INT32_MAX) return too_many_tiles();
  return to_python({.schedule = "transpose",
                    .reason = "a thread reads a group of elements and writes it for every sample",
                    .kernel = describe_prefix_kv(p.type, config.aligned),
                    .blocks = config.blocks,
                    .workspace_bytes = 0,
                    .params_size = sizeof(PrefixKvParams),
                    .fields = PrefixKvFields::kFields});
}

// A list of launches.
PyObject* plan_prefix_kv_backward(PyObject*, PyObject* args, PyObject* keywords) {
  PrefixProblem p;
  if (!parse(args, keywords, p)) return nullptr;
  PyObject* launches = PyList_New(0);
  for (int64_t parts = p.sizes.parts; parts > 0 && launches != nullptr; parts -= kPrefixGrads) {
    PrefixSizes sizes = p.sizes;
    sizes.parts = std::min<int64_t>(parts, kPrefixGrads);
    const PrefixConfig config = prefix_config(sizes, p.type, p.prefix_type, p.aligned);
    if (!append(launches, to_python({.schedule = "row_sum",
                                     .reason = "a thread sums over the batch, in its order; a launch has room for the "
                                               "addresses of 32 gradients",
                                     .kernel = describe_prefix_kv_backward(p.type, config.aligned),
                                     .blocks = config.blocks,
                                     .workspace_bytes = 0,
                                     .params_size = sizeof(PrefixKvBackwardParams),
                                     .fields = PrefixKvBackwardFields::kFields}))) {
      Py_CLEAR(launches);
    }
  }
  return launches;
}

// Calls f(KernelInfo) for every kernel, some more than once.
template <class Element, class F>
void for_each_lora_kernel(const F& f) {
  for (const int rank_tile : {16, 64}) {
    for (const bool aligned : {true, false}) {
      LoraGradsConfig grads{};
      grads.aligned = aligned;
      grads.rank_tile = rank_tile;
      f(describe_lora_grads<Element>(grads));
      for (const LoraTile tile : {LoraTile::kLarge, LoraTile::kSmall}) {
        for (const Schedule schedule : {Schedule::kTicketed, Schedule::kColumn0, Schedule::kDual, Schedule::kDecode}) {
          LoraLinearConfig config{};
          config.schedule = schedule;
          config.tile = tile;
          config.aligned = aligned;
          config.rank_tile = rank_tile;
          f(describe_lora_linear<Element>(config));
          f(describe_lora_grad_x<Element>(config));
        }
      }
    }
  }
}

template <class F>
void for_each_kernel(const F& f) {
  f(describe_dropout_mask());
  for (const FloatType type : {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16}) {
    for (const bool aligned : {true, false}) {
      f(describe_prompt_embedding(type, aligned));
      f(describe_prompt_embedding_backward(type, aligned));
      f(describe_prefix_kv(type, aligned));
      f(describe_prefix_kv_backward(type, aligned));
    }
  }
  for_each_lora_kernel<BFloat16>(f);
  for_each_lora_kernel<Float16>(f);
  for_each_lora_kernel<TensorFloat32>(f);
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

PyCFunction as_method(PyCFunctionWithKeywords f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

}  // namespace

PyMethodDef plan_methods[] = {
    {"plan_lora_linear", as_method(plan_lora_linear), METH_VARARGS | METH_KEYWORDS,
     "The launch of lora_linear for a problem and a device, as a dict."},
    {"plan_lora_linear_backward", as_method(plan_lora_linear_backward), METH_VARARGS | METH_KEYWORDS,
     "The two launches of its gradients."},
    {"plan_prompt_embedding", as_method(plan_prompt_embedding), METH_VARARGS | METH_KEYWORDS,
     "The launch of prompt_embedding."},
    {"plan_prompt_embedding_backward", as_method(plan_prompt_embedding_backward), METH_VARARGS | METH_KEYWORDS,
     "The launch of its gradients."},
    {"plan_prefix_kv", as_method(plan_prefix_kv), METH_VARARGS | METH_KEYWORDS, "The launch of prefix_kv."},
    {"plan_prefix_kv_backward", as_method(plan_prefix_kv_backward), METH_VARARGS | METH_KEYWORDS,
     "The launches of its gradient."},
    {"kernels", kernels, METH_NOARGS, "Every kernel's mangled name -> (threads, bytes of dynamic shared memory)."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace lk
