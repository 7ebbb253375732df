// Whether little work is worth dividing among threads, as parallel regions themselves tell while they run.
//
// A region takes some microseconds while the threads of its team spin and wait for the next. libgomp has them sleep
// instead once all teams together have more threads than the machine has processors, for which a second thread of the
// program that ever called torch is enough. Waking one takes longer than a small product. Neither state can be asked
// for, and a program goes from one to the other.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lk::cpu {

// Of one kernel, whose work is counted in one unit. Threads may race for it: what is lost then is one observation.
class RegionPrice {
 public:
  enum class Turn { kAsKnown, kWakes, kTimed };

  // What the next call is for. Some are divided whether it pays or not, to see whether it would: the first one wakes
  // threads that fell asleep while nothing was divided, and the second is timed.
  Turn next() {
    const uint32_t turn = calls_.fetch_add(1, std::memory_order_relaxed) % kEvery;
    return turn == 0 ? Turn::kWakes : turn == 1 ? Turn::kTimed : Turn::kAsKnown;
  }

  bool pays(int64_t work) const { return static_cast<double>(work) > least_.load(std::memory_order_relaxed); }

  // A region took `elapsed`, and its threads `all` together and `longest` at most for so much `work`. The cheaper of
  // two regions counts: the system may have taken a processor away from the other.
  void observe(double elapsed, double all, double longest, int64_t work) {
    const double saved = all - longest;
    if (saved <= 0) return;  // one thread did it all: the call came from within a region
    const double least = static_cast<double>(work) * (elapsed - longest) / saved;
    least_.store(std::min(least, last_.exchange(least, std::memory_order_relaxed)), std::memory_order_relaxed);
  }

 private:
  static constexpr uint32_t kEvery = 128;

  std::atomic<uint32_t> calls_{0};
  std::atomic<double> least_{0}, last_{0};  // work from which on a region saves more than it takes
};

}  // namespace lk::cpu
