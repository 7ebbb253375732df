// The machine: launches, the order in which threads take turns, barriers and warps. memory.cpp has the rest.
#include "machine.h"

#include <bit>
#include <numeric>
#include <stdexcept>

#include "fragments.h"
#include "machine_parts.h"

namespace lk::emu {
namespace {

constexpr int kFruitlessRounds = 1000;  // in which all who poll have polled and nothing has changed: a deadlock

thread_local Machine* machine = nullptr;

}  // namespace

Machine& running() {
  if (machine == nullptr) throw std::logic_error("a kernel's function was called outside of emu::launch");
  return *machine;
}

Machine::Machine(int blocks, int threads, int dynamic_shared_bytes, const std::vector<Range>& global,
                 const Options& options, const std::function<void()>& kernel)
    : block_count_(blocks),
      threads_(threads),
      shared_bytes_(static_cast<size_t>(dynamic_shared_bytes)),
      options_(options),
      kernel_(kernel),
      random_(options.seed) {
  if (machine != nullptr) throw std::logic_error("a launch within a launch");
  if (blocks < 0 || threads <= 0 || threads > 1024 || threads % kLanes != 0 || dynamic_shared_bytes < 0 ||
      options.resident_blocks <= 0) {
    throw std::invalid_argument("a launch needs whole warps, at most 1024 threads, and a resident block");
  }
  if (options.cluster <= 0 || blocks % options.cluster != 0 || (options.cluster > 1 && !options.by_clocks)) {
    throw std::invalid_argument("a launch needs whole clusters, and, where these have several blocks, clocks");
  }
  for (const Range& r : global) {
    const auto begin = reinterpret_cast<uintptr_t>(r.begin);
    if (r.bytes != 0) ranges_.push_back({begin, begin + r.bytes, {}});
  }
  // Arrays that overlap share their history of writes.
  std::sort(ranges_.begin(), ranges_.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  std::vector<GlobalRange> merged;
  for (GlobalRange& r : ranges_) {
    if (!merged.empty() && r.begin < merged.back().end) {
      merged.back().end = std::max(merged.back().end, r.end);
    } else {
      merged.push_back(r);
    }
  }
  ranges_ = std::move(merged);
  machine = this;
}

Machine::~Machine() { machine = nullptr; }

void Machine::fail(const Thread& t, const Site& site, const std::string& what) const {
  throw std::runtime_error(
      concatenate("block ", t.block->index, ", thread ", t.index, ", ", text_of(site), ": ", what));
}

// ---- scheduling

Report Machine::run() {
  const int cluster = options_.cluster, clusters = block_count_ / cluster;
  std::vector<int> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  auto next = order.begin();
  const auto start_next = [&](const std::vector<Block*>& blocks) {
    if (next == order.end()) return;
    const int index = *next++;
    for (Block* block : blocks) {
      block->index = index * cluster + block->rank;
      start(*block);
    }
  };
  for (int i = 0; i < std::min(std::max(1, options_.resident_blocks / cluster), clusters); ++i) {
    std::vector<Block*> together;
    for (int rank = 0; rank < cluster; ++rank) {
      blocks_.push_back(std::make_unique<Block>(threads_));
      for (Warp& w : blocks_.back()->warps) warps_.push_back(&w);
      blocks_.back()->rank = rank;
      together.push_back(blocks_.back().get());
    }
    for (Block* block : together) block->cluster = together;
    start_next(together);
  }

  int fruitless_rounds = 0;
  uint64_t progress_before = 0;
  while (std::any_of(blocks_.begin(), blocks_.end(), [](const auto& b) { return b->running; })) {
    if (options_.by_clocks && random_() % 4 == 0) deliver_box();
    Warp* warp = pick();
    if (warp != nullptr) {
      step(*warp);
      if (error_) std::rethrow_exception(error_);
      Block& block = *warp->block;
      if (block.exited == threads_) {
        block.running = false;
        const bool has_ended =
            std::none_of(block.cluster.begin(), block.cluster.end(), [](Block* b) { return b->running; });
        if (has_ended) start_next(block.cluster);
      }
    } else if (!deliver_box() && !wake(&Warp::stalled)) {
      fruitless_rounds = progress_ == progress_before ? fruitless_rounds + 1 : 0;
      progress_before = progress_;
      if (fruitless_rounds > kFruitlessRounds || !wake(&Warp::polling)) fail_deadlock();
    }
  }
  return report_;
}

void Machine::start(Block& block) {
  block.running = true;
  block.epoch = 1;
  block.at_barrier = block.exited = 0;
  block.shared.assign(shared_bytes_, kPoison);
  block.words.assign((shared_bytes_ + 3) / 4, SharedWord{});
  block.known.emplace(block_count_);
  if (options_.by_clocks) {
    block.async = std::make_unique<AsyncBlock>(block.words.size());
    block.async->agents = threads_;
  }
  for (int i = 0; i < threads_; ++i) {
    Thread& t = block.threads[i];
    t.block = &block;
    t.index = i;
    t.fiber.prepare(block.stacks[i], &enter_thread);
    t.doing = kRunning;
    t.site = Site{};
    t.copies.clear();
    t.groups.clear();
    t.open_copies = 0;
    t.acquired.reset();
    t.releases = 0;
    t.polled = nullptr;
    if (options_.by_clocks) {
      t.async = std::make_unique<AsyncThread>();
      t.async->agent = block.index * kAgents + i;
      t.async->step();
    }
  }
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& w = block.warps[i];
    w.block = &block;
    w.first_thread = static_cast<int>(i) * kLanes;
    w.ready = kAllLanes;
    w.polling = w.stalled = w.exited = w.joined = 0;
    w.epoch = 1;
  }
  ++progress_;
}

// A warp that can go on, or null.
Warp* Machine::pick() {
  const bool let_poll = random_() % 4 == 0;
  const size_t first = random_() % warps_.size();
  for (size_t i = 0; i < warps_.size(); ++i) {
    Warp& w = *warps_[(first + i) % warps_.size()];
    if (!w.block->running) continue;
    if (let_poll) {
      w.ready |= w.polling;
      w.polling = 0;
    }
    if (w.ready != 0) return &w;
  }
  return nullptr;
}

bool Machine::wake(uint32_t Warp::*lanes) {
  bool found = false;
  for (Warp* w : warps_) {
    if (!w->block->running || w->*lanes == 0) continue;
    w->ready |= w->*lanes;
    w->*lanes = 0;
    found = true;
  }
  return found;
}

// Runs a warp until none of its lanes can go on or one of them yields.
void Machine::step(Warp& warp) {
  const int turn = static_cast<int>(random_() % kLanes);
  const int lane = (std::countr_zero(std::rotr(warp.ready, turn)) + turn) % kLanes;
  current_ = &warp.block->threads[warp.first_thread + lane];
  scheduler_.switch_to(current_->fiber);
}

void Machine::enter_thread() {
  Machine& m = *machine;
  m.current_->fiber.arrived_from(m.scheduler_);
  try {
    m.kernel_();
    m.exit_thread();
  } catch (...) {
    m.error_ = std::current_exception();
  }
  m.current_->fiber.leave_for(m.scheduler_);
}

void Machine::exit_thread() {
  Thread& t = *current_;
  Warp& w = warp_of(t);
  if (w.joined != 0) fail(t, w.site, "the warp waits here for a thread that has exited");
  if (t.block->at_barrier != 0) {
    const auto waiting = std::find_if(t.block->threads.begin(), t.block->threads.end(),
                                      [](const Thread& other) { return other.doing == kInBarrier; });
    fail(*waiting, waiting->site, concatenate("sync_block waits for thread ", t.index, ", which has exited"));
  }
  if (t.async != nullptr) finish_thread(t);
  t.doing = kExited;
  w.ready &= ~t.bit();
  w.exited |= t.bit();
  ++t.block->exited;
  ++progress_;
}

void Machine::yield() { current_->fiber.switch_to(scheduler_); }

// Stops the current thread; `lanes` says who may wake it, null: whoever completes what it waits for.
void Machine::wait(uint32_t Warp::*lanes, const char* doing, Site site) {
  Thread& t = *current_;
  Warp& w = warp_of(t);
  t.doing = doing;
  t.site = site;
  w.ready &= ~t.bit();
  if (lanes != nullptr) w.*lanes |= t.bit();
  if (w.ready != 0) {
    const int lane = (std::countr_zero(std::rotr(w.ready, t.lane())) + t.lane()) % kLanes;
    current_ = &t.block->threads[w.first_thread + lane];
    t.fiber.switch_to(current_->fiber);
  } else {
    t.fiber.switch_to(scheduler_);
  }
  t.doing = kRunning;
}

void Machine::fail_deadlock() const {
  std::ostringstream out;
  out << "deadlock:";
  for (const auto& block : blocks_) {
    if (!block->running) continue;
    for (int first = 0, last; first < threads_; first = last + 1) {
      const Thread& t = block->threads[first];
      for (last = first; last + 1 < threads_; ++last) {
        const Thread& next = block->threads[last + 1];
        if (next.doing != t.doing || !same_site(next.site, t.site)) break;
      }
      out << "\n  block " << block->index << ", threads " << first << "-" << last << ": " << t.doing;
      if (t.doing != kExited) out << ", " << text_of(t.site);
    }
  }
  throw std::runtime_error(out.str());
}

// Whether a fault skips this call. Numbers the call sites.
bool Machine::is_dropped(std::vector<std::string>& names, std::vector<Site>& sites, int dropped, Site site) {
  const auto found = std::find_if(sites.begin(), sites.end(), [&](const Site& s) { return same_site(s, site); });
  const auto index = found - sites.begin();
  if (found == sites.end()) {
    sites.push_back(site);
    names.push_back(text_of(site));
  }
  return index == dropped;
}

void Machine::sync_block(Site site) {
  if (is_dropped(report_.barrier_sites, barrier_sites_, options_.faults.drop_barrier, site)) return;
  Thread& t = *current_;
  if (t.block->exited != 0) fail(t, site, "sync_block waits for threads that have exited");
  if (++t.block->at_barrier < threads_) {
    wait(nullptr, kInBarrier, site);
  } else {
    t.site = site;
    complete_barrier(*t.block);
    yield();  // else the last to arrive would always be the first to go on
  }
}

void Machine::complete_barrier(Block& block) {
  for (Warp& w : block.warps) {
    const Thread& first = block.threads[w.first_thread];
    for (int lane = 1; lane < kLanes; ++lane) {
      const Thread& t = block.threads[w.first_thread + lane];
      if (!same_site(t.site, first.site)) {
        fail(t, t.site, "sync_block, while another lane of the warp is at the one of " + text_of(first.site));
      }
    }
    w.ready = kAllLanes;
  }
  if (block.async != nullptr) {
    std::vector<Thread*> all;
    for (Thread& t : block.threads) all.push_back(&t);
    meet(all);
  }
  for (Thread& t : block.threads) {
    if (!t.acquired) continue;
    block.known->join(*t.acquired);
    t.acquired.reset();
  }
  block.at_barrier = 0;
  ++block.epoch;
  ++progress_;
  ++report_.barriers;
}

void Machine::pause(Site site) {
  current_->polled = nullptr;
  wait(&Warp::polling, "polling", site);
}

// ---- warps

void Machine::join_collective(Collective collective, const Operands& operands, Site site) {
  Thread& t = *current_;
  Warp& w = warp_of(t);
  if (w.exited != 0) fail(t, site, "a warp's common instruction after some of its lanes have exited");
  if (w.joined == 0) {
    w.collective = collective;
    w.site = site;
  } else if (collective != w.collective || !same_site(site, w.site)) {
    fail(t, site, "a warp's common instruction, while other lanes are at the one of " + text_of(w.site));
  }
  w.operands[t.lane()] = operands;
  w.joined |= t.bit();
  if (w.joined != kAllLanes) {
    wait(nullptr, "waiting for the lanes of its warp", site);
    return;
  }
  perform(w);
  w.joined = 0;
  w.ready = kAllLanes;
  ++progress_;
  if (random_() % 16 == 0) yield();
}

void Machine::perform(Warp& w) {
  switch (w.collective) {
    case Collective::kSyncWarp: {
      ++w.epoch;
      if (w.block->async == nullptr) break;
      std::vector<Thread*> lanes;
      for (int lane = 0; lane < kLanes; ++lane) lanes.push_back(&w.block->threads[w.first_thread + lane]);
      meet(lanes);
      break;
    }
    case Collective::kBroadcast:
      for (const Operands& lane : w.operands) *lane.r = w.operands[0].address;
      break;
    case Collective::kStoreMatrix:
      report_.load_matrix_turns = std::max(report_.load_matrix_turns, turns(w.operands));
      for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t row[4];
        for (int i = 0; i < 4; ++i) row[i] = w.operands[lane % 8 * 4 + i].a[lane / 8];
        Thread& t = w.block->threads[w.first_thread + lane];
        const uint32_t address = w.operands[lane].address;
        check_shared(t, address, sizeof row, sizeof row, w.site);
        note_write(t, address, sizeof row, w.site);
        std::memcpy(w.block->shared.data() + (address - kSharedBase), row, sizeof row);
      }
      break;
    case Collective::kBallot: {
      uint32_t ballot = 0;
      for (int lane = 0; lane < kLanes; ++lane) ballot |= static_cast<uint32_t>(w.operands[lane].flag) << lane;
      for (const Operands& lane : w.operands) *lane.r = ballot;
      break;
    }
    case Collective::kLoadMatrix:
    case Collective::kLoadMatrixTransposed: {
      uint16_t rows[kLanes][8];
      for (int lane = 0; lane < kLanes; ++lane) {
        Thread& t = w.block->threads[w.first_thread + lane];
        const uint32_t address = w.operands[lane].address;
        check_shared(t, address, sizeof rows[lane], sizeof rows[lane], w.site);
        note_read(t, address, sizeof rows[lane], w.site);
        std::memcpy(rows[lane], w.block->shared.data() + (address - kSharedBase), sizeof rows[lane]);
      }
      report_.load_matrix_turns = std::max(report_.load_matrix_turns, turns(w.operands));
      transfer_matrices(rows, w.collective == Collective::kLoadMatrixTransposed, w.operands);
      break;
    }
    case Collective::kMultiplyAddBFloat16:
      multiply_add_fragments<BFloat16>(w.operands);
      ++report_.mma;
      break;
    case Collective::kMultiplyAddFloat16:
      multiply_add_fragments<Float16>(w.operands);
      ++report_.mma;
      break;
    case Collective::kMultiplyAddTensorFloat32:
      multiply_add_tf32_fragments(w.operands);
      ++report_.mma;
      break;
  }
}

// ---------------------------------------------------------------------------------------------- machine.h's names

Report run(int blocks, int threads, int dynamic_shared_bytes, const std::vector<Range>& global, const Options& options,
           const std::function<void()>& kernel) {
  return Machine(blocks, threads, dynamic_shared_bytes, global, options, kernel).run();
}

int thread_index() { return running().thread_index(); }
int block_index() { return running().block_index(); }
int block_count() { return running().block_count(); }
uint32_t dynamic_shared() { return kSharedBase; }
void sync_block(Site site) { running().sync_block(site); }
void sync_warp(Site site) { running().join_collective(Collective::kSyncWarp, {}, site); }

uint32_t warp_ballot(bool flag, Site site) {
  uint32_t ballot;
  Operands operands{};
  operands.r = &ballot;
  operands.flag = flag;
  running().join_collective(Collective::kBallot, operands, site);
  return ballot;
}

void trap(Site site) { running().trap(site); }
void pause(Site site) { running().pause(site); }

void read_global(const void* p, size_t bytes, size_t alignment, Site site) {
  running().read_global(p, bytes, alignment, site);
}

bool write_global(const void* p, size_t bytes, size_t alignment, Site site) {
  return running().write_global(p, bytes, alignment, site);
}

void load_shared(uint32_t address, void* target, size_t bytes, Site site) {
  running().load_shared(address, target, bytes, site);
}

void store_shared(uint32_t address, const void* source, size_t bytes, Site site) {
  running().store_shared(address, source, bytes, site);
}

void copy_async(uint32_t address, const void* source, int size, int bytes, Site site) {
  running().copy_async(address, source, size, bytes, site);
}

void copy_async_commit() { running().copy_async_commit(); }
void copy_async_wait(int pending, Site site) { running().copy_async_wait(static_cast<size_t>(pending), site); }

uint32_t atomic_add(uint32_t* p, uint32_t value, bool acquire_release, Site site) {
  return running().atomic_add(p, value, acquire_release, site);
}

void store_release(uint32_t* p, uint32_t value, Site site) { running().store_release(p, value, site); }
uint32_t load_acquire(const uint32_t* p, Site site) { return running().load_acquire(p, site); }

void load_matrix(uint32_t* r, uint32_t row_address, bool transposed, Site site) {
  Operands operands{};
  operands.r = r;
  operands.address = row_address;
  running().join_collective(transposed ? Collective::kLoadMatrixTransposed : Collective::kLoadMatrix, operands, site);
}

void multiply_add(Element element, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  Operands operands{};
  operands.d = d;
  operands.a = a;
  operands.b[0] = b0;
  operands.b[1] = b1;
  const auto collective = element == Element::kBFloat16  ? Collective::kMultiplyAddBFloat16
                          : element == Element::kFloat16 ? Collective::kMultiplyAddFloat16
                                                         : Collective::kMultiplyAddTensorFloat32;
  running().join_collective(collective, operands, site);
}

}  // namespace lk::emu
