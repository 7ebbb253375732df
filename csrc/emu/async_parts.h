// What a block has where its warps meet at barriers in memory, and engines work beside them: copies of boxes, products
// of warpgroups. Within the emulator only.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "async.h"
#include "vector_clocks.h"

namespace lk::emu {

struct Thread;

// Accesses to a word of shared memory. Readers are those that nobody has written after.
struct ClockedWord {
  int writer = -1;
  uint32_t write_count = 0;
  bool is_plain = false;      // written by a store of a thread, not by a copy
  bool is_under_way = false;  // a copy of a box has not arrived yet
  Site write_site, read_site;
  struct Reader {
    int agent;
    uint32_t count;
  };
  std::vector<Reader> readers;
};

struct BoxCopy {
  BoxMap map;
  int column, row;
  uint32_t address;
  Site site;
};

struct MemoryBarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;    // of copies that are expected, less those that have arrived
  uint32_t phases = 0;  // completed
  int agent = 0;        // of the copies that count at this barrier: one more of its deeds in each phase
  int initialiser = 0;
  uint32_t initialised = 0;  // by its count
  bool is_shown = false;     // to the engines
  VectorClock known;         // who has arrived, and what they knew
  VectorClock of_cluster;    // what threads of other blocks have released: for who waits for the cluster
  std::vector<BoxCopy> copies;
  std::vector<Thread*> waiting;
};

struct NamedBarrier {
  int threads = 0;
  Site site;
  std::vector<Thread*> waiting;
};

// A product that a warpgroup has issued.
struct Product {
  ProductOf what;
  int joined = 0;
  Site site;
  VectorClock known;  // to all of its threads
  float* registers[128];
};

struct Warpgroup {
  int agent = 0;
  std::map<uint32_t, Product> open;  // by number, until all threads have joined
  uint32_t computed = 0;
};

// An accumulator while products with it are under way: NaN in the thread's registers, and here what will be there.
struct Accumulator {
  float* registers;
  std::vector<float> sum;
  uint32_t last;  // product
};

struct AsyncThread {
  VectorClock clock, at_fence, before_meeting;
  int agent = 0, store_agent = -1;

  uint32_t products = 0;            // issued
  std::vector<uint32_t> committed;  // the last product of each group that was not waited for
  bool registers_are_fenced = false;
  bool waits_for_cluster = false;
  std::vector<Accumulator> accumulators;

  uint32_t stores = 0;                       // of boxes, issued
  std::vector<std::vector<BoxCopy>> groups;  // committed, not waited for
  std::vector<BoxCopy> open_stores;

  // What follows is no part of what others have learnt.
  void step() { ++clock.at(agent).count; }
};

struct AsyncBlock {
  std::vector<ClockedWord> words;
  std::map<uint32_t, MemoryBarrier> barriers;  // by address
  std::map<int, NamedBarrier> named;
  std::vector<Warpgroup> warpgroups;
  int agents = 0;  // threads and engines

  // In the first block of a cluster, its threads that wait for all of it.
  std::vector<Thread*> at_cluster_barrier;
  Site cluster_site;
  VectorClock reached_by;  // threads of other blocks, and when they have last been here
  VectorClock at_exit;     // what threads knew that have exited

  explicit AsyncBlock(size_t words_) : words(words_) {}
};

}  // namespace lk::emu
