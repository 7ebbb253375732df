// glibc's checked longjmp takes a jump to another stack for an error.
#undef _FORTIFY_SOURCE

#include "machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lk::emu {
namespace {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;
constexpr uint32_t kSharedBase = 1024;  // not 0, so that a forgotten dynamic_shared() is out of bounds
constexpr size_t kCopyBytes = 16;
constexpr unsigned char kPoison = 0xFF;  // NaN in every format
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // red zones between variables
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr int kFruitlessRounds = 1000;  // in which all who poll have polled and nothing has changed: a deadlock

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string text_of(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

template <class... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// ------------------------------------------------------------------------------------------------------ fibers

// Stacks of equal size, each above a page that must not be touched.
class Stacks {
 public:
  explicit Stacks(int count) : guard_(sysconf(_SC_PAGESIZE)), bytes_(count * stride()) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    for (int i = 0; i < count; ++i) mprotect(memory_ + i * stride(), guard_, PROT_NONE);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { munmap(memory_, bytes_); }

  unsigned char* operator[](int i) const { return memory_ + i * stride() + guard_; }

 private:
  size_t stride() const { return guard_ + kStackBytes; }

  size_t guard_, bytes_;
  unsigned char* memory_;
};

// A flow of control that others switch to. Only the first entry costs system calls.
class Fiber {
 public:
  // The next switch here calls `entry`, which must not return.
  void prepare(unsigned char* stack, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);  // what an abandoned fiber left
#endif
    getcontext(&first_);
    first_.uc_stack.ss_sp = stack;
    first_.uc_stack.ss_size = kStackBytes;
    first_.uc_link = nullptr;
    makecontext(&first_, entry, 0);
    is_new_ = true;
    bottom_ = stack;
    bytes_ = kStackBytes;
  }

  void switch_to(Fiber& to) {
    announce(to, &fake_stack_);
    if (_setjmp(context_) == 0) to.enter();
    arrived();
  }

  [[noreturn]] void leave_for(Fiber& to) {
    announce(to, nullptr);
    to.enter();
  }

  // To be called first by a new fiber's entry. `from` is who has started it.
  void arrived_from([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (from.bottom_ == nullptr) {
      from.bottom_ = bottom;
      from.bytes_ = bytes;
    }
#endif
  }

 private:
  [[noreturn]] void enter() {
    if (is_new_) {
      is_new_ = false;
      setcontext(&first_);
    }
    _longjmp(context_, 1);
  }

  static void announce([[maybe_unused]] const Fiber& to, [[maybe_unused]] void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, to.bottom_, to.bytes_);
#endif
  }

  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  jmp_buf context_;
  ucontext_t first_;
  bool is_new_ = false;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
};

// --------------------------------------------------------------------------------------- order between accesses

// How much of other threads' work is known to have been done before. A block's epoch ends with a block barrier.
struct Clock {
  std::vector<uint32_t> epoch;        // per block: what its threads did in earlier epochs is known
  std::map<int, uint32_t> published;  // per thread: what it did itself up to so many releases is known

  explicit Clock(int blocks) : epoch(blocks, 0) {}

  void join(const Clock& other) {
    for (size_t i = 0; i < epoch.size(); ++i) epoch[i] = std::max(epoch[i], other.epoch[i]);
    for (const auto& [thread, count] : other.published) {
      uint32_t& mine = published[thread];
      mine = std::max(mine, count);
    }
  }
};

// The last write to a byte of global memory.
struct GlobalWrite {
  int32_t thread;     // of the whole launch
  uint32_t epoch;     // of its block; 0: not written in this launch
  uint32_t releases;  // that the thread had done before
  bool atomic;
};

struct GlobalRange {
  uintptr_t begin, end;
  std::vector<GlobalWrite> writes;  // per byte; empty until the first one
};

constexpr int kNobody = -1, kSeveral = -2;

// Accesses to a word of shared memory since it was last ordered.
struct SharedWord {
  uint32_t write_epoch = 0, write_warp_epoch = 0;
  uint32_t read_epoch = 0, read_warp_epoch = 0;
  int16_t writer = kNobody;
  int16_t reader = kNobody, reader_warp = kNobody;
  int16_t copier = kNobody;  // whose asynchronous copy is under way
  Site write_site, read_site;
};

// ------------------------------------------------------------------------------------------ threads and blocks

struct AsyncCopy {
  uint32_t address;
  const void* source;
  int bytes;
  Site site;
};

struct Block;

constexpr const char *kRunning = "running", *kInBarrier = "in sync_block", *kExited = "exited";  // compared as pointers

struct Thread {
  Block* block;
  int index;
  Fiber fiber;
  const char* doing;  // why it does not run
  Site site;
  std::vector<AsyncCopy> copies;  // under way, oldest first: those of the committed groups, then the open ones
  std::vector<size_t> groups;     // copies in each committed group
  size_t open_copies;
  std::optional<Clock> acquired;  // since the last block barrier
  uint32_t releases;
  const void* polled;  // what load_acquire has read last

  int lane() const { return index % kLanes; }
  uint32_t bit() const { return 1u << lane(); }
};

enum class Collective {
  kSyncWarp,
  kBallot,
  kLoadMatrix,
  kLoadMatrixTransposed,
  kMultiplyAddBFloat16,
  kMultiplyAddFloat16,
  kMultiplyAddTensorFloat32
};

// One lane's part of a collective.
struct Operands {
  uint32_t* r;
  uint32_t address;
  bool flag;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

struct Warp {
  Block* block;
  int first_thread;
  uint32_t ready, polling, stalled, exited;
  uint32_t joined;  // lanes that have arrived at the collective
  Collective collective;
  Site site;
  Operands operands[kLanes];
  uint32_t epoch;  // ends with sync_warp
};

struct Block {
  int index;
  bool running = false;
  uint32_t epoch;
  int at_barrier, exited;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<SharedWord> words;
  std::optional<Clock> known;
  Stacks stacks;

  explicit Block(int thread_count) : threads(thread_count), warps(thread_count / kLanes), stacks(thread_count) {}
};

// ------------------------------------------------------------------------------------------- matrix instructions

void transfer_matrices(const uint16_t (&rows)[kLanes][8], bool transposed, const Operands (&operands)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto* matrix = rows + i * 8;
      const uint32_t low = transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      operands[lane].r[i] = low | high << 16;
    }
  }
}

// Adds a[16, depth] b[depth, 8] to the lanes' accumulators.
template <int kDepth>
void add_product(const float (&a)[16][kDepth], const float (&b)[kDepth][8], const Operands (&operands)[kLanes]) {
  float product[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < 8; ++n) product[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) operands[lane].d[i] += product[group + i / 2 * 8][pair + i % 2];
  }
}

template <class Format>
void multiply_add_fragments(const Operands (&operands)[kLanes]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& o = operands[lane];
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* target = &a[group + i % 2 * 8][pair + i / 2 * 8];
      target[0] = Format::low(o.a[i]);
      target[1] = Format::high(o.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = Format::low(o.b[i]);
      b[pair + i * 8 + 1][group] = Format::high(o.b[i]);
    }
  }
  add_product(a, b, operands);
}

// Fragments of mma.m16n8k8. The tensor cores do not see the bits of an operand that tf32 has not.
void multiply_add_tf32_fragments(const Operands (&operands)[kLanes]) {
  float a[16][8], b[8][8];
  const auto seen = [](uint32_t bits) { return float_of(bits & ~0x1FFFu); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& o = operands[lane];
    const int group = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][k + i / 2 * 4] = seen(o.a[i]);
    for (int i = 0; i < 2; ++i) b[k + i * 4][group] = seen(o.b[i]);
  }
  add_product(a, b, operands);
}

// ------------------------------------------------------------------------------------------------- the machine

class Machine {
 public:
  Machine(int blocks, int threads, int dynamic_shared_bytes, const std::vector<Range>& global, const Options& options,
          const std::function<void()>& kernel);
  ~Machine();

  Report run();

  int thread_index() const { return current_->index; }
  int block_index() const { return current_->block->index; }
  int block_count() const { return block_count_; }

  void sync_block(Site site);
  void join_collective(Collective collective, const Operands& operands, Site site);
  void pause(Site site);
  [[noreturn]] void trap(Site site) const { fail(*current_, site, "trap"); }

  void read_global(const void* p, size_t bytes, size_t alignment, Site site);
  bool write_global(const void* p, size_t bytes, size_t alignment, Site site);
  void load_shared(uint32_t address, void* target, size_t bytes, Site site);
  void store_shared(uint32_t address, const void* source, size_t bytes, Site site);

  void copy_async(uint32_t address, const void* source, int bytes, Site site);
  void copy_async_commit();
  void copy_async_wait(size_t pending, Site site);

  uint32_t atomic_add(uint32_t* p, uint32_t value, bool acquire_release, Site site);
  void store_release(uint32_t* p, uint32_t value, Site site);
  uint32_t load_acquire(const uint32_t* p, Site site);

 private:
  static void enter_thread();
  void start(Block& block);
  void exit_thread();
  Warp* pick();
  bool wake(uint32_t Warp::*lanes);
  void step(Warp& warp);
  void yield();
  void wait(uint32_t Warp::*lanes, const char* doing, Site site);
  void complete_barrier(Block& block);
  void perform(Warp& warp);
  bool is_dropped(std::vector<std::string>& names, std::vector<Site>& sites, int dropped, Site site);

  [[noreturn]] void fail(const Thread& thread, const Site& site, const std::string& what) const;
  [[noreturn]] void fail_deadlock() const;

  static Warp& warp_of(const Thread& t) { return t.block->warps[t.index / kLanes]; }
  int id_of(const Thread& t) const { return t.block->index * threads_ + t.index; }

  void check_shared(const Thread& t, uint32_t address, size_t bytes, size_t alignment, const Site& site) const;
  template <class F>
  void for_words(Thread& t, uint32_t address, size_t bytes, const Site& site, const F& f);
  void note_read(Thread& t, uint32_t address, size_t bytes, const Site& site);
  void note_write(Thread& t, uint32_t address, size_t bytes, const Site& site);
  void check_written_before(const Thread& t, const SharedWord& word, uint32_t address, const char* access,
                            const Site& site) const;

  GlobalRange& range_of(const Thread& t, const void* p, size_t bytes, size_t alignment, const char* access,
                        const Site& site);
  bool is_known(const GlobalWrite& write, const Thread& t) const;
  void check_known(const GlobalRange& range, const Thread& t, const void* p, size_t bytes, bool atomic,
                   const char* access, const Site& site) const;
  void record_write(GlobalRange& range, const Thread& t, const void* p, size_t bytes, bool atomic);
  void acquire(const void* flag);
  void publish(const void* flag, bool pass_on);
  void stall(Site site);

  const int block_count_, threads_;
  const size_t shared_bytes_;
  std::vector<GlobalRange> ranges_;
  size_t last_range_ = 0;
  std::unordered_map<uintptr_t, Clock> flags_;  // what a thread learns that acquires the word
  const Options options_;
  const std::function<void()>& kernel_;

  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Warp*> warps_;
  Fiber scheduler_;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
  uint64_t progress_ = 0;  // changes that may end somebody's polling
  std::vector<Site> barrier_sites_, async_wait_sites_, global_store_sites_;
  Report report_;
};

thread_local Machine* machine = nullptr;

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
  std::vector<int> order(block_count_);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  auto next = order.begin();
  const auto start_next = [&](Block& block) {
    if (next == order.end()) return;
    block.index = *next++;
    start(block);
  };
  for (int i = 0; i < std::min(options_.resident_blocks, block_count_); ++i) {
    blocks_.push_back(std::make_unique<Block>(threads_));
    for (Warp& w : blocks_.back()->warps) warps_.push_back(&w);
    start_next(*blocks_.back());
  }

  int fruitless_rounds = 0;
  uint64_t progress_before = 0;
  while (std::any_of(blocks_.begin(), blocks_.end(), [](const auto& b) { return b->running; })) {
    Warp* warp = pick();
    if (warp != nullptr) {
      step(*warp);
      if (error_) std::rethrow_exception(error_);
      Block& block = *warp->block;
      if (block.exited == threads_) {
        block.running = false;
        start_next(block);
      }
    } else if (!wake(&Warp::stalled)) {
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
    case Collective::kSyncWarp:
      ++w.epoch;
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

// ---- shared memory

void Machine::check_shared(const Thread& t, uint32_t address, size_t bytes, size_t alignment, const Site& site) const {
  if (address < kSharedBase || address - kSharedBase + bytes > shared_bytes_) {
    fail(t, site,
         concatenate(bytes, " bytes at shared address ", address, " are out of bounds: the block has ", shared_bytes_,
                     " bytes from address ", kSharedBase, " on"));
  }
  if (address % alignment != 0) fail(t, site, concatenate("misaligned shared address ", address));
}

// f(word, its address) for the words of an access, none of which may be the target of a copy under way.
template <class F>
void Machine::for_words(Thread& t, uint32_t address, size_t bytes, const Site& site, const F& f) {
  for (uint32_t at = address; at < address + bytes; at += 4) {
    SharedWord& word = t.block->words[(at - kSharedBase) / 4];
    if (word.copier != kNobody) {
      fail(t, site,
           concatenate("shared-memory race: touches address ", at, " while the asynchronous copy of thread ",
                       word.copier, ", ", text_of(word.write_site), ", is under way"));
    }
    f(word, at);
  }
}

void Machine::check_written_before(const Thread& t, const SharedWord& word, uint32_t address, const char* access,
                                   const Site& site) const {
  if (word.write_epoch != t.block->epoch || word.writer == t.index) return;
  if (word.writer / kLanes == t.index / kLanes && word.write_warp_epoch < warp_of(t).epoch) return;
  fail(t, site,
       concatenate("shared-memory race: ", access, " address ", address, ", which thread ", word.writer, ", ",
                   text_of(word.write_site), ", has written since the last barrier"));
}

void Machine::note_read(Thread& t, uint32_t address, size_t bytes, const Site& site) {
  const uint32_t epoch = t.block->epoch, warp_epoch = warp_of(t).epoch;
  const auto warp = static_cast<int16_t>(t.index / kLanes);
  for_words(t, address, bytes, site, [&](SharedWord& word, uint32_t at) {
    check_written_before(t, word, at, "reads", site);
    if (word.read_epoch != epoch || (word.reader_warp == warp && word.read_warp_epoch != warp_epoch)) {
      // Earlier readers are ordered before any later access of this warp, and the new one stands for them in others'.
      word.reader = static_cast<int16_t>(t.index);
      word.reader_warp = warp;
    } else if (word.reader_warp != warp) {
      word.reader = word.reader_warp = kSeveral;
    } else if (word.reader != t.index) {
      word.reader = kSeveral;
    }
    word.read_epoch = epoch;
    word.read_warp_epoch = warp_epoch;
    word.read_site = site;
  });
}

void Machine::note_write(Thread& t, uint32_t address, size_t bytes, const Site& site) {
  const uint32_t epoch = t.block->epoch, warp_epoch = warp_of(t).epoch;
  const int warp = t.index / kLanes;
  for_words(t, address, bytes, site, [&](SharedWord& word, uint32_t at) {
    check_written_before(t, word, at, "overwrites", site);
    const bool is_read = word.read_epoch == epoch && word.reader != t.index;
    if (is_read && !(word.reader_warp == warp && word.read_warp_epoch < warp_epoch)) {
      const auto reader = word.reader == kSeveral ? "several threads" : concatenate("thread ", word.reader);
      fail(t, site,
           concatenate("shared-memory race: overwrites address ", at, ", which ", reader, ", last at ",
                       text_of(word.read_site), ", read since the last barrier"));
    }
    word.writer = static_cast<int16_t>(t.index);
    word.write_epoch = epoch;
    word.write_warp_epoch = warp_epoch;
    word.write_site = site;
  });
}

void Machine::load_shared(uint32_t address, void* target, size_t bytes, Site site) {
  Thread& t = *current_;
  check_shared(t, address, bytes, bytes, site);
  note_read(t, address, bytes, site);
  std::memcpy(target, t.block->shared.data() + (address - kSharedBase), bytes);
}

void Machine::store_shared(uint32_t address, const void* source, size_t bytes, Site site) {
  Thread& t = *current_;
  check_shared(t, address, bytes, bytes, site);
  note_write(t, address, bytes, site);
  std::memcpy(t.block->shared.data() + (address - kSharedBase), source, bytes);
}

// ---- asynchronous copies

void Machine::copy_async(uint32_t address, const void* source, int bytes, Site site) {
  Thread& t = *current_;
  if (options_.faults.ignore_copy_size) bytes = kCopyBytes;
  if (bytes < 0 || bytes > static_cast<int>(kCopyBytes)) fail(t, site, concatenate("copies ", bytes, " of 16 bytes"));
  check_shared(t, address, kCopyBytes, kCopyBytes, site);
  if (bytes > 0) {
    GlobalRange& range = range_of(t, source, bytes, kCopyBytes, "copies", site);
    check_known(range, t, source, bytes, false, "unordered read of", site);
  }
  note_write(t, address, kCopyBytes, site);
  for (uint32_t at = address; at < address + kCopyBytes; at += 4) {
    t.block->words[(at - kSharedBase) / 4].copier = static_cast<int16_t>(t.index);
  }
  std::memset(t.block->shared.data() + (address - kSharedBase), kPoison, kCopyBytes);
  t.copies.push_back({address, source, bytes, site});
  ++t.open_copies;
  ++report_.async_copies;
}

void Machine::copy_async_commit() {
  current_->groups.push_back(current_->open_copies);
  current_->open_copies = 0;
}

void Machine::copy_async_wait(size_t pending, Site site) {
  if (is_dropped(report_.async_wait_sites, async_wait_sites_, options_.faults.drop_async_wait, site)) return;
  Thread& t = *current_;
  if (t.groups.size() <= pending) return;
  const auto last_group = t.groups.end() - static_cast<ptrdiff_t>(pending);
  const auto last_copy =
      t.copies.begin() + static_cast<ptrdiff_t>(std::accumulate(t.groups.begin(), last_group, size_t{0}));
  for (auto copy = t.copies.begin(); copy != last_copy; ++copy) {
    for (uint32_t at = copy->address; at < copy->address + kCopyBytes; at += 4) {
      t.block->words[(at - kSharedBase) / 4].copier = kNobody;
    }
    note_write(t, copy->address, kCopyBytes, copy->site);
    unsigned char* target = t.block->shared.data() + (copy->address - kSharedBase);
    std::memset(target, 0, kCopyBytes);
    if (copy->bytes > 0) std::memcpy(target, copy->source, static_cast<size_t>(copy->bytes));
  }
  t.copies.erase(t.copies.begin(), last_copy);
  t.groups.erase(t.groups.begin(), last_group);
}

// ---- global memory

GlobalRange& Machine::range_of(const Thread& t, const void* p, size_t bytes, size_t alignment, const char* access,
                               const Site& site) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  if (begin % alignment != 0) fail(t, site, concatenate(access, " ", bytes, " bytes at the misaligned address ", p));
  const auto holds = [&](const GlobalRange& r) { return begin >= r.begin && begin < r.end && bytes <= r.end - begin; };
  if (last_range_ < ranges_.size() && holds(ranges_[last_range_])) return ranges_[last_range_];
  const auto found = std::find_if(ranges_.begin(), ranges_.end(), holds);
  if (found != ranges_.end()) {
    last_range_ = static_cast<size_t>(found - ranges_.begin());
    return *found;
  }
  std::string nearest = "no array is registered";
  uintptr_t least = ~uintptr_t{0};
  for (const GlobalRange& r : ranges_) {
    const uintptr_t distance = begin < r.begin ? r.begin - begin : begin - r.begin;
    if (distance > least) continue;
    least = distance;
    nearest = concatenate(distance, " bytes ", begin < r.begin ? "before" : "after", " the begin of an array of ",
                          r.end - r.begin, " bytes");
  }
  fail(t, site, concatenate(access, " ", bytes, " bytes of global memory at ", p, ", out of bounds: ", nearest));
}

bool Machine::is_known(const GlobalWrite& write, const Thread& t) const {
  if (write.thread / kLanes == id_of(t) / kLanes) return true;
  const int block = write.thread / threads_;
  if (block == t.block->index && write.epoch < t.block->epoch) return true;
  const auto holds = [&](const Clock& clock) {
    if (write.epoch < clock.epoch[block]) return true;
    const auto found = clock.published.find(write.thread);
    return found != clock.published.end() && write.releases < found->second;
  };
  return holds(*t.block->known) || (t.acquired && holds(*t.acquired));
}

// Every byte must have been written by somebody whose write is ordered before; two atomic accesses need no order.
void Machine::check_known(const GlobalRange& range, const Thread& t, const void* p, size_t bytes, bool atomic,
                          const char* access, const Site& site) const {
  if (range.writes.empty()) return;
  const size_t first = reinterpret_cast<uintptr_t>(p) - range.begin;
  for (size_t i = first; i < first + bytes; ++i) {
    const GlobalWrite& write = range.writes[i];
    if (write.epoch == 0 || (atomic && write.atomic) || is_known(write, t)) continue;
    fail(t, site,
         concatenate(access, " global memory at ", p, ", byte ", i, " of its array, last written by block ",
                     write.thread / threads_, ", thread ", write.thread % threads_));
  }
}

void Machine::record_write(GlobalRange& range, const Thread& t, const void* p, size_t bytes, bool atomic) {
  if (range.writes.empty()) range.writes.resize(range.end - range.begin, GlobalWrite{});
  const size_t first = reinterpret_cast<uintptr_t>(p) - range.begin;
  std::fill_n(range.writes.begin() + static_cast<ptrdiff_t>(first), bytes,
              GlobalWrite{id_of(t), t.block->epoch, t.releases, atomic});
  ++progress_;
}

void Machine::read_global(const void* p, size_t bytes, size_t alignment, Site site) {
  const Thread& t = *current_;
  const GlobalRange& range = range_of(t, p, bytes, alignment, "reads", site);
  check_known(range, t, p, bytes, false, "unordered read of", site);
}

bool Machine::write_global(const void* p, size_t bytes, size_t alignment, Site site) {
  if (is_dropped(report_.global_store_sites, global_store_sites_, options_.faults.drop_global_store, site))
    return false;
  const Thread& t = *current_;
  GlobalRange& range = range_of(t, p, bytes, alignment, "writes", site);
  check_known(range, t, p, bytes, false, "unordered write of", site);
  record_write(range, t, p, bytes, false);
  if (flags_.empty()) return true;
  const auto begin = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t word = begin & ~uintptr_t{3}; word < begin + bytes; word += 4) flags_.erase(word);
  return true;
}

// ---- flags

void Machine::acquire(const void* flag) {
  const auto found = flags_.find(reinterpret_cast<uintptr_t>(flag));
  if (found == flags_.end()) return;
  if (!current_->acquired) current_->acquired.emplace(block_count_);
  current_->acquired->join(found->second);
}

// A store forgets what earlier releases published through the flag, an atomic operation passes it on.
void Machine::publish(const void* flag, bool pass_on) {
  const auto address = reinterpret_cast<uintptr_t>(flag);
  if (!pass_on) flags_.erase(address);
  if (options_.faults.drop_release_order) return;
  Thread& t = *current_;
  Clock& clock = flags_.try_emplace(address, block_count_).first->second;
  clock.join(*t.block->known);
  if (t.acquired) clock.join(*t.acquired);
  const uint32_t epoch = t.block->epoch - (options_.faults.early_release ? 1 : 0);
  clock.epoch[t.block->index] = std::max(clock.epoch[t.block->index], epoch);
  clock.published[id_of(t)] = ++t.releases;
}

void Machine::stall(Site site) {
  if (options_.stall_release) wait(&Warp::stalled, "about to release", site);
}

uint32_t Machine::atomic_add(uint32_t* p, uint32_t value, bool acquire_release, Site site) {
  if (acquire_release) stall(site);
  const Thread& t = *current_;
  GlobalRange& range = range_of(t, p, sizeof *p, sizeof *p, "adds to", site);
  check_known(range, t, p, sizeof *p, true, "unordered atomic access to", site);
  record_write(range, t, p, sizeof *p, true);
  const uint32_t old = *p;
  *p = old + value;
  if (acquire_release) {
    acquire(p);
    publish(p, true);
  }
  return old;
}

void Machine::store_release(uint32_t* p, uint32_t value, Site site) {
  stall(site);
  const Thread& t = *current_;
  GlobalRange& range = range_of(t, p, sizeof *p, sizeof *p, "writes", site);
  check_known(range, t, p, sizeof *p, true, "unordered atomic access to", site);
  record_write(range, t, p, sizeof *p, true);
  *p = value;
  publish(p, false);
}

uint32_t Machine::load_acquire(const uint32_t* p, Site site) {
  Thread& t = *current_;
  if (t.polled == p) wait(&Warp::polling, "polling", site);  // a loop without pause() must let others run, too
  t.polled = p;
  const GlobalRange& range = range_of(t, p, sizeof *p, sizeof *p, "reads", site);
  check_known(range, t, p, sizeof *p, true, "unordered atomic access to", site);
  if (!options_.faults.drop_acquire) acquire(p);
  return *p;
}

}  // namespace

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

void copy_async(uint32_t address, const void* source, int bytes, Site site) {
  running().copy_async(address, source, bytes, site);
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
