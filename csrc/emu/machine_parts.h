// What a launch consists of, and the machine that runs it. Within the emulator only; kernels see machine.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <unordered_map>

#include "async_parts.h"
#include "fiber.h"
#include "machine.h"

namespace lk::emu {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;
constexpr uint32_t kSharedBase = 1024;   // not 0, so that a forgotten dynamic_shared() is out of bounds
constexpr int kRankShift = 24;           // of an address of a cluster, above the bytes that a block can have
constexpr unsigned char kPoison = 0xFF;  // NaN in every format

inline bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

inline std::string text_of(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

template <class... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

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

// The last write to a byte of global memory. By clocks, the thread is an agent, and the epoch its count.
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
  int size, bytes;  // of the target; of the source
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
  const void* polled;                  // what load_acquire has read last
  std::unique_ptr<AsyncThread> async;  // null: not by clocks

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
  kMultiplyAddTensorFloat32,
  kBroadcast,
  kStoreMatrix
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
  std::unique_ptr<AsyncBlock> async;  // null: not by clocks
  std::vector<Block*> cluster;        // by rank
  int rank = 0;

  explicit Block(int thread_count) : threads(thread_count), warps(thread_count / kLanes), stacks(thread_count) {}
};

// ------------------------------------------------------------------------------------------------- the machine

class Machine {
 public:
  Machine(int blocks, int threads, int dynamic_shared_bytes, const std::vector<Range>& global, const Options& options,
          const std::function<void()>& kernel);
  ~Machine();

  Report run();

  int thread_index() const { return current_->index; }
  int block_index() const { return options_.first_block + current_->block->index; }
  int block_count() const { return block_count_; }

  void sync_block(Site site);
  void join_collective(Collective collective, const Operands& operands, Site site);
  void pause(Site site);
  [[noreturn]] void trap(Site site) const { fail(*current_, site, "trap"); }

  void read_global(const void* p, size_t bytes, size_t alignment, Site site);
  bool write_global(const void* p, size_t bytes, size_t alignment, Site site);
  void load_shared(uint32_t address, void* target, size_t bytes, Site site);
  void store_shared(uint32_t address, const void* source, size_t bytes, Site site);

  void copy_async(uint32_t address, const void* source, int size, int bytes, Site site);
  void copy_async_commit();
  void copy_async_wait(size_t pending, Site site);

  uint32_t atomic_add(uint32_t* p, uint32_t value, bool acquire_release, Site site);
  void store_release(uint32_t* p, uint32_t value, Site site);
  uint32_t load_acquire(const uint32_t* p, Site site);

  void sync_named(int barrier, int threads, Site site);
  void barrier_init(uint32_t barrier, int arrivals, Site site);
  void barrier_init_done(Site site);
  void barrier_arrive(uint32_t barrier, int bytes, Site site);
  void barrier_wait(uint32_t barrier, uint32_t parity, bool for_cluster, Site site);
  void fence_proxy_async(bool shared_only, Site site);
  void load_box(uint32_t address, const BoxMap& map, int column, int row, uint32_t barrier, uint32_t ranks, Site site);

  int cluster_rank() const { return current_->block->rank; }
  uint32_t cluster_address(uint32_t address, uint32_t rank, Site site) const;
  void sync_cluster(Site site);
  void store_cluster(uint32_t address, const void* source, size_t bytes, Site site);
  void barrier_arrive_cluster(uint32_t barrier, bool releases, Site site);
  void store_box(const BoxMap& map, int column, int row, uint32_t address, Site site);
  void store_commit();
  void store_wait_read(size_t pending, Site site);
  void multiply_fence(Site site);
  void multiply_add_async(const ProductOf& product, float* d, Site site);
  void multiply_commit();
  void multiply_wait(size_t pending, Site site);

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
  int agents() const { return options_.by_clocks ? kAgents : threads_; }  // numbered per block, in GlobalWrite

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

  // By clocks: order.cpp, boxes.cpp and products.cpp.
  AsyncThread& async_of(Thread& t, const Site& site) const;
  int new_agent(Block& block) const;
  static void release(std::vector<Thread*>& waiting);
  static void meet(std::vector<Thread*>& threads);
  template <class F>
  void for_clocked_words(Block& block, uint32_t address, size_t bytes, const F& f);
  void check_under_way(const Thread& t, const ClockedWord& word, uint32_t at, const Site& site) const;
  void clocked_read(Thread& t, const VectorClock& clock, uint32_t address, size_t bytes, int agent, uint32_t count,
                    bool by_engine, Site site);
  void clocked_write(Thread& t, Block& block, const VectorClock& clock, uint32_t address, size_t bytes, int agent,
                     uint32_t count, bool by_engine, Site site);
  void check_shown(const GlobalRange& range, const Thread& t, const void* p, size_t bytes, const Site& site) const;
  MemoryBarrier& barrier_at(const Thread& t, const Block& block, uint32_t address, const Site& site) const;
  void count_arrival(Thread& t, MemoryBarrier& barrier);
  Block& reach(Thread& t, int rank, const Site& site) const;
  Block& block_of(Thread& t, uint32_t& cluster_address, const Site& site) const;
  void arrive(MemoryBarrier& barrier);
  bool deliver_box();
  void deliver(Block& block, MemoryBarrier& barrier);
  void store_boxes(Block& block, const std::vector<BoxCopy>& boxes);
  void check_box(const Thread& t, const BoxMap& map, uint32_t address, const Site& site) const;
  void compute(Block& block, int warpgroup, Product& product);
  void finish_thread(Thread& t);

  const int block_count_, threads_;
  const size_t shared_bytes_;
  std::vector<GlobalRange> ranges_;
  size_t last_range_ = 0;
  std::unordered_map<uintptr_t, Clock> flags_;  // what a thread learns that acquires the word
  std::unordered_map<uintptr_t, VectorClock> clocked_flags_;
  const Options options_;
  const std::function<void()>& kernel_;

  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Warp*> warps_;
  Fiber scheduler_;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
  uint64_t progress_ = 0;  // changes that may end somebody's polling
  std::vector<Site> barrier_sites_, async_wait_sites_, global_store_sites_, arrival_sites_, barrier_wait_sites_,
      proxy_fence_sites_, multiply_wait_sites_, multiply_fence_sites_, store_wait_sites_;
  Report report_;
};

// The one whose kernel calls.
Machine& running();

}  // namespace lk::emu
