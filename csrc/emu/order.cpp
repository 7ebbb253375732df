// The machine by clocks: what a thread knows, barriers in memory and named ones, and who may touch a word.
#include "machine_parts.h"

namespace lk::emu {

AsyncThread& Machine::async_of(Thread& t, const Site& site) const {
  if (t.async == nullptr) fail(t, site, "the launch is not by clocks (Options::by_clocks)");
  return *t.async;
}

int Machine::new_agent(Block& block) const {
  if (block.async->agents == kAgents) throw std::logic_error("more agents of a block than have numbers");
  return block.index * kAgents + block.async->agents++;
}

// ---- meetings

// All know from here on what each of them does.
void Machine::meet(std::vector<Thread*>& threads) {
  VectorClock all;
  for (const Thread* t : threads) all.join(t->async->clock);
  for (Thread* t : threads) {
    t->async->before_meeting = std::move(t->async->clock);
    t->async->clock = all;
    t->async->step();
  }
}

void Machine::release(std::vector<Thread*>& waiting) {
  for (Thread* t : waiting) warp_of(*t).ready |= t->bit();
  waiting.clear();
}

void Machine::sync_named(int barrier, int threads, Site site) {
  if (is_dropped(report_.barrier_sites, barrier_sites_, options_.faults.drop_barrier, site)) return;
  Thread& t = *current_;
  async_of(t, site);
  if (barrier <= 0 || barrier > 15 || threads <= 0 || threads % kLanes != 0) {
    fail(t, site, concatenate("barrier ", barrier, " of ", threads, " threads: there are 1 to 15, of whole warps"));
  }
  NamedBarrier& b = t.block->async->named[barrier];
  if (b.waiting.empty()) {
    b.threads = threads;
    b.site = site;
  } else if (b.threads != threads || !same_site(b.site, site)) {
    fail(t, site, concatenate("barrier ", barrier, ", while others are at the one of ", text_of(b.site)));
  }
  b.waiting.push_back(&t);
  if (static_cast<int>(b.waiting.size()) < threads) return wait(nullptr, "waiting at a named barrier", site);
  meet(b.waiting);
  release(b.waiting);
  ++progress_;
  ++report_.barriers;
  yield();
}

// ---- barriers in memory

MemoryBarrier& Machine::barrier_at(const Thread& t, const Block& block, uint32_t address, const Site& site) const {
  check_shared(t, address, 8, 8, site);
  const auto found = block.async->barriers.find(address);
  if (found == block.async->barriers.end()) fail(t, site, concatenate("there is no barrier at address ", address));
  MemoryBarrier& b = found->second;
  if (t.async->clock.of(b.initialiser).count < b.initialised) {
    fail(t, site, concatenate("the barrier at address ", address, " may not be initialised yet"));
  }
  return b;
}

void Machine::barrier_init(uint32_t address, int arrivals, Site site) {
  Thread& t = *current_;
  AsyncThread& own = async_of(t, site);
  check_shared(t, address, 8, 8, site);
  note_write(t, address, 8, site);
  const auto [found, is_new] = t.block->async->barriers.try_emplace(address);
  if (!is_new || arrivals <= 0) fail(t, site, concatenate("a second barrier at address ", address, ", or of nobody"));
  MemoryBarrier& b = found->second;
  b.arrivals = b.pending = arrivals;
  b.agent = new_agent(*t.block);
  b.initialiser = own.agent;
  b.initialised = own.clock.of(own.agent).count;
}

void Machine::barrier_init_done(Site site) {
  if (is_dropped(report_.proxy_fence_sites, proxy_fence_sites_, options_.faults.drop_proxy_fence, site)) return;
  Thread& t = *current_;
  for (auto& [address, b] : t.block->async->barriers) b.is_shown |= b.initialiser == async_of(t, site).agent;
}

void Machine::arrive(MemoryBarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  b.known.at(b.agent).count = ++b.phases;
  for (Thread* t : b.waiting) {
    t->async->clock.join(b.known);
    if (t->async->waits_for_cluster) t->async->clock.join(b.of_cluster);
  }
  release(b.waiting);
  ++progress_;
}

// bytes: of copies that count at the barrier in this phase.
void Machine::barrier_arrive(uint32_t address, int bytes, Site site) {
  if (is_dropped(report_.arrival_sites, arrival_sites_, options_.faults.drop_arrival, site)) return;
  Thread& t = *current_;
  MemoryBarrier& b = barrier_at(t, *t.block, address, site);
  if (b.pending == 0) fail(t, site, concatenate("one arrival too many at the barrier at address ", address));
  if (!options_.faults.ignore_expected_bytes) b.bytes += bytes;
  b.known.join(async_of(t, site).clock);
  count_arrival(t, b);
}

void Machine::count_arrival(Thread& t, MemoryBarrier& b) {
  --b.pending;
  t.async->step();
  arrive(b);
}

// Until the phase of this parity is complete. Copies arrive only now.
void Machine::barrier_wait(uint32_t address, uint32_t parity, bool for_cluster, Site site) {
  if (is_dropped(report_.barrier_wait_sites, barrier_wait_sites_, options_.faults.drop_barrier_wait, site)) return;
  Thread& t = *current_;
  AsyncThread& own = async_of(t, site);
  MemoryBarrier& b = barrier_at(t, *t.block, address, site);
  if ((b.phases & 1) == parity) {
    own.waits_for_cluster = for_cluster;
    b.waiting.push_back(&t);
    wait(nullptr, "waiting at a barrier in memory", site);
  } else {
    own.clock.join(b.known);
    if (for_cluster) own.clock.join(b.of_cluster);
  }
}

void Machine::fence_proxy_async(bool shared_only, Site site) {
  if (is_dropped(report_.proxy_fence_sites, proxy_fence_sites_, options_.faults.drop_proxy_fence, site)) return;
  AsyncThread& own = async_of(*current_, site);
  Done& done = own.clock.at(own.agent);
  done.fenced_shared = done.count;
  if (!shared_only) {
    done.fenced = done.count;
    own.at_fence = own.clock;
  }
  own.step();
}

// ---- clusters

uint32_t Machine::cluster_address(uint32_t address, uint32_t rank, Site site) const {
  const Thread& t = *current_;
  if (rank >= t.block->cluster.size()) fail(t, site, concatenate("the cluster has no block of rank ", rank));
  return address | (rank + 1) << kRankShift;
}

// The block of this rank, which the thread is about to touch.
Block& Machine::reach(Thread& t, int rank, const Site& site) const {
  Block& block = *t.block->cluster[static_cast<size_t>(rank)];
  if (!block.running)
    fail(t, site, concatenate("the block of rank ", rank, " has ended, and its shared memory with it"));
  AsyncThread& own = async_of(t, site);
  if (&block != t.block) block.async->reached_by.at(own.agent).count = own.clock.of(own.agent).count;
  return block;
}

// Whose address it is; it becomes the block's own.
Block& Machine::block_of(Thread& t, uint32_t& address, const Site& site) const {
  const uint32_t rank = (address >> kRankShift) - 1;
  if (rank >= t.block->cluster.size()) fail(t, site, concatenate(address, " is no address of the cluster"));
  address &= (1u << kRankShift) - 1;
  return reach(t, static_cast<int>(rank), site);
}

void Machine::sync_cluster(Site site) {
  if (is_dropped(report_.barrier_sites, barrier_sites_, options_.faults.drop_barrier, site)) return;
  Thread& t = *current_;
  async_of(t, site);
  const std::vector<Block*>& blocks = t.block->cluster;
  AsyncBlock& first = *blocks.front()->async;
  std::vector<Thread*>& waiting = first.at_cluster_barrier;
  if (waiting.empty()) {
    first.cluster_site = site;
  } else if (!same_site(first.cluster_site, site)) {
    fail(t, site, "sync_cluster, while others are at the one of " + text_of(first.cluster_site));
  }
  for (const Block* block : blocks) {
    if (block->exited != 0) fail(t, site, "sync_cluster waits for threads that have exited");
  }
  waiting.push_back(&t);
  if (waiting.size() < blocks.size() * static_cast<size_t>(threads_)) return wait(nullptr, "in sync_cluster", site);
  meet(waiting);
  release(waiting);
  ++progress_;
  ++report_.barriers;
  yield();
}

void Machine::store_cluster(uint32_t address, const void* source, size_t bytes, Site site) {
  Thread& t = *current_;
  const VectorClock& clock = async_of(t, site).clock;
  Block& block = block_of(t, address, site);
  check_shared(t, address, bytes, bytes, site);
  clocked_write(t, block, clock, address, bytes, t.async->agent, clock.of(t.async->agent).count, false, site);
  std::memcpy(block.shared.data() + (address - kSharedBase), source, bytes);
}

void Machine::barrier_arrive_cluster(uint32_t address, bool releases, Site site) {
  if (is_dropped(report_.arrival_sites, arrival_sites_, options_.faults.drop_arrival, site)) return;
  Thread& t = *current_;
  const Block& block = block_of(t, address, site);
  MemoryBarrier& b = barrier_at(t, block, address, site);
  if (b.pending == 0) fail(t, site, concatenate("one arrival too many at the barrier at address ", address));
  const VectorClock& clock = t.async->clock;
  if (&block == t.block) {
    b.known.join(clock);
  } else {
    b.known.join_engines(clock, threads_);
    if (releases) b.of_cluster.join(clock);
  }
  count_arrival(t, b);
}

// ---- words of shared memory

template <class F>
void Machine::for_clocked_words(Block& block, uint32_t address, size_t bytes, const F& f) {
  for (uint32_t at = address; at < address + bytes; at += 4) f(block.async->words[(at - kSharedBase) / 4], at);
}

void Machine::check_under_way(const Thread& t, const ClockedWord& word, uint32_t at, const Site& site) const {
  if (!word.is_under_way) return;
  fail(t, site,
       concatenate("shared-memory race: touches address ", at, " while a copy of a box, ", text_of(word.write_site),
                   ", is under way"));
}

// Of the agent's deed `count`, by somebody with this clock.
void Machine::clocked_read(Thread& t, const VectorClock& clock, uint32_t address, size_t bytes, int agent,
                           uint32_t count, bool by_engine, Site site) {
  for_clocked_words(*t.block, address, bytes, [&](ClockedWord& word, uint32_t at) {
    check_under_way(t, word, at, site);
    if (word.writer >= 0) {
      const Done done = clock.of(word.writer);
      if (done.count < word.write_count) {
        fail(t, site,
             concatenate("shared-memory race: reads address ", at, ", whose write at ", text_of(word.write_site),
                         " is not ordered before"));
      }
      if (by_engine && word.is_plain && done.fenced_shared < word.write_count) {
        fail(t, site,
             concatenate("an engine reads address ", at, ", which was stored at ", text_of(word.write_site),
                         " and not shown by a fence"));
      }
    }
    word.read_site = site;
    for (ClockedWord::Reader& reader : word.readers) {
      if (reader.agent != agent) continue;
      reader.count = count;
      return;
    }
    word.readers.push_back({agent, count});
  });
}

void Machine::clocked_write(Thread& t, Block& block, const VectorClock& clock, uint32_t address, size_t bytes,
                            int agent, uint32_t count, bool by_engine, Site site) {
  for_clocked_words(block, address, bytes, [&](ClockedWord& word, uint32_t at) {
    check_under_way(t, word, at, site);
    if (word.writer >= 0 && clock.of(word.writer).count < word.write_count) {
      fail(t, site,
           concatenate("shared-memory race: overwrites address ", at, ", whose write at ", text_of(word.write_site),
                       " is not ordered before"));
    }
    for (const ClockedWord::Reader& reader : word.readers) {
      if (clock.of(reader.agent).count >= reader.count) continue;
      fail(t, site,
           concatenate("shared-memory race: overwrites address ", at, ", which may still be read, last at ",
                       text_of(word.read_site)));
    }
    word.readers.clear();
    word.writer = agent;
    word.write_count = count;
    word.is_plain = !by_engine;
    word.is_under_way = by_engine;
    word.write_site = site;
  });
}

// ---- the end

void Machine::finish_thread(Thread& t) {
  const AsyncThread& own = *t.async;
  if (!own.accumulators.empty()) fail(t, t.site, "exits with products under way");
  if (!own.groups.empty() || !own.open_stores.empty()) {
    fail(t, t.site, "exits with boxes that are not stored yet: their shared memory ends with the block");
  }
  AsyncBlock& block = *t.block->async;
  if (!t.block->cluster.front()->async->at_cluster_barrier.empty()) {
    fail(t, t.site, "exits while others of the cluster are in sync_cluster");
  }
  if (t.block->cluster.size() == 1) return;
  block.at_exit.join(own.clock);
  if (t.block->exited + 1 == threads_ && !block.at_exit.covers(block.reached_by)) {
    fail(t, t.site, "the block ends while another one of the cluster may still reach its shared memory");
  }
}

}  // namespace lk::emu
