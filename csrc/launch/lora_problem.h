// A call of lora_linear, or of its gradients -> the configs, workspace and Params of its launches: once, for the
// binding, the plans and the tests' emulator. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "../config/lora_linear.h"
#include "../config/lora_linear_wgmma.h"
#include "../params/common.h"
#include "../params/lora_linear.h"
#include "../philox.h"

namespace lk {

constexpr int element_bytes(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}

// A matrix in memory: its rows `stride` elements apart, the elements of a row neighbours.
struct MatrixRef {
  const void* data;
  int64_t stride, rows, columns;
  FloatType type;

  // Whether every row begins where a chunk may.
  bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && stride % chunk_elements(element_bytes(type)) == 0;
  }
};

// Where a result goes.
struct OutputRef {
  void* data;
  int64_t stride;
};

// What the forward and its gradients are told. x and w are of one type; a and b are, too, or both fp32.
struct LoraProblem {
  MatrixRef x, w, a, b;        // [m, k], [n, k], [rank, k], [n, rank]
  const void* bias = nullptr;  // [n], of x's type; null: none
  float scaling = 1.0f;
  const int64_t* seed = nullptr;  // where the kernel finds it; null: no dropout
  double dropout_p = 0.0;
  uint64_t seed_step = 0;     // of a pack's member (member_seed)
  bool w_in_columns = false;  // w is the transpose of a matrix in rows, which only the vendor's GEMM reads

  int64_t m() const { return x.rows; }
  int64_t k() const { return x.columns; }
  int64_t n() const { return w.rows; }
  int64_t rank() const { return a.rows; }
  int element_bytes() const { return lk::element_bytes(x.type); }
  bool adapters_are_wider() const { return lk::element_bytes(a.type) > element_bytes(); }
  bool is_whole(int64_t length) const { return length % chunk_elements(element_bytes()) == 0; }
  // What the launches may read in chunks: the one of y and s, and those of s alone and of the branch alone, each by
  // what it reads. Results and workspace are allocated for the call, and aligned where their rows are whole chunks.
  Access access() const {
    const bool long_rows = is_whole(k()) && x.aligned() && (w_in_columns || w.aligned()) && a.aligned();
    return access_of(long_rows, long_rows && is_whole(rank()) && b.aligned());
  }
  Access shrink_access() const {
    const bool long_rows = is_whole(k()) && x.aligned() && a.aligned();
    return access_of(long_rows, long_rows && is_whole(rank()));
  }
  Access expand_access() const { return access_of(true, is_whole(rank()) && b.aligned()); }
  // For the forward; null: it fits.
  const char* misfit_of_wgmma(const DeviceLimits& device) const {
    if (w_in_columns) return "wgmma does not fit: w lies in columns; what is best without it";
    return lk::misfit_of_wgmma(element_bytes(), k(), access(), is_whole(n()), device);
  }
};

// What the gradients are told besides.
struct LoraBackwardProblem {
  LoraProblem forward;
  MatrixRef grad_y;  // [m, n]
  MatrixRef s;       // the forward's, [m, rank], contiguous
  bool need_x = true, need_a = true, need_b = true;

  LoraBackwardAccess access() const {
    const LoraProblem& f = forward;
    const bool grad_y_is_whole = f.is_whole(f.n()) && grad_y.aligned();
    const bool long_rows = f.access() != Access::kGatherAll && grad_y_is_whole;
    const bool a_is_whole = f.is_whole(f.k()) && f.a.aligned(), ranks_are_whole = f.is_whole(f.rank()) && s.aligned();
    return {.grad_x = access_of(long_rows, long_rows && f.access() == Access::kWhole && s.aligned()),
            .expand = access_of(a_is_whole, a_is_whole && f.is_whole(f.rank())),
            .x_is_whole = f.is_whole(f.k()) && f.x.aligned(),
            .grad_y_is_whole = grad_y_is_whole,
            .ranks_are_whole = ranks_are_whole};
  }
  // For dX; null: it fits.
  const char* misfit_of_wgmma(const DeviceLimits& device) const {
    if (!need_x) return "wgmma does not fit: no gradient of x is wanted; what is best without it";
    if (forward.w_in_columns) return "wgmma does not fit: w lies in columns; what is best without it";
    return lk::misfit_of_wgmma(forward.element_bytes(), forward.n(), access().grad_x, forward.is_whole(forward.k()),
                               device);
  }
};

// ---------------------------------------------------------------------------------------------------- forward

// For the forward, or for dX, of `columns` columns.
inline UsesCublas uses_cublas(const LoraProblem& p, int64_t columns, Access access, bool few_rows,
                              const DeviceLimits& device, Wanted wanted) {
  if (p.w_in_columns) return {true, "w lies in columns, as the vendor's GEMM can read it"};
  return uses_cublas(p.m(), columns, p.element_bytes(), access, few_rows, device, wanted);
}

// One launch, or "cublas".
struct LoraForwardConfig {
  UsesCublas cublas;
  bool vendor_makes_s;      // s = x aT is a product of the vendor's, too, and `launch` has no blocks
  LoraLinearConfig launch;  // of y and s, or of s alone
  LoraLinearConfig expand;  // of the branch; no blocks: not cublas
};

inline LoraForwardConfig lora_forward_config(const LoraProblem& p, const DeviceLimits& device, Wanted wanted) {
  const Access access = p.access();
  const bool has_dropout = p.seed != nullptr;
  LoraForwardConfig config{};
  const UsesWgmma wgmma = uses_wgmma(p.misfit_of_wgmma(device), p.m(), p.n(), device, wanted);
  if (wgmma.yes) {
    config.cublas = {false, wgmma.reason};
    config.launch = wgmma_config(LoraRole::kForward, p.m(), p.n(), p.k(), p.rank(), p.adapters_are_wider(), device);
    if (wanted == Wanted::kWgmmaClusters) plan_clusters(p.m(), p.n(), device, config.launch);
    return config;
  }
  config.cublas =
      uses_cublas(p, p.n(), access, serves_few_rows(p.m(), p.n(), p.rank(), access, has_dropout), device, wanted);
  if (wgmma.reason != nullptr) config.cublas.reason = wgmma.reason;
  if (config.cublas.yes) {
    config.vendor_makes_s = !has_dropout;
    if (has_dropout) {
      config.launch = shrink_config(p.m(), p.k(), p.rank(), p.element_bytes(), p.shrink_access(), device);
    }
    config.expand = expand_config(LoraRole::kForward, p.m(), p.n(), p.expand_access());
  } else {
    config.launch = lora_linear_config(p.m(), p.n(), p.k(), p.rank(), p.element_bytes(), access, has_dropout, device);
  }
  return config;
}

// config.counters words that are zero, and config.partials floats.
struct LoraWorkspace {
  uint32_t* counters;
  float* partials;
};

// s: [m, rank], contiguous.
inline LoraLinearParams forward_params(const LoraProblem& p, OutputRef y, void* s, const LoraLinearConfig& launch,
                                       const LoraWorkspace& workspace) {
  const Dropout dropout = make_dropout(0, p.dropout_p);
  return {.x = p.x.data,
          .w = p.w.data,
          .a = p.a.data,
          .b = p.b.data,
          .bias = p.bias,
          .y = y.data,
          .s = s,
          .x_stride = p.x.stride,
          .w_stride = p.w.stride,
          .a_stride = p.a.stride,
          .b_stride = p.b.stride,
          .y_stride = y.stride,
          .m = static_cast<int32_t>(p.m()),
          .n = static_cast<int32_t>(p.n()),
          .k = static_cast<int32_t>(p.k()),
          .rank = static_cast<int32_t>(p.rank()),
          .adapters_are_float = p.adapters_are_wider(),
          .scaling = p.scaling,
          .dropout_threshold = dropout.threshold,
          .dropout_scale = dropout.scale,
          .seed = p.seed,
          .seed_step = p.seed_step,
          .counters = workspace.counters,
          .group_rows = launch.group_rows,
          .splits = launch.splits,
          .split_depth = launch.split_depth,
          .partials = workspace.partials,
          .saved_s = nullptr,
          .partial_grad_b = nullptr};
}

// ---------------------------------------------------------------------------------------------------- gradients

inline LoraBackwardConfig lora_backward_config(const LoraBackwardProblem& p, const DeviceLimits& device,
                                               Wanted wanted) {
  const LoraProblem& f = p.forward;
  const LoraBackwardAccess access = p.access();
  const UsesWgmma wgmma = uses_wgmma(p.misfit_of_wgmma(device), f.m(), f.k(), device, wanted);
  if (wgmma.yes) {
    LoraBackwardConfig config{};
    config.cublas = {false, wgmma.reason};
    config.grad_x = wgmma_config(LoraRole::kGradX, f.m(), f.k(), f.n(), f.rank(), f.adapters_are_wider(), device);
    if (wanted == Wanted::kWgmmaClusters) plan_clusters(f.m(), f.k(), device, config.grad_x);
    plan_parts_of_grad_b(f.m(), f.n(), p.need_b, config);
    config.grads = lora_grads_config(f.m(), p.need_b ? f.n() : 0, p.need_a ? f.k() : 0, f.rank(),
                                     config.parts_of_grad_b, access, device);
    return config;
  }
  UsesCublas cublas = uses_cublas(f, f.k(), access.grad_x, false, device, wanted);
  if (wgmma.reason != nullptr) cublas.reason = wgmma.reason;
  return lora_backward_config(f.m(), f.n(), f.k(), f.rank(), access, p.need_x, p.need_a, p.need_b, device, cublas);
}

// counters and partials: those of the first launch, then of dA's and dB's. grad_s: s' = dY B, [m, rank] of x's type,
// which the first launch leaves for the second, as it does config.partial_grad_b floats.
struct LoraBackwardWorkspace {
  uint32_t* counters;
  void* grad_s;
  float *partial_grad_b, *partials;
};

// The first launch, and cublas' second: the forward's computation with dY for x, and with W, B and A, which lie in
// memory as they do there, for the transposes of w, a and b. grad_x: [m, k].
inline LoraLinearParams grad_x_params(const LoraBackwardProblem& p, OutputRef grad_x, const LoraLinearConfig& launch,
                                      const LoraBackwardConfig& config, const LoraBackwardWorkspace& workspace) {
  const LoraProblem& f = p.forward;
  const Dropout dropout = make_dropout(0, f.dropout_p);
  return {.x = p.grad_y.data,
          .w = f.w.data,
          .a = f.b.data,
          .b = f.a.data,
          .bias = nullptr,
          .y = grad_x.data,
          .s = workspace.grad_s,
          .x_stride = p.grad_y.stride,
          .w_stride = f.w.stride,
          .a_stride = f.b.stride,
          .b_stride = f.a.stride,
          .y_stride = grad_x.stride,
          .m = static_cast<int32_t>(f.m()),
          .n = static_cast<int32_t>(p.need_x ? f.k() : 0),
          .k = static_cast<int32_t>(f.n()),
          .rank = static_cast<int32_t>(f.rank()),
          .adapters_are_float = f.adapters_are_wider(),
          .scaling = f.scaling,
          .dropout_threshold = dropout.threshold,
          .dropout_scale = dropout.scale,
          .seed = f.seed,
          .seed_step = f.seed_step,
          .counters = workspace.counters,
          .group_rows = launch.group_rows,
          .splits = launch.splits,
          .split_depth = launch.split_depth,
          .partials = launch.partials > 0 ? workspace.partials : nullptr,
          .saved_s = config.parts_of_grad_b > 0 ? p.s.data : nullptr,
          .partial_grad_b = config.parts_of_grad_b > 0 ? workspace.partial_grad_b : nullptr};
}

// The last. grad_a: [rank, k], grad_b: [n, rank], both contiguous, of a's type, and null where they are not wanted.
inline LoraGradsParams grads_params(const LoraBackwardProblem& p, void* grad_a, void* grad_b,
                                    const LoraBackwardConfig& config, const LoraBackwardWorkspace& workspace) {
  const LoraProblem& f = p.forward;
  const Dropout dropout = make_dropout(0, f.dropout_p);
  return {.x = f.x.data,
          .grad_y = p.grad_y.data,
          .s = p.s.data,
          .grad_s = workspace.grad_s,
          .grad_a = grad_a,
          .grad_b = grad_b,
          .x_stride = f.x.stride,
          .grad_y_stride = p.grad_y.stride,
          .m = static_cast<int32_t>(f.m()),
          .n = static_cast<int32_t>(f.n()),
          .k = static_cast<int32_t>(f.k()),
          .rank = static_cast<int32_t>(f.rank()),
          .grads_are_float = f.a.type == FloatType::kFloat32,
          .scaling = f.scaling,
          .dropout_threshold = dropout.threshold,
          .dropout_scale = dropout.scale,
          .seed = f.seed,
          .seed_step = f.seed_step,
          .splits = config.grads.splits,
          .split_rows = config.grads.split_rows,
          .partials = workspace.partials + config.grad_x.partials,
          .counters = workspace.counters + config.grad_x.counters,
          .partial_grad_b = config.parts_of_grad_b > 0 ? workspace.partial_grad_b : nullptr,
          .parts_of_grad_b = static_cast<int32_t>(config.parts_of_grad_b)};
}

// ----------------------------------------------------------------------------------- what a launch may touch

// Rows of memory. What is written is written in full, but for the gaps between rows.
struct MemoryRef {
  const void* data;
  int64_t rows, columns, stride;
  int element_bytes;
  bool is_written;
};

// f(MemoryRef) for everything that lora_linear_kernel reads or writes, other than the counters.
template <class F>
void for_each_range(const LoraLinearParams& p, const LoraLinearConfig& config, int element_bytes, const F& f) {
  const bool shrinks = config.key.schedule == Schedule::kShrink, expands = config.key.schedule == Schedule::kExpand;
  const int adapter_bytes = p.adapters_are_float ? 4 : element_bytes;
  const auto add = [&](const void* data, int64_t rows, int64_t columns, int64_t stride, int bytes, bool is_written) {
    if (data != nullptr) f(MemoryRef{data, rows, columns, stride, bytes, is_written});
  };
  // The gradient's w, a and b lie the other way round.
  const bool is_backward = config.key.role == LoraRole::kGradX;
  const auto factor = [&](const void* data, int64_t r, int64_t c, int64_t stride, int bytes) {
    add(data, is_backward ? c : r, is_backward ? r : c, stride, bytes, false);
  };
  add(p.seed, 1, 1, 1, sizeof *p.seed, false);
  add(p.s, p.m, p.rank, p.rank, element_bytes, !expands);
  if (!expands) {
    add(p.x, p.m, p.k, p.x_stride, element_bytes, false);
    factor(p.a, p.rank, p.k, p.a_stride, adapter_bytes);
  }
  if (!shrinks) {
    factor(p.b, p.n, p.rank, p.b_stride, adapter_bytes);
    add(p.bias, 1, p.n, p.n, element_bytes, false);
    add(p.y, p.m, p.n, p.y_stride, element_bytes, true);
  }
  if (!shrinks && !expands) factor(p.w, p.n, p.k, p.w_stride, element_bytes);
  add(p.saved_s, p.m, p.rank, p.rank, element_bytes, false);
  add(p.partials, 1, config.partials, config.partials, sizeof(float), true);
  const int64_t parts = blocks_of(p.m, tile_shape(config.key.tile).rows) * p.k * config.key.rank_tile;
  add(p.partial_grad_b, 1, parts, parts, sizeof(float), true);
}

// The same for lora_grads_kernel.
template <class F>
void for_each_range(const LoraGradsParams& p, const LoraGradsConfig& config, int element_bytes, const F& f) {
  const auto add = [&](const void* data, int64_t rows, int64_t columns, int64_t stride, int bytes, bool is_written) {
    if (data != nullptr) f(MemoryRef{data, rows, columns, stride, bytes, is_written});
  };
  const int grad_bytes = p.grads_are_float ? 4 : element_bytes;
  const int64_t parts = static_cast<int64_t>(p.parts_of_grad_b) * p.n * config.key.rank_tile;
  add(p.x, p.m, p.k, p.x_stride, element_bytes, false);
  add(p.grad_y, p.m, p.n, p.grad_y_stride, element_bytes, false);
  add(p.s, p.m, p.rank, p.rank, element_bytes, false);
  add(p.grad_s, p.m, p.rank, p.rank, element_bytes, false);
  add(p.seed, 1, 1, 1, sizeof *p.seed, false);
  add(p.partial_grad_b, 1, parts, parts, sizeof(float), false);
  add(p.grad_a, p.rank, p.k, p.k, grad_bytes, true);
  add(p.grad_b, p.n, p.rank, p.rank, grad_bytes, true);
  add(p.partials, 1, config.partials, config.partials, sizeof(float), true);
}

}  // namespace lk
