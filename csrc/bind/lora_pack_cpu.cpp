// lora_pack and its backward on the CPU: several lora_linears of one x. Members' factors A lie in one matrix, so that s
// of all is one product, or one pass over x where each has a mask; grad_x is summed where it is. The base product of
// each member has its own schedule of cpu_gemm.h.
#include <memory>
#include <string>
#include <tuple>

#include "cpu_lora.h"
#include "pack_checks.h"

namespace lk {
namespace {

// A member, with the columns of s that are its own.
struct Member {
  Tensor weight, a, b;
  std::optional<Tensor> bias = {};
  double scaling = 1.0;
  std::optional<Dropout> dropout = {};
  bool onednn = false;
  int64_t begin = 0, end = 0;

  int64_t n() const { return weight.size(0); }
  int64_t rank() const { return end - begin; }
  Tensor columns_of(const Tensor& s) const { return column_block(s, begin, end); }
  // Of the op's s, where members' lie one behind the other.
  Tensor part_of(const Tensor& s, int64_t rows) const { return view2d(s, {rows, rank()}, {rank(), 1}, rows * begin); }
};

// "aten", or "onednn, aten" where members differ.
std::vector<std::string> split(const std::string& schedule) {
  std::vector<std::string> names;
  for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 2) {
    end = schedule.find(", ", begin);
    names.push_back(schedule.substr(begin, end == std::string::npos ? end : end - begin));
  }
  return names;
}

class Pack {
 public:
  Pack(const Tensors& weights, const Tensors& lora_As, const Tensors& lora_Bs, const Tensors& biases,
       const std::optional<Tensor>& seed, const std::vector<double>& scalings, const std::vector<double>& dropout_p,
       const std::string& schedule)
      : has_dropout(seed) {
    const std::vector<std::string> schedules = split(schedule);
    STD_TORCH_CHECK(schedules.size() == 1 || schedules.size() == weights.size(), "one schedule, or one per member");
    upcast = schedules[0] == "upcast";
    in_16_bits = schedules[0] == "native";
    const int64_t first_seed = seed ? *static_cast<const int64_t*>(seed->const_data_ptr()) : 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      Member m{weights[i], lora_As[i], lora_Bs[i]};
      m.scaling = scalings[i];
      if (i < biases.size() && biases[i].numel() != 0) m.bias = biases[i];
      if (seed) m.dropout = make_dropout(static_cast<int64_t>(member_seed(first_seed, i)), dropout_p[i]);
      m.onednn = schedules[schedules.size() == 1 ? 0 : i] == "onednn";
      m.begin = rank;
      m.end = rank += m.a.size(0);
      members.push_back(m);
    }
  }

  // All A, one below the other, in a dtype.
  Tensor stacked_a(ScalarType dtype) const {
    if (members.size() == 1) return as_rows(cast(members[0].a, dtype));
    const Tensor a = new_empty_as(members[0].a, {rank, members[0].a.size(1)}, dtype);
    for (const Member& m : members) {
      Tensor rows = row_block(a, m.begin, m.end);
      if (m.rank() > 0) torch::stable::copy_(rows, m.a);
    }
    return a;
  }

  std::vector<Member> members;
  int64_t rank = 0;
  bool has_dropout, upcast, in_16_bits;
};

Tensors with_leading_sizes_of(const Tensors& all, const Tensor& like) {
  Tensors shown;
  for (const Tensor& rows : all) shown.push_back(lk::with_leading_sizes_of(rows, like));
  return shown;
}

// ------------------------------------------------------------------------------------------------- forward

std::tuple<Tensors, Tensor> forward(const Tensor& x, const Pack& pack) {
  const Tensor rows = as_rows(x);
  const int64_t m = rows.size(0);
  const ScalarType compute = pack.upcast ? ScalarType::Float : x.scalar_type();
  const Tensor s = new_empty_as(x, {m * pack.rank});
  Tensors ys, bs;  // bs: B transposed
  for (const Member& member : pack.members) {
    ys.push_back(member.onednn ? onednn_linear(rows, PlainMatrix(member.weight), member.bias)
                               : new_empty_as(x, {m, member.n()}));
    bs.push_back(transposed(cast(member.b, compute)));
  }
  std::optional<Shrink> shrink;
  std::optional<Tensor> a;
  if (pack.has_dropout) {
    shrink.emplace(rows.size(1));
    for (const Member& member : pack.members) {
      if (member.rank() > 0) shrink->add(member.a, member.dropout);
    }
  } else if (a = pack.stacked_a(compute); compute == ScalarType::Float && m >= kOwnProductRows && pack.rank > 0) {
    shrink.emplace(*a, std::nullopt);
  }

  for_row_blocks(m, pack.upcast, [&](int64_t m0, int64_t m1) {
    const Tensor x_block = cast(row_block(rows, m0, m1), compute);
    const Tensor s_block = new_empty_as(s, {m1 - m0, pack.rank}, shrink ? ScalarType::Float : compute);
    if (shrink) {
      (*shrink)(s_block, x_block, m0);
    } else {
      mm_out(s_block, x_block, transposed(*a));
    }
    for (size_t i = 0; i < ys.size(); ++i) {
      const Member& member = pack.members[i];
      Tensor part = row_block(member.part_of(s, m), m0, m1);
      if (member.rank() > 0) torch::stable::copy_(part, member.columns_of(s_block));
      const Tensor s_compute = cast(part, compute);
      const auto add_branch = [&](const Tensor& block, int64_t n0, int64_t n1) {
        if (member.rank() == 0) return;
        addmm_out(block, block, s_compute, column_block(bs[i], n0, n1), 1.0, member.scaling);
      };
      if (member.onednn) {
        add_branch(ys[i], 0, member.n());
      } else {
        linear(row_block(ys[i], m0, m1), x_block, PlainMatrix(member.weight), member.bias, add_branch);
      }
    }
  });
  return {with_leading_sizes_of(ys, x), s};
}

// ------------------------------------------------------------------------------------------------- decode

// Products of a few rows whose columns are shared out to threads as if they were those of one.
void run_decodes(const std::vector<LoraDecodeParams>& products) {
  int64_t columns = 0, work = 0;
  for (const LoraDecodeParams& p : products) {
    columns += p.n;
    work = std::max(work, p.rows * (p.k + p.rank));
  }
  for_columns(columns, work, decode_price(), [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const LoraDecodeParams& p : products) {
      const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, p.n);
      if (from < to) cpu::kernels().lora_decode(p, from, to);
      first += p.n;
    }
  });
}

// What decoding needs of a member. Where a pack is small, a copy of a tensor's handle is felt.
struct DecodedMember {
  const Tensor &weight, &a, &b;
  const Tensor* bias;  // null: none
  double scaling;
};

// y of a few fp32 rows; and s of all, one behind the other, into memory that is given once its size is known. As
// decode_rows of lora_linear, with one pass over all A and one over all W.
template <class MemoryOfS>
Tensors decode(const Tensor& x, const std::vector<DecodedMember>& members, const MemoryOfS& memory_of_s) {
  const int64_t m = rows_of(x);
  const Tensor rows = m == 1 && x.stride(x.dim() - 1) == 1 ? x : as_rows(x);  // one row needs no view
  LoraDecodeParams of_x{};
  of_x.x = floats(rows);
  of_x.x_stride = m == 1 ? 0 : rows.stride(0);
  of_x.rows = m;
  of_x.k = x.size(x.dim() - 1);
  int64_t rank = 0;
  for (const DecodedMember& member : members) rank += member.a.size(0);
  float* s = memory_of_s(m * rank);
  Tensors ys, kept;  // kept: operands that are read where they were copied to
  std::vector<LoraDecodeParams> shrinks, products;
  ys.reserve(members.size());
  shrinks.reserve(members.size());
  products.reserve(members.size());
  const auto data_of = [&](const Tensor& given, const Tensor& read) {
    if (read.get() != given.get()) kept.push_back(read);
    return floats(read);
  };
  for (const DecodedMember& member : members) {
    STD_TORCH_CHECK(is_fp32(x) && member.weight.stride(1) == 1,
                    "the decode schedule serves fp32 with unit column stride");
    ys.push_back(new_empty_rows_as(x, member.weight.size(0)));
    LoraDecodeParams& p = products.emplace_back(of_x);
    p.w = floats(member.weight);
    p.w_stride = member.weight.stride(0);
    p.n = member.weight.size(0);
    p.y = mutable_floats(ys.back());
    p.rank = member.a.size(0);
    if (p.rank > 0) {
      const Tensor a = as_float_rows(member.a), b = as_float_rows(member.b);
      LoraDecodeParams& shrink = shrinks.emplace_back(of_x);
      shrink.w = data_of(member.a, a);
      shrink.w_stride = a.stride(0);
      shrink.n = p.rank;
      shrink.y = s;
      p.s = s;
      p.b = data_of(member.b, b);
      p.b_stride = b.stride(0);
      p.alpha = static_cast<float>(member.scaling);
      s += m * p.rank;
    }
    if (member.bias != nullptr) p.bias = data_of(*member.bias, torch::stable::contiguous(*member.bias));
  }
  run_decodes(shrinks);
  run_decodes(products);
  return ys;
}

// The decode schedule where s is not asked for. A list takes as long on its way here as a tensor does: weights, all A,
// all B and biases come as one.
Tensors lora_pack_decode(Tensor x, Tensors operands, std::vector<double> scalings) {
  const size_t count = scalings.size();
  STD_TORCH_CHECK(count >= 1 && (operands.size() == 3 * count || operands.size() == 4 * count),
                  "operands must be weights, lora_As, lora_Bs and maybe biases, of as many members as scalings");
  std::vector<DecodedMember> members;
  members.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor &weight = operands[i], &a = operands[count + i], &b = operands[2 * count + i];
    check_member(x, weight, a, b);
    const Tensor* bias = operands.size() == 4 * count ? &operands[3 * count + i] : nullptr;
    if (bias != nullptr && bias->numel() == 0) bias = nullptr;
    if (bias != nullptr) check_bias(x, weight.size(0), *bias);
    members.push_back({weight, a, b, bias, scalings[i]});
  }
  std::unique_ptr<float[]> s;
  return decode(x, members, [&](int64_t size) {
    s.reset(new float[size]);
    return s.get();
  });
}

std::tuple<Tensors, Tensor> lora_pack(Tensor x, Tensors weights, Tensors lora_As, Tensors lora_Bs, Tensors biases,
                                      std::optional<Tensor> seed, std::vector<double> scalings,
                                      std::vector<double> dropout_p, std::string schedule) {
  check_lora_pack(x, weights, lora_As, lora_Bs, biases, seed, scalings, dropout_p);
  const Pack pack(weights, lora_As, lora_Bs, biases, seed, scalings, dropout_p, schedule);
  if (schedule != "decode") return forward(x, pack);
  STD_TORCH_CHECK(!seed, "the decode schedule serves no dropout, so seed must be None");
  std::vector<DecodedMember> members;
  for (const Member& m : pack.members) members.push_back({m.weight, m.a, m.b, m.bias ? &*m.bias : nullptr, m.scaling});
  std::optional<Tensor> s;
  const Tensors ys = decode(x, members, [&](int64_t size) {
    s = new_empty_as(x, {size});
    return mutable_floats(*s);
  });
  return {ys, *s};
}

// ------------------------------------------------------------------------------------------------ backward

// The sum of grad_y W over members, which is rounded after each of them.
Tensor base_gradient(const Pack& pack, const Tensors& grads, int64_t k) {
  std::optional<Tensor> sum;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Member& member = pack.members[i];
    if (member.onednn) {
      const Tensor w = transposed(member.weight);
      sum = sum ? onednn_linear_plus(*sum, grads[i], w) : onednn_linear(grads[i], w, std::nullopt);
    } else if (sum) {
      add_linear_backward(*sum, grads[i], PlainMatrix(member.weight));
    } else {
      sum = new_empty_as(grads[i], {grads[i].size(0), k});
      linear_backward(*sum, grads[i], PlainMatrix(member.weight));
    }
  }
  return *sum;
}

bool has_only(const Tensors& all, ScalarType dtype) {
  return std::all_of(all.begin(), all.end(), [&](const Tensor& t) { return t.scalar_type() == dtype; });
}

// Zeros to add to, of those that are needed.
Tensor zeros_as(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  Tensor zeros = new_empty_as(like, {rows, columns}, dtype);
  torch::stable::zero_(zeros);
  return zeros;
}

std::tuple<Tensor, Tensors, Tensors> lora_pack_backward(Tensors grad_ys, Tensor x, Tensor s, Tensors weights,
                                                        Tensors lora_As, Tensors lora_Bs, std::optional<Tensor> seed,
                                                        std::vector<double> scalings, std::vector<double> dropout_p,
                                                        bool need_x, std::vector<bool> need_A, std::vector<bool> need_B,
                                                        std::string schedule) {
  check_lora_pack_backward(grad_ys, x, s, weights, lora_As, lora_Bs, seed, scalings, dropout_p, need_A, need_B);
  const Pack pack(weights, lora_As, lora_Bs, {}, seed, scalings, dropout_p, schedule);
  // The adapters' gradients are summed in fp32 (fp64 for fp64) and rounded to the adapter's dtype once, unless all is
  // of 16 bits that the CPU multiplies itself, as in lora_linear.
  const ScalarType dtype = x.scalar_type();
  const bool keeps = dtype == ScalarType::Double || (pack.in_16_bits && !seed && has_only(lora_As, dtype));
  const ScalarType wide = keeps ? dtype : ScalarType::Float;
  const Tensor x_rows = as_rows(x), a = pack.stacked_a(wide);
  const int64_t m = x_rows.size(0), k = x_rows.size(1);
  const bool need_any_A = std::find(need_A.begin(), need_A.end(), true) != need_A.end();
  const bool need_grad_s = (need_x || need_any_A) && pack.rank > 0;
  Tensors grads, grad_Bs;
  std::vector<std::optional<Shrink>> shrinks(weights.size());  // grad_s = scaling · grad_y · B
  std::vector<Tensor> bs;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Member& member = pack.members[i];
    grads.push_back(as_rows(grad_ys[i]));
    grad_Bs.push_back(zeros_as(x, need_B[i] ? member.n() : 0, member.rank(), wide));
    bs.push_back(cast(member.b, wide));
    if (need_grad_s && member.rank() > 0 && wide == ScalarType::Float && m >= kOwnProductRows)
      shrinks[i].emplace(transposed(bs[i]), std::nullopt, member.scaling);
  }
  const Tensor grad_A = zeros_as(x, need_any_A ? pack.rank : 0, k, wide);
  const Tensor grad_x = need_x && !pack.upcast ? base_gradient(pack, grads, k) : new_empty_as(x, {need_x ? m : 0, k});

  for_row_blocks(m, dtype != wide, [&](int64_t m0, int64_t m1) {
    const Tensor x_block = row_block(x_rows, m0, m1);
    const Tensor grad_s = new_empty_as(x, {m1 - m0, pack.rank}, wide);
    Tensors wide_grads;
    for (size_t i = 0; i < grads.size(); ++i) {
      const Member& member = pack.members[i];
      const Tensor grad = wide_grads.emplace_back(cast(row_block(grads[i], m0, m1), wide));
      if (member.rank() == 0) continue;
      const Tensor part = member.columns_of(grad_s);
      if (shrinks[i]) {
        (*shrinks[i])(part, grad, m0);
      } else if (need_grad_s) {
        addmm_out(part, part, grad, bs[i], 0.0, member.scaling);
      }
      if (need_B[i]) {
        const Tensor s_block = cast(row_block(member.part_of(s, m), m0, m1), wide);
        add_grad(transposed(grad_Bs[i]), s_block, grad, member.scaling);
      }
    }
    if (need_grad_s && need_any_A && !seed) add_grad(grad_A, grad_s, cast(x_block, wide), 1.0);
    Tensor target = need_x ? row_block(grad_x, m0, m1) : grad_x, sum = target;
    if (need_x && pack.upcast) {
      sum = base_gradient(pack, wide_grads, k);
    } else if (need_x && seed) {
      sum = cast(target, wide);
    }
    if (!need_grad_s) {
    } else if (seed) {
      for (const Member& member : pack.members) {
        if (member.rank() == 0) continue;
        const Tensor a_rows = row_block(a, member.begin, member.end);
        const Tensor grad_rows = need_any_A ? row_block(grad_A, member.begin, member.end) : grad_A;
        add_dropout_grads(need_x ? &sum : nullptr, need_any_A ? &grad_rows : nullptr, x_block, a_rows,
                          member.columns_of(grad_s), m0, *member.dropout, 1.0);
      }
    } else if (need_x) {
      addmm_out(sum, sum, cast(grad_s, sum.scalar_type()), cast(a, sum.scalar_type()), 1.0, 1.0);
    }
    if (need_x && sum.get() != target.get()) torch::stable::copy_(target, sum);
  });

  Tensors grad_As;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Member& member = pack.members[i];
    Tensor of_a = new_empty_as(member.a, {need_A[i] ? member.rank() : 0, k}), of_b = grad_Bs[i];
    if (of_a.numel() != 0) torch::stable::copy_(of_a, row_block(grad_A, member.begin, member.end));
    grad_As.push_back(need_A[i] ? of_a : new_empty_as(member.a, {0}));
    grad_Bs[i] = need_B[i] ? cast(of_b, member.b.scalar_type()) : new_empty_as(member.b, {0});
  }
  return {need_x ? lk::with_leading_sizes_of(grad_x, x) : new_empty_as(x, {0}), grad_As, grad_Bs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("lora_pack", TORCH_BOX(&lora_pack));
  m.impl("lora_pack_decode", TORCH_BOX(&lora_pack_decode));
  m.impl("lora_pack_backward", TORCH_BOX(&lora_pack_backward));
}

}  // namespace lk
