// Proves the emulator on kernels small enough to be checked by eye: right ones must pass, wrong ones be caught.
// A program of its own, so that it also runs under sanitizers:
//     g++ -std=c++20 -O1 -g -fsanitize=address,undefined selftest.cpp selftest_async.cpp and the machine's sources
#include <array>
#include <cstdio>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../device.h"

namespace lk {

void selftest_async();  // selftest_async.cpp

namespace {

constexpr int kThreads = 64, kSeeds = 20;
constexpr uint32_t kNaNs = 0xFFFFFFFFu;

template <class T>
emu::Range range_of(const std::vector<T>& v) {
  return {v.data(), v.size() * sizeof(T)};
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error(what);
}

// f(seed) must be stopped by an error that says `message`, whatever the seed.
template <class F>
void require_caught(const std::string& message, const F& f) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    std::string error = "nothing";
    try {
      f(seed);
    } catch (const std::runtime_error& e) {
      error = e.what();
    }
    require(error.find(message) != std::string::npos, "expected \"" + message + "\", got \"" + error + "\"");
  }
}

// ------------------------------------------------------------------------------------------------ shared memory

emu::Report reverse(const emu::Options& options) {
  std::vector<uint32_t> in(kThreads), out(kThreads, kNaNs);
  for (int i = 0; i < kThreads; ++i) in[i] = 100 + i;
  const auto report = emu::launch(1, kThreads, kThreads * 4, {range_of(in), range_of(out)}, options, [&] {
    const int t = thread_index();
    store_shared_4(dynamic_shared() + t * 4, load_global(&in[t]));
    sync_block();
    store_global(&out[t], load_shared_4(dynamic_shared() + (kThreads - 1 - t) * 4));
  });
  for (int i = 0; i < kThreads; ++i) require(out[i] == in[kThreads - 1 - i], "wrong element");
  return report;
}

void test_reverse() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const emu::Report report = reverse({.seed = seed});
    require(report.barriers == 1 && report.barrier_sites.size() == 1, "barriers are counted");
    require(report.bytes_read == kThreads * sizeof(uint32_t), "bytes of loads are counted");
  }
}

void test_missing_barrier_is_a_race() {
  require_caught("shared-memory race", [](uint64_t seed) { reverse({.seed = seed, .faults = {.drop_barrier = 0}}); });
}

void test_overwriting_what_others_read_is_a_race() {
  const auto run = [](uint64_t seed, bool has_barrier) {
    emu::launch(1, kThreads, kThreads * 4, {}, {.seed = seed}, [&] {
      const uint32_t own = dynamic_shared() + thread_index() * 4;
      const uint32_t other = dynamic_shared() + (kThreads - 1 - thread_index()) * 4;
      load_shared_4(other);
      if (has_barrier) sync_block();
      store_shared_4(own, 1);
    });
  };
  run(0, true);
  require_caught("shared-memory race", [&](uint64_t seed) { run(seed, false); });
}

void test_lanes_are_ordered_by_sync_warp() {
  const auto run = [](uint64_t seed, bool has_sync) {
    emu::launch(1, 32, 32 * 4, {}, {.seed = seed}, [&] {
      for (int round = 0; round < 3; ++round) {
        store_shared_4(dynamic_shared() + thread_index() * 4, round);
        sync_warp();
        load_shared_4(dynamic_shared() + (31 - thread_index()) * 4);
        if (has_sync) sync_warp();
      }
    });
  };
  run(0, true);
  require_caught("shared-memory race", [&](uint64_t seed) { run(seed, false); });
}

void test_ballot() {
  emu::launch(1, kThreads, 0, {}, {}, [] {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const uint32_t lanes = warp_ballot(lane % 3 == warp);
    uint32_t expected = 0;
    for (int i = 0; i < 32; ++i) expected |= (i % 3 == warp ? 1u : 0u) << i;
    require(lanes == expected && count_ones(lanes) == (warp < 3 ? (34u - warp) / 3 : 0), "ballot");
  });
  require_caught("while other lanes are at", [](uint64_t seed) {
    emu::launch(1, 32, 0, {}, {.seed = seed}, [] {
      if (thread_index() != 7) warp_ballot(true);
      sync_warp();
    });
  });
}

void test_trap() {
  require_caught("trap", [](uint64_t seed) {
    emu::launch(1, 32, 0, {}, {.seed = seed}, [] {
      if (thread_index() == 9) trap();
    });
  });
}

void test_shared_bounds() {
  require_caught("out of bounds", [](uint64_t seed) {
    emu::launch(1, 32, 64, {}, {.seed = seed}, [] { store_shared_4(dynamic_shared() + thread_index() * 4, 0); });
  });
  require_caught("misaligned", [](uint64_t seed) {
    emu::launch(1, 32, 64, {}, {.seed = seed}, [] { load_shared_16(dynamic_shared() + 4); });
  });
}

// ------------------------------------------------------------------------------------------ asynchronous copies

// Two groups in flight; every third chunk is cut short.
emu::Report copy(const emu::Options& options) {
  constexpr int kWords = kThreads * 4;
  std::vector<Vec16> in(2 * kThreads), out(2 * kThreads);
  for (uint32_t i = 0; i < 2 * kThreads; ++i) in[i] = {{4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3}};
  const auto report = emu::launch(1, kThreads, 2 * kWords * 4, {range_of(in), range_of(out)}, options, [&] {
    const int t = thread_index();
    for (int group = 0; group < 2; ++group) {
      const int i = group * kThreads + t;
      copy_async_16(dynamic_shared() + i * 16, &in[i], i % 3 == 0 ? 8 : 16);
      copy_async_commit();
    }
    const int mirrored = kThreads - 1 - t;
    copy_async_wait<1>();
    sync_block();
    store_global(&out[mirrored], load_shared_16(dynamic_shared() + mirrored * 16));
    copy_async_wait<0>();
    sync_block();
    store_global(&out[kThreads + mirrored], load_shared_16(dynamic_shared() + (kThreads + mirrored) * 16));
  });
  for (int i = 0; i < 2 * kThreads; ++i) {
    for (int j = 0; j < 4; ++j) require(out[i].word[j] == (i % 3 == 0 && j >= 2 ? 0 : in[i].word[j]), "wrong word");
  }
  return report;
}

void test_async_copy() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const emu::Report report = copy({.seed = seed});
    require(report.async_copies == 2 * kThreads && report.async_wait_sites.size() == 2, "copies are counted");
    // Of every third copy, half.
    require(report.bytes_read == 2 * kThreads * 16 - 43 * 8, "bytes of copies are counted, and no zeros");
  }
}

void test_missing_wait_is_caught() {
  for (int site = 0; site < 2; ++site) {
    require_caught("is under way", [&](uint64_t seed) { copy({.seed = seed, .faults = {.drop_async_wait = site}}); });
    require_caught("shared-memory race",
                   [&](uint64_t seed) { copy({.seed = seed, .faults = {.drop_barrier = site}}); });
  }
}

// ------------------------------------------------------------------------------------------------- tensor cores

// d[16, 8] = a[16, 16] b[16, 8]; b is stored [k, n] and fetched transposed, or [n, k].
template <class Format>
void check_matrix_product(bool b_transposed) {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> value(-2, 2);
  const auto matrix = [&](int elements) {
    std::vector<uint16_t> m(elements);
    for (uint16_t& e : m) e = static_cast<uint16_t>(Format::pack(value(random), 0));
    return m;
  };
  const std::vector<uint16_t> a = matrix(16 * 16), b = matrix(16 * 8);
  std::vector<float> d(16 * 8);
  const auto report = emu::launch(1, 32, 16 * 32 * 2, {range_of(a), range_of(b), range_of(d)}, {}, [&] {
    const uint32_t a_smem = dynamic_shared(), b_smem = a_smem + 16 * 32;
    const int lane = thread_index();
    copy_async_16(a_smem + lane * 16, &a[lane * 8], 16);
    if (lane < 16) copy_async_16(b_smem + lane * 16, &b[lane * 8], 16);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    uint32_t a_reg[4], b_reg[4];
    load_matrix_x4(a_reg, a_smem + lane % 16 * 32 + lane / 16 * 16);
    if (b_transposed) {
      load_matrix_x4_transposed(b_reg, b_smem + lane % 16 * 16);
    } else {
      load_matrix_x4(b_reg, b_smem + lane % 8 * 32 + lane / 8 % 2 * 16);
    }
    float d_reg[4] = {1, 1, 1, 1};
    Format::multiply_add(d_reg, a_reg, b_reg[0], b_reg[1]);
    for (int i = 0; i < 4; ++i) store_global(&d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2], d_reg[i]);
  });
  require(report.mma == 1, "products are counted");
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = 1;
      for (int k = 0; k < 16; ++k) {
        sum += Format::low(a[m * 16 + k]) * Format::low(b_transposed ? b[k * 8 + n] : b[n * 16 + k]);
      }
      require(std::fabs(d[m * 8 + n] - sum) < 1e-5, "wrong product");
    }
  }
}

// d[16, 8] = a[16, 8] b[8, 8] in tf32, of which the lanes fetch a's fragments with load_matrix_x4.
void check_tf32_product() {
  using Format = TensorFloat32;
  std::mt19937 random(7);
  std::uniform_real_distribution<float> value(-2, 2);
  std::vector<float> a(16 * 8), b(8 * 8), d(16 * 8);
  for (auto* matrix : {&a, &b}) {
    for (float& e : *matrix) e = value(random);
  }
  emu::launch(1, 32, 16 * 32, {range_of(a), range_of(b), range_of(d)}, {}, [&] {
    const uint32_t a_smem = dynamic_shared();
    const int lane = thread_index(), group = lane / 4, k = lane % 4;
    copy_async_16(a_smem + lane * 16, &a[lane * 4], 16);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    uint32_t a_reg[4];
    load_matrix_x4(a_reg, a_smem + lane % 16 * 32 + lane / 16 * 16);
    for (uint32_t& word : a_reg) word = Format::round(word);
    const uint32_t b_reg[2] = {bits_of(load_global(&b[k * 8 + group])), bits_of(load_global(&b[(k + 4) * 8 + group]))};
    float d_reg[4] = {1, 1, 1, 1};
    Format::multiply_add(d_reg, a_reg, Format::round(b_reg[0]), Format::round(b_reg[1]));
    for (int i = 0; i < 4; ++i) store_global(&d[(group + i / 2 * 8) * 8 + k * 2 + i % 2], d_reg[i]);
  });
  const auto tf32 = [](float f) {
    return std::ldexp(std::round(std::ldexp(f, 10 - std::ilogb(f))), std::ilogb(f) - 10);
  };
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = 1;
      for (int k = 0; k < 8; ++k) sum += tf32(a[m * 8 + k]) * tf32(b[k * 8 + n]);
      require(std::fabs(d[m * 8 + n] - sum) < 1e-5, "wrong product in tf32");
    }
  }
}

void test_rounding_to_tf32() {
  const std::pair<uint32_t, uint32_t> cases[] = {
      {0x3F800FFF, 0x3F800000}, {0x3F801000, 0x3F802000}, {0xBF801000, 0xBF802000},  // ties go away from zero
      {0x7F800000, 0x7F800000}, {0x7F7FFFFF, 0x7F800000}, {0x00000FFF, 0x00000000}};
  for (const auto& [bits, rounded] : cases) require(TensorFloat32::round(bits) == rounded, "wrong rounding to tf32");
  require(std::isnan(float_of(TensorFloat32::round(0x7FFFFFFF))), "a NaN stays one");
}

void test_matrix_products() {
  check_tf32_product();
  for (bool transposed : {false, true}) {
    check_matrix_product<BFloat16>(transposed);
    check_matrix_product<Float16>(transposed);
  }
}

// The value of a 16-bit format's finite bits, by definition.
double value_of(uint32_t bits, int mantissa_bits, int bias) {
  const int exponent = static_cast<int>((bits & 0x7FFF) >> mantissa_bits);
  const int mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1));
  const int implied = exponent == 0 ? 0 : 1 << mantissa_bits;
  const double magnitude = std::ldexp(mantissa + implied, std::max(exponent, 1) - bias - mantissa_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <class Format>
void check_format(int mantissa_bits, int bias) {
  const uint32_t infinity = 0x7FFFu >> mantissa_bits << mantissa_bits;
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const float f = Format::low(bits);
    require(f == value_of(bits, mantissa_bits, bias), "wrong value");
    require(Format::high((bits | 0x8000u) << 16) == -f, "wrong negative value");
    require(Format::pack(f, -f) == (bits | (bits | 0x8000u) << 16), "a value of the format is kept");
    if (bits + 1 == infinity) break;
    // Halfway to the next value, and the floats beside.
    const float next = Format::low(bits + 1), middle = static_cast<float>((static_cast<double>(f) + next) / 2);
    if (!(middle > f && middle < next)) continue;  // not a float: bf16's smallest values have no floats between them
    require(Format::pack(middle, 0) == bits + bits % 2, "ties go to even");
    require(Format::pack(std::nextafter(middle, f), 0) == bits, "rounded down");
    require(Format::pack(std::nextafter(middle, next), 0) == bits + 1, "rounded up");
  }
  require(Format::pack(INFINITY, -INFINITY) == (infinity | (infinity | 0x8000u) << 16), "infinities");
  require(Format::pack(3.4e38f, 0) == infinity, "overflow");
  require(std::isinf(Format::low(infinity)), "infinity");
  require(std::isnan(Format::low(infinity + 1)) && std::isnan(Format::low(0x7FFF)), "NaN");
  require(Format::pack(NAN, 0) == 0x7FFF, "NaN is kept");
}

void test_formats() {
  check_format<BFloat16>(7, 127);
  check_format<Float16>(10, 15);
}

// ------------------------------------------------------------------------------------------------ between blocks

constexpr int kBlocks = 12;

// Every block adds 1 to what its predecessor has published. `wrong` leaves out one thing.
enum class Wrong { kNothing, kNoBarrierBeforeRelease, kNoBarrierAfterAcquire, kPlainFlag };

emu::Report chain(const emu::Options& options, Wrong wrong = Wrong::kNothing) {
  std::vector<uint32_t> data((kBlocks + 1) * kThreads, kNaNs), flags(kBlocks + 2);
  for (int i = 0; i < kThreads; ++i) data[i] = i;
  flags[0] = 1;  // the chain's begin is ready
  uint32_t* ticket = &flags[kBlocks + 1];
  const auto report = emu::launch(kBlocks, kThreads, 16, {range_of(data), range_of(flags)}, options, [&] {
    if (thread_index() == 0) store_shared_4(dynamic_shared(), atomic_add(ticket, 1));
    sync_block();
    const uint32_t block = load_shared_4(dynamic_shared());
    if (thread_index() == 0) {
      while (load_acquire(&flags[block]) == 0) pause();
    }
    if (wrong != Wrong::kNoBarrierAfterAcquire) sync_block();
    const uint32_t* source = &data[block * kThreads + kThreads - 1 - thread_index()];
    store_global(&data[(block + 1) * kThreads + thread_index()], load_global(source) + 1);
    if (wrong != Wrong::kNoBarrierBeforeRelease) sync_block();
    if (thread_index() != 0) return;
    if (wrong == Wrong::kPlainFlag) {
      atomic_add(&flags[block + 1], 1);
    } else if (block % 2 == 0) {
      store_release(&flags[block + 1], 1);
    } else {
      atomic_add_acquire_release(&flags[block + 1], 1);
    }
  });
  for (uint32_t i = 0; i < kThreads; ++i) {
    const uint32_t begin = kBlocks % 2 == 0 ? i : kThreads - 1 - i;
    require(data[kBlocks * kThreads + i] == begin + kBlocks, "wrong sum");
  }
  return report;
}

void test_flags_order_blocks() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    for (int resident : {1, 3, kBlocks}) {
      for (bool stall : {false, true}) chain({.seed = seed, .resident_blocks = resident, .stall_release = stall});
    }
  }
}

void test_missing_order_is_caught() {
  require_caught("unordered read", [](uint64_t seed) { chain({.seed = seed, .faults = {.drop_acquire = true}}); });
  require_caught("unordered read",
                 [](uint64_t seed) { chain({.seed = seed, .faults = {.drop_release_order = true}}); });
  require_caught("unordered read", [](uint64_t seed) { chain({.seed = seed}, Wrong::kPlainFlag); });
  require_caught("unordered read",
                 [](uint64_t seed) { chain({.seed = seed, .resident_blocks = 1}, Wrong::kNoBarrierAfterAcquire); });
  // One block at a time has always written before the next one reads.
  require_caught("unordered read",
                 [](uint64_t seed) { chain({.seed = seed, .resident_blocks = 1}, Wrong::kNoBarrierBeforeRelease); });
}

void test_a_thread_publishes_what_it_has_acquired() {
  // Block 0 -> block 1 -> block 2, each a single thread at work: no barrier is needed.
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    std::vector<uint32_t> data(1), flags(4);
    emu::launch(3, 32, 0, {range_of(data), range_of(flags)}, {.seed = seed}, [&] {
      if (thread_index() != 0) return;
      const uint32_t block = atomic_add(&flags[3], 1);
      if (block == 0) {
        store_global(&data[0], 42u);
        store_release(&flags[0], 1);
        return;
      }
      while (load_acquire(&flags[block - 1]) == 0) pause();
      if (block == 2) require(load_global(&data[0]) == 42, "wrong value");
      store_release(&flags[block], 1);
    });
  }
}

void test_unordered_writes_are_caught() {
  require_caught("unordered write", [](uint64_t seed) {
    std::vector<uint16_t> data(2);
    emu::launch(2, 32, 0, {range_of(data)}, {.seed = seed}, [&] {
      if (thread_index() == 0) store_global(&data[1], uint16_t{1});
    });
  });
  // Neighbouring elements of one word are no conflict.
  std::vector<uint32_t> ticket(1);
  std::vector<uint16_t> data(2);
  emu::launch(2, 32, 0, {range_of(data), range_of(ticket)}, {}, [&] {
    if (thread_index() == 0) store_global(&data[atomic_add(&ticket[0], 1)], uint16_t{1});
  });
  require(data[0] == 1 && data[1] == 1, "both are written");
}

void test_global_bounds() {
  std::vector<uint32_t> data(31);
  require_caught("124 bytes after the begin of an array of 124 bytes", [&](uint64_t seed) {
    emu::launch(1, 32, 0, {range_of(data)}, {.seed = seed}, [&] { load_global(data.data() + thread_index()); });
  });
  require_caught("out of bounds", [&](uint64_t seed) {
    emu::launch(1, 32, 0, {range_of(data)}, {.seed = seed}, [&] { store_global(data.data() + thread_index(), 1u); });
  });
  alignas(16) static const std::array<uint16_t, 16> row{};
  const auto copy_from = [&](uint64_t seed, int first, int bytes) {
    emu::launch(1, 32, 512, {{row.data(), 24}}, {.seed = seed},
                [&] { copy_async_16(dynamic_shared() + thread_index() * 16, row.data() + first, bytes); });
  };
  copy_from(0, 8, 8);
  copy_from(0, 15, 0);
  require_caught("out of bounds", [&](uint64_t seed) { copy_from(seed, 8, 10); });
  require_caught("misaligned", [&](uint64_t seed) { copy_from(seed, 4, 16); });
  const auto copy_half_from = [&](uint64_t seed, int first, int bytes) {
    emu::launch(1, 32, 256, {{row.data(), 24}}, {.seed = seed},
                [&] { copy_async_8(dynamic_shared() + thread_index() * 8, row.data() + first, bytes); });
  };
  copy_half_from(0, 4, 8);
  require_caught("out of bounds", [&](uint64_t seed) { copy_half_from(seed, 12, 8); });
  require_caught("misaligned", [&](uint64_t seed) { copy_half_from(seed, 2, 8); });
  require_caught("copies 16 of 8 bytes", [&](uint64_t seed) { copy_half_from(seed, 0, 16); });
}

// ----------------------------------------------------------------------------------------------------- deadlocks

void test_deadlock_is_reported() {
  std::vector<uint32_t> flag(1);
  require_caught("deadlock", [&](uint64_t seed) {
    emu::launch(2, kThreads, 0, {range_of(flag)}, {.seed = seed}, [&] {
      if (thread_index() == 0) {
        while (load_acquire(&flag[0]) == 0) pause();
      }
      sync_block();
    });
  });
  require_caught("deadlock", [&](uint64_t seed) {
    emu::launch(1, kThreads, 0, {range_of(flag)}, {.seed = seed}, [&] {
      while (load_acquire(&flag[0]) == 0) continue;
    });
  });
  require_caught("deadlock", [](uint64_t seed) {
    emu::launch(1, 32, 0, {}, {.seed = seed}, [] {
      if (thread_index() < 5) {
        sync_block();
      } else {
        sync_warp();
      }
    });
  });
}

void test_exited_and_diverged_threads_are_reported() {
  require_caught("exited", [](uint64_t seed) {
    emu::launch(1, kThreads, 0, {}, {.seed = seed}, [] {
      if (thread_index() != 40) sync_block();
    });
  });
  require_caught("exited", [](uint64_t seed) {
    emu::launch(1, kThreads, 0, {}, {.seed = seed}, [] {
      if (thread_index() != 40) sync_warp();
    });
  });
  require_caught("while other lanes are at", [](uint64_t seed) {
    emu::launch(1, kThreads, 0, {}, {.seed = seed}, [] {
      if (thread_index() != 40) sync_warp();
      sync_warp();
    });
  });
}

struct Test {
  const char* name;
  void (*run)();
};

#define TEST(f) \
  Test { #f, &f }
constexpr Test kTests[] = {
    TEST(test_reverse),
    TEST(test_missing_barrier_is_a_race),
    TEST(test_overwriting_what_others_read_is_a_race),
    TEST(test_lanes_are_ordered_by_sync_warp),
    TEST(test_ballot),
    TEST(test_trap),
    TEST(test_shared_bounds),
    TEST(test_async_copy),
    TEST(test_missing_wait_is_caught),
    TEST(test_matrix_products),
    TEST(test_rounding_to_tf32),
    TEST(test_formats),
    TEST(test_flags_order_blocks),
    TEST(test_missing_order_is_caught),
    TEST(test_a_thread_publishes_what_it_has_acquired),
    TEST(test_unordered_writes_are_caught),
    TEST(test_global_bounds),
    TEST(test_deadlock_is_reported),
    TEST(test_exited_and_diverged_threads_are_reported),
    TEST(selftest_async),
};

}  // namespace
}  // namespace lk

int main() {
  int failed = 0;
  for (const lk::Test& test : lk::kTests) {
    try {
      test.run();
      std::printf("ok      %s\n", test.name);
    } catch (const std::exception& e) {
      ++failed;
      std::printf("FAILED  %s: %s\n", test.name, e.what());
    }
  }
  return failed == 0 ? 0 : 1;
}
