// Who knows what has been done, where warps do not meet at block barriers alone: a vector clock per thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lk::emu {

// An agent does something: a thread, or an engine that works beside the threads. They are numbered within a launch, so
// many for each block.
constexpr int kAgents = 2048;

// What is known of an agent: how much it has done, and how much of its writes it has shown to the engines by a fence.
struct Done {
  uint32_t count = 0, fenced_shared = 0, fenced = 0;

  Done later(const Done& other) const {
    return {std::max(count, other.count), std::max(fenced_shared, other.fenced_shared), std::max(fenced, other.fenced)};
  }
  Done earlier(const Done& other) const {
    return {std::min(count, other.count), std::min(fenced_shared, other.fenced_shared), std::min(fenced, other.fenced)};
  }
};

class VectorClock {
 public:
  Done of(int agent) const {
    const size_t block = static_cast<size_t>(agent / kAgents), index = static_cast<size_t>(agent % kAgents);
    return block < blocks_.size() && index < blocks_[block].size() ? blocks_[block][index] : Done{};
  }

  Done& at(int agent) {
    const size_t block = static_cast<size_t>(agent / kAgents), index = static_cast<size_t>(agent % kAgents);
    if (block >= blocks_.size()) blocks_.resize(block + 1);
    if (index >= blocks_[block].size()) blocks_[block].resize(index + 1);
    return blocks_[block][index];
  }

  // Knows what the other one does, too.
  void join(const VectorClock& other) {
    if (blocks_.size() < other.blocks_.size()) blocks_.resize(other.blocks_.size());
    for (size_t b = 0; b < other.blocks_.size(); ++b) {
      const std::vector<Done>& from = other.blocks_[b];
      std::vector<Done>& to = blocks_[b];
      if (to.size() < from.size()) to.resize(from.size());
      for (size_t i = 0; i < from.size(); ++i) to[i] = to[i].later(from[i]);
    }
  }

  // Knows what the other one knows of engines, whose numbers follow those of so many threads.
  void join_engines(const VectorClock& other, int threads) {
    for (size_t b = 0; b < other.blocks_.size(); ++b) {
      for (size_t i = static_cast<size_t>(threads); i < other.blocks_[b].size(); ++i) {
        Done& mine = at(static_cast<int>(b) * kAgents + static_cast<int>(i));
        mine = mine.later(other.blocks_[b][i]);
      }
    }
  }

  // Whether it knows as much of everybody's deeds.
  bool covers(const VectorClock& other) const {
    for (size_t b = 0; b < other.blocks_.size(); ++b) {
      for (size_t i = 0; i < other.blocks_[b].size(); ++i) {
        if (of(static_cast<int>(b) * kAgents + static_cast<int>(i)).count < other.blocks_[b][i].count) return false;
      }
    }
    return true;
  }

  // Knows no more than both do.
  void meet(const VectorClock& other) {
    blocks_.resize(std::min(blocks_.size(), other.blocks_.size()));
    for (size_t b = 0; b < blocks_.size(); ++b) {
      const std::vector<Done>& from = other.blocks_[b];
      std::vector<Done>& to = blocks_[b];
      to.resize(std::min(to.size(), from.size()));
      for (size_t i = 0; i < to.size(); ++i) to[i] = to[i].earlier(from[i]);
    }
  }

 private:
  std::vector<std::vector<Done>> blocks_;
};

}  // namespace lk::emu
