// The machine's memory: who may touch what, and what is ordered before it.
#include <numeric>

#include "machine_parts.h"

namespace lk::emu {

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
  if (t.async != nullptr) {
    const VectorClock& clock = t.async->clock;
    return clocked_read(t, clock, address, bytes, t.async->agent, clock.of(t.async->agent).count, false, site);
  }
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
  if (t.async != nullptr) {
    const VectorClock& clock = t.async->clock;
    return clocked_write(t, *t.block, clock, address, bytes, t.async->agent, clock.of(t.async->agent).count, false,
                         site);
  }
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

void Machine::copy_async(uint32_t address, const void* source, int size, int bytes, Site site) {
  Thread& t = *current_;
  if (t.async != nullptr) fail(t, site, "a thread's asynchronous copy in a launch by clocks");
  if (options_.faults.ignore_copy_size) bytes = size;
  if (bytes < 0 || bytes > size) fail(t, site, concatenate("copies ", bytes, " of ", size, " bytes"));
  check_shared(t, address, size, size, site);
  if (bytes > 0) {
    GlobalRange& range = range_of(t, source, bytes, size, "copies", site);
    check_known(range, t, source, bytes, false, "unordered read of", site);
    report_.bytes_read += static_cast<uint64_t>(bytes);
  }
  note_write(t, address, size, site);
  for (uint32_t at = address; at < address + size; at += 4) {
    t.block->words[(at - kSharedBase) / 4].copier = static_cast<int16_t>(t.index);
  }
  std::memset(t.block->shared.data() + (address - kSharedBase), kPoison, size);
  t.copies.push_back({address, source, size, bytes, site});
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
  report_.groups_under_way = std::max(report_.groups_under_way, std::min(t.groups.size(), pending));
  if (t.groups.size() <= pending) return;
  const auto last_group = t.groups.end() - static_cast<ptrdiff_t>(pending);
  const auto last_copy =
      t.copies.begin() + static_cast<ptrdiff_t>(std::accumulate(t.groups.begin(), last_group, size_t{0}));
  for (auto copy = t.copies.begin(); copy != last_copy; ++copy) {
    for (uint32_t at = copy->address; at < copy->address + copy->size; at += 4) {
      t.block->words[(at - kSharedBase) / 4].copier = kNobody;
    }
    note_write(t, copy->address, copy->size, copy->site);
    unsigned char* target = t.block->shared.data() + (copy->address - kSharedBase);
    std::memset(target, 0, copy->size);
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
  // The last of those that begin before: they are in order, and none overlaps another.
  const auto next = std::upper_bound(ranges_.begin(), ranges_.end(), begin,
                                     [](uintptr_t address, const GlobalRange& r) { return address < r.begin; });
  if (next != ranges_.begin() && holds(*std::prev(next))) {
    last_range_ = static_cast<size_t>(next - ranges_.begin()) - 1;
    return *std::prev(next);
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
  if (t.async != nullptr) return t.async->clock.of(write.thread).count >= write.epoch;
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
                     write.thread / agents(), ", thread ", write.thread % agents()));
  }
}

void Machine::record_write(GlobalRange& range, const Thread& t, const void* p, size_t bytes, bool atomic) {
  if (range.writes.empty()) range.writes.resize(range.end - range.begin, GlobalWrite{});
  const size_t first = reinterpret_cast<uintptr_t>(p) - range.begin;
  std::fill_n(range.writes.begin() + static_cast<ptrdiff_t>(first), bytes,
              t.async == nullptr ? GlobalWrite{id_of(t), t.block->epoch, t.releases, atomic}
                                 : GlobalWrite{t.async->agent, t.async->clock.of(t.async->agent).count, 0, atomic});
  ++progress_;
}

void Machine::read_global(const void* p, size_t bytes, size_t alignment, Site site) {
  const Thread& t = *current_;
  const GlobalRange& range = range_of(t, p, bytes, alignment, "reads", site);
  check_known(range, t, p, bytes, false, "unordered read of", site);
  report_.bytes_read += bytes;
}

bool Machine::write_global(const void* p, size_t bytes, size_t alignment, Site site) {
  if (is_dropped(report_.global_store_sites, global_store_sites_, options_.faults.drop_global_store, site))
    return false;
  const Thread& t = *current_;
  GlobalRange& range = range_of(t, p, bytes, alignment, "writes", site);
  check_known(range, t, p, bytes, false, "unordered write of", site);
  record_write(range, t, p, bytes, false);
  if (flags_.empty()) return true;  // by clocks, what a flag has told stays known
  const auto begin = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t word = begin & ~uintptr_t{3}; word < begin + bytes; word += 4) flags_.erase(word);
  return true;
}

// ---- flags

void Machine::acquire(const void* flag) {
  if (current_->async != nullptr) {
    const auto found = clocked_flags_.find(reinterpret_cast<uintptr_t>(flag));
    if (found != clocked_flags_.end()) current_->async->clock.join(found->second);
    return;
  }
  const auto found = flags_.find(reinterpret_cast<uintptr_t>(flag));
  if (found == flags_.end()) return;
  if (!current_->acquired) current_->acquired.emplace(block_count_);
  current_->acquired->join(found->second);
}

// A store forgets what earlier releases published through the flag, an atomic operation passes it on.
void Machine::publish(const void* flag, bool pass_on) {
  const auto address = reinterpret_cast<uintptr_t>(flag);
  if (!pass_on) flags_.erase(address), clocked_flags_.erase(address);
  if (options_.faults.drop_release_order) return;
  Thread& t = *current_;
  if (t.async != nullptr) {
    clocked_flags_[address].join(options_.faults.early_release ? t.async->before_meeting : t.async->clock);
    return t.async->step();
  }
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

}  // namespace lk::emu
