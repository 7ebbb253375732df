// The machine's engine that multiplies for warpgroups (wgmma).
#include "machine_parts.h"
#include "ptx/core.h"

namespace lk::emu {
namespace {

constexpr int kGroupThreads = 128, kRows = 64, kDepth = 16;

// An operand in shared memory, by its descriptor: where each of its elements lies. By rows of the operand, or, where it
// is transposed, by its depth, in panels of as many rows of the operand as are in a row of memory.
class SharedOperand {
 public:
  SharedOperand(uint64_t descriptor, bool transposed)
      : start_(static_cast<uint32_t>(descriptor & 0x3FFF) << 4),
        lead_(static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4),
        stride_(static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4),
        span_(256u >> (descriptor >> 62)),
        is_swizzled_(descriptor >> 62 != 0),
        transposed_(transposed) {}

  bool is_valid() const { return is_swizzled_; }  // what no kernel uses is not here

  uint32_t address(uint32_t row, uint32_t k) const {
    const uint32_t panel = span_ / 2;
    const uint32_t offset = transposed_ ? row % panel * 2 + row / panel * lead_ + k % 8 * span_ + k / 8 * stride_
                                        : row % 8 * span_ + row / 8 * stride_ + k * 2;
    const uint32_t at = start_ + offset;
    return at ^ (at >> 7 & (span_ / 16 - 1)) << 4;
  }

 private:
  uint32_t start_, lead_, stride_, span_;
  bool is_swizzled_, transposed_;
};

float value_of(Element element, uint16_t bits) {
  return element == Element::kBFloat16 ? BFloat16::low(bits) : Float16::low(bits);
}

std::vector<Accumulator>::iterator accumulator_at(Thread& t, const float* registers) {
  std::vector<Accumulator>& all = t.async->accumulators;
  return std::find_if(all.begin(), all.end(), [&](const Accumulator& a) { return a.registers == registers; });
}

}  // namespace

void Machine::multiply_fence(Site site) {
  if (is_dropped(report_.multiply_fence_sites, multiply_fence_sites_, options_.faults.drop_multiply_fence, site))
    return;
  async_of(*current_, site).registers_are_fenced = true;
}

void Machine::multiply_add_async(const ProductOf& what, float* d, Site site) {
  Thread& t = *current_;
  AsyncThread& own = async_of(t, site);
  if (!own.registers_are_fenced) fail(t, site, "a product of registers without a fence");
  if (threads_ % kGroupThreads != 0) fail(t, site, "the block does not consist of warpgroups");
  std::vector<Warpgroup>& groups = t.block->async->warpgroups;
  if (groups.empty()) {
    groups.resize(static_cast<size_t>(threads_ / kGroupThreads));
    for (Warpgroup& g : groups) g.agent = new_agent(*t.block);
  }
  const int index = t.index / kGroupThreads;
  Warpgroup& group = groups[static_cast<size_t>(index)];

  // Nobody reads the registers until the wait.
  const auto count = static_cast<size_t>(what.columns / 2);
  auto accumulator = accumulator_at(t, d);
  if (accumulator == own.accumulators.end()) {
    own.accumulators.push_back({d, std::vector<float>(d, d + count), 0});
    accumulator = own.accumulators.end() - 1;
    std::memset(d, kPoison, count * sizeof *d);
  } else if (accumulator->sum.size() != count) {
    fail(t, site, "an accumulator of products under way is used with another shape");
  }
  const uint32_t number = ++own.products;
  accumulator->last = number;

  Product& product = group.open[number];
  if (product.joined == 0) {
    product.what = what;
    product.site = site;
    product.known = own.clock;
  } else if (!(product.what == what) || !same_site(product.site, site)) {
    fail(t, site, "a product of the warpgroup, while others are at the one of " + text_of(product.site));
  } else {
    product.known.meet(own.clock);
  }
  product.registers[t.index % kGroupThreads] = d;
  if (++product.joined < kGroupThreads) return;
  compute(*t.block, index, product);
  group.computed = number;
  group.open.erase(number);
  ++progress_;
}

// Operands are read now, and belong to the product until its group is waited for.
void Machine::compute(Block& block, int warpgroup, Product& product) {
  Warpgroup& group = block.async->warpgroups[static_cast<size_t>(warpgroup)];
  Thread& t = *current_;
  const ProductOf& what = product.what;
  const uint32_t number = group.computed + 1;
  const SharedOperand p(what.p, what.transposed_p), q(what.q, what.transposed_q);
  if (!p.is_valid() || !q.is_valid()) fail(t, product.site, "a descriptor without a swizzle");
  const auto element = [&](const SharedOperand& operand, int row, int k) {
    const uint32_t at = operand.address(static_cast<uint32_t>(row), static_cast<uint32_t>(k));
    check_shared(t, at, sizeof(uint16_t), sizeof(uint16_t), product.site);
    // Words are noted once.
    if (at % 4 == 0) clocked_read(t, product.known, at, 4, group.agent, number, true, product.site);
    uint16_t bits;
    std::memcpy(&bits, block.shared.data() + (at - kSharedBase), sizeof bits);
    return value_of(what.element, bits);
  };
  float a[kRows][kDepth], b[kDepth][256], sum[256];
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) a[row][k] = element(p, row, k);
  }
  for (int column = 0; column < what.columns; ++column) {
    for (int k = 0; k < kDepth; ++k) b[k][column] = element(q, column, k);
  }
  // Null: of a thread that a fault has kept from waiting.
  std::vector<float>* sums[kGroupThreads];
  for (int i = 0; i < kGroupThreads; ++i) {
    Thread& of = block.threads[static_cast<size_t>(warpgroup * kGroupThreads + i)];
    const auto accumulator = accumulator_at(of, product.registers[i]);
    sums[i] = accumulator == of.async->accumulators.end() ? nullptr : &accumulator->sum;
  }
  for (int row = 0; row < kRows; ++row) {
    std::fill_n(sum, what.columns, 0.0f);
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < what.columns; ++column) sum[column] += a[row][k] * b[k][column];
    }
    // Four threads share a row, two neighbouring columns of every eight each.
    for (int column = 0; column < what.columns; ++column) {
      const int thread = row / 16 * kLanes + row % 8 * 4 + column % 8 / 2;
      if (sums[thread] == nullptr) continue;
      float& d = (*sums[thread])[static_cast<size_t>(column / 8 * 4 + row % 16 / 8 * 2 + column % 2)];
      d = (what.accumulates ? d : 0.0f) + sum[column];
    }
  }
  report_.multiply_adds += static_cast<uint64_t>(kRows) * what.columns * kDepth;
}

void Machine::multiply_commit() { current_->async->committed.push_back(current_->async->products); }

// Where a fault leaves the wait out, registers that it would have filled stay NaN.
void Machine::multiply_wait(size_t pending, Site site) {
  Thread& t = *current_;
  AsyncThread& own = async_of(t, site);
  const bool is_left_out =
      is_dropped(report_.multiply_wait_sites, multiply_wait_sites_, options_.faults.drop_multiply_wait, site);
  own.registers_are_fenced = false;
  if (own.committed.size() <= pending) return;
  const auto end = own.committed.end() - static_cast<ptrdiff_t>(pending);
  const uint32_t last = *std::prev(end);
  own.committed.erase(own.committed.begin(), end);
  if (!is_left_out) {
    const Warpgroup& group = t.block->async->warpgroups[static_cast<size_t>(t.index / kGroupThreads)];
    while (group.computed < last) wait(&Warp::polling, "waiting for a product of its warpgroup", site);
    Done& done = own.clock.at(group.agent);
    done.count = std::max(done.count, last);
  }
  std::erase_if(own.accumulators, [&](const Accumulator& a) {
    if (a.last > last) return false;
    if (!is_left_out) std::copy(a.sum.begin(), a.sum.end(), a.registers);
    return true;
  });
}

}  // namespace lk::emu
