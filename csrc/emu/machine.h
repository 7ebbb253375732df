// The emulator of the machine that ptx/core.h describes: the kernels' own sources run, and are checked, without a GPU.
// Test only, never shipped. ptx/ beside this has the twins of csrc/ptx/: the same names and meaning for a host
// compiler. async.h has what sm_90 adds.
//
// A launch throws std::runtime_error where a kernel
//   - leaves the registered arrays or its shared memory, or uses a misaligned address;
//   - touches a shared word that a barrier does not order against another thread's access; an asynchronous copy is one
//     from its issue until its wait;
//   - reads or overwrites global memory that another thread wrote, without a barrier or a release and acquire between;
//   - calls trap();
//   - waits for what cannot come: a deadlock, an exited thread, a warp whose lanes are at different instructions.
// Not seen: a global read that is unordered with a *later* write (arrays that the caller poisons show it), and global
// accesses of two lanes of one warp, which count as ordered. A release that publishes other lanes' writes by force of
// sync_warp alone is taken for an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace lk::emu {

using Site = std::source_location;

// Memory that a kernel may touch.
struct Range {
  const void* begin;
  size_t bytes;
};

// What a mutated launch leaves out. Call sites count from 0 in the order of their first use.
struct Faults {
  int drop_barrier = -1;
  int drop_async_wait = -1;
  int drop_global_store = -1;
  bool drop_acquire = false;        // load_acquire orders nothing
  bool drop_release_order = false;  // store_release and atomic_add_acquire_release publish nothing
  bool early_release = false;       // they publish what they would before the last barrier
  bool ignore_copy_size = false;    // asynchronous copies are always whole: no tail is zero

  // With Options::by_clocks. The barriers of drop_barrier are the named ones, too.
  int drop_arrival = -1;
  int drop_barrier_wait = -1;
  int drop_proxy_fence = -1;
  int drop_multiply_wait = -1;
  int drop_multiply_fence = -1;
  int drop_store_wait = -1;
  bool ignore_expected_bytes = false;  // barriers count arrivals alone
};

struct Options {
  uint64_t seed = 0;        // of the order in which blocks start and warps take turns
  int resident_blocks = 4;  // blocks that run at the same time
  Faults faults = {};
  int first_block = 0;         // the index of the first: a launch's blocks in front of it are not run
  bool stall_release = false;  // a releasing thread stops before its store until nobody else can go on
  int cluster = 1;             // blocks of a cluster: they start together. For launches by clocks
  bool by_clocks = false;      // order is what a clock per thread says (async.h), not block barriers
};

struct Report {
  uint64_t barriers = 0;        // block barriers completed
  uint64_t mma = 0;             // multiply_add, once per warp
  uint64_t async_copies = 0;    // asynchronous copies, once per thread
  uint64_t bytes_read = 0;      // of global memory, by loads and asynchronous copies: as often as they are read
  size_t groups_under_way = 0;  // of a thread's copies, at most, when it has waited: how far loads are ahead of use
  int load_matrix_turns = 0;    // that a load_matrix took for 8x8 elements, at most: 1 where no bank is asked twice
  std::vector<std::string> barrier_sites, async_wait_sites, global_store_sites;  // in Faults' order
  std::vector<std::string> arrival_sites, barrier_wait_sites, proxy_fence_sites, multiply_wait_sites,
      multiply_fence_sites, store_wait_sites;
  uint64_t multiply_adds = 0;  // of warpgroups' products, each by itself
  uint64_t bytes_loaded = 0;   // by copies of boxes, from the matrix
  uint64_t bytes_stored = 0;
};

Report run(int blocks, int threads, int dynamic_shared_bytes, const std::vector<Range>& global, const Options& options,
           const std::function<void()>& kernel);

// `kernel` is called by every thread. Nothing in it may own memory: an error abandons the other threads' stacks.
template <class F>
Report launch(int blocks, int threads, int dynamic_shared_bytes, const std::vector<Range>& global,
              const Options& options, F kernel) {
  return run(blocks, threads, dynamic_shared_bytes, global, options, std::function<void()>(std::move(kernel)));
}

// -------------------------------------------------------------------------------- what the twins below are made of

enum class Element { kBFloat16, kFloat16, kTensorFloat32 };

int thread_index();
int block_index();
int block_count();
uint32_t dynamic_shared();
void sync_block(Site site);
void sync_warp(Site site);
uint32_t warp_ballot(bool flag, Site site);
[[noreturn]] void trap(Site site);
void pause(Site site);

// Checks a plain access to global memory; a write counts as done. Whether it is to be done.
void read_global(const void* p, size_t bytes, size_t alignment, Site site);
bool write_global(const void* p, size_t bytes, size_t alignment, Site site);

void load_shared(uint32_t address, void* target, size_t bytes, Site site);
void store_shared(uint32_t address, const void* source, size_t bytes, Site site);
void copy_async(uint32_t address, const void* source, int size, int bytes, Site site);
void copy_async_commit();
void copy_async_wait(int pending, Site site);

uint32_t atomic_add(uint32_t* p, uint32_t value, bool acquire_release, Site site);
void store_release(uint32_t* p, uint32_t value, Site site);
uint32_t load_acquire(const uint32_t* p, Site site);

void load_matrix(uint32_t* r, uint32_t row_address, bool transposed, Site site);
void multiply_add(Element element, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);

}  // namespace lk::emu
