// The machine's engine that copies boxes of matrices (TMA): to shared memory, at a barrier, and back, in groups.
#include "machine_parts.h"

namespace lk::emu {
namespace {

constexpr int kElement = 2;  // bytes

// Where an element of a box lies.
uint32_t swizzled(uint32_t address, int swizzle_bytes) {
  const uint32_t mask = swizzle_bytes == 0 ? 0 : static_cast<uint32_t>(swizzle_bytes) / 16 - 1;
  return address ^ (address >> 7 & mask) << 4;
}

uint32_t bytes_of(const BoxMap& map) { return static_cast<uint32_t>(map.box_rows * map.box_columns * kElement); }

// f(where it lies in global memory, address of the row, elements inside of the matrix) for the rows of a box; null and
// 0 for those that are outside.
template <class F>
void for_rows(const BoxCopy& box, const F& f) {
  const BoxMap& map = box.map;
  const auto columns = static_cast<int64_t>(map.columns), rows = static_cast<int64_t>(map.rows);
  for (int i = 0; i < map.box_rows; ++i) {
    const uint32_t address = box.address + static_cast<uint32_t>(i * map.box_columns * kElement);
    const int64_t row = box.row + i;
    const bool is_inside = row >= 0 && row < rows && box.column >= 0 && box.column < columns;
    const int64_t count = is_inside ? std::min<int64_t>(map.box_columns, columns - box.column) : 0;
    const uint64_t begin = map.data + static_cast<uint64_t>(row) * map.stride_bytes + box.column * kElement;
    f(count == 0 ? nullptr : reinterpret_cast<unsigned char*>(begin), address, static_cast<int>(count));
  }
}

}  // namespace

void Machine::check_box(const Thread& t, const BoxMap& map, uint32_t address, const Site& site) const {
  const int row_bytes = map.box_columns * kElement;
  check_shared(t, address, bytes_of(map), map.swizzle_bytes == 0 ? 128 : map.swizzle_bytes * 8, site);
  const bool fits = map.swizzle_bytes == 0 ? row_bytes % 16 == 0 : row_bytes == map.swizzle_bytes;
  if (map.data % 16 != 0 || map.stride_bytes % 16 != 0 || map.box_rows > 256 || map.box_columns > 256 || !fits) {
    fail(t, site, "no tensor map is like this one");
  }
}

// Every byte must be shown to the engines by who stored it, and the reader must have fenced since it knows.
void Machine::check_shown(const GlobalRange& range, const Thread& t, const void* p, size_t bytes,
                          const Site& site) const {
  if (range.writes.empty()) return;
  const size_t first = reinterpret_cast<uintptr_t>(p) - range.begin;
  for (size_t i = first; i < first + bytes; ++i) {
    const GlobalWrite& write = range.writes[i];
    if (write.epoch == 0) continue;
    if (t.async->at_fence.of(write.thread).count < write.epoch) {
      fail(t, site,
           "the engine reads global memory that was stored in this launch, without a fence since that is known");
    }
    if (t.async->clock.of(write.thread).fenced < write.epoch) {
      fail(t, site, "the engine reads global memory that was stored in this launch and not shown by a fence");
    }
  }
}

// To the blocks of the cluster whose ranks are bits of `ranks`.
void Machine::load_box(uint32_t address, const BoxMap& map, int column, int row, uint32_t barrier, uint32_t ranks,
                       Site site) {
  Thread& t = *current_;
  AsyncThread& own = async_of(t, site);
  check_box(t, map, address, site);
  const BoxCopy box{map, column, row, address, site};
  for_rows(box, [&](const unsigned char* source, uint32_t, int count) {
    if (count == 0) return;
    const size_t bytes = static_cast<size_t>(count * kElement);
    GlobalRange& range = range_of(t, source, bytes, kElement, "copies", site);
    check_known(range, t, source, bytes, false, "unordered read of", site);
    check_shown(range, t, source, bytes, site);
    report_.bytes_loaded += bytes;
  });
  const auto count = static_cast<int>(t.block->cluster.size());
  if (ranks == 0 || ranks >> count != 0) fail(t, site, concatenate("the cluster has no such blocks: ", ranks));
  for (int rank = 0; rank < count; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    Block& block = reach(t, rank, site);
    MemoryBarrier& b = barrier_at(t, block, barrier, site);
    if (!b.is_shown) fail(t, site, "the barrier's initialisation is not shown to the engines");
    clocked_write(t, block, own.clock, address, bytes_of(map), b.agent, b.phases + 1, true, site);
    std::memset(block.shared.data() + (address - kSharedBase), kPoison, bytes_of(map));
    b.copies.push_back(box);
  }
}

// One copy whose barrier somebody waits at. False: there is none.
bool Machine::deliver_box() {
  for (const auto& block : blocks_) {
    if (!block->running || block->async == nullptr) continue;
    for (auto& [address, b] : block->async->barriers) {
      if (b.copies.empty() || b.waiting.empty()) continue;
      deliver(*block, b);
      return true;
    }
  }
  return false;
}

void Machine::deliver(Block& block, MemoryBarrier& b) {
  const auto chosen = b.copies.begin() + static_cast<ptrdiff_t>(random_() % b.copies.size());
  const BoxCopy box = *chosen;
  b.copies.erase(chosen);
  for_rows(box, [&](const unsigned char* source, uint32_t address, int count) {
    for (int i = 0; i < box.map.box_columns; ++i) {
      uint16_t value = options_.faults.ignore_copy_size ? 0xFFFF : 0;
      if (i < count) std::memcpy(&value, source + i * kElement, kElement);
      const uint32_t at = swizzled(address + static_cast<uint32_t>(i * kElement), box.map.swizzle_bytes);
      std::memcpy(block.shared.data() + (at - kSharedBase), &value, kElement);
    }
  });
  for (uint32_t at = box.address; at < box.address + bytes_of(box.map); at += 4) {
    block.async->words[(at - kSharedBase) / 4].is_under_way = false;
  }
  if (!options_.faults.ignore_expected_bytes) b.bytes -= bytes_of(box.map);
  ++progress_;
  arrive(b);
}

void Machine::store_box(const BoxMap& map, int column, int row, uint32_t address, Site site) {
  if (is_dropped(report_.global_store_sites, global_store_sites_, options_.faults.drop_global_store, site)) return;
  Thread& t = *current_;
  AsyncThread& own = async_of(t, site);
  check_box(t, map, address, site);
  if (own.store_agent < 0) own.store_agent = new_agent(*t.block);
  const BoxCopy box{map, column, row, address, site};
  clocked_read(t, own.clock, address, bytes_of(map), own.store_agent, ++own.stores, true, site);
  for_rows(box, [&](const unsigned char* target, uint32_t, int count) {
    if (count == 0) return;
    const size_t bytes = static_cast<size_t>(count * kElement);
    GlobalRange& range = range_of(t, target, bytes, kElement, "writes", site);
    check_known(range, t, target, bytes, false, "unordered write of", site);
    record_write(range, t, target, bytes, false);
    report_.bytes_stored += bytes;
  });
  own.open_stores.push_back(box);
}

void Machine::store_commit() {
  AsyncThread& own = *current_->async;
  own.groups.push_back(std::move(own.open_stores));
  own.open_stores.clear();
}

void Machine::store_wait_read(size_t pending, Site site) {
  if (is_dropped(report_.store_wait_sites, store_wait_sites_, options_.faults.drop_store_wait, site)) return;
  Thread& t = *current_;
  AsyncThread& own = async_of(t, site);
  while (own.groups.size() > pending) {
    const std::vector<BoxCopy> group = std::move(own.groups.front());
    own.groups.erase(own.groups.begin());
    if (group.empty()) continue;
    store_boxes(*t.block, group);
    own.clock.at(own.store_agent).count += static_cast<uint32_t>(group.size());
  }
}

void Machine::store_boxes(Block& block, const std::vector<BoxCopy>& boxes) {
  for (const BoxCopy& box : boxes) {
    for_rows(box, [&](unsigned char* target, uint32_t address, int count) {
      for (int i = 0; i < count; ++i) {
        const uint32_t at = swizzled(address + static_cast<uint32_t>(i * kElement), box.map.swizzle_bytes);
        std::memcpy(target + i * kElement, block.shared.data() + (at - kSharedBase), kElement);
      }
    });
  }
}

}  // namespace lk::emu
