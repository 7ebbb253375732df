// Proves what the emulator has of sm_90 (async.h) on kernels small enough to be checked by eye: right ones must pass,
// wrong ones be caught. A part of selftest.cpp's program.
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../device_sm90.h"

namespace lk {
namespace {

constexpr int kSeeds = 20, kRowBytes = 128, kColumns = 64;

template <class T>
emu::Range range_of(const std::vector<T>& v) {
  return {v.data(), v.size() * sizeof(T)};
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error(what);
}

// f(seed) must be stopped by an error that says one of these, whatever the seed.
template <class F, class... Others>
void require_caught(const std::string& message, const F& f, const Others&... others) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    std::string error = "nothing";
    try {
      f(seed);
    } catch (const std::runtime_error& e) {
      error = e.what();
    }
    if (((error.find(others) != std::string::npos) || ...)) continue;
    require(error.find(message) != std::string::npos, "expected \"" + message + "\", got \"" + error + "\"");
  }
}

template <class F>
void require_right(const F& f) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) f(seed);
}

emu::Options by_clocks(uint64_t seed, const emu::Faults& faults = {}) {
  return {.seed = seed, .faults = faults, .by_clocks = true};
}

// A matrix of rows of 64 bf16 elements, as boxes of so many rows.
TensorMap map_of(const std::vector<uint16_t>& matrix, int box_rows) {
  return emu::encoded({.data = reinterpret_cast<uint64_t>(matrix.data()),
                       .rows = matrix.size() / kColumns,
                       .columns = kColumns,
                       .stride_bytes = kRowBytes,
                       .box_rows = box_rows,
                       .box_columns = kColumns,
                       .swizzle_bytes = kRowBytes});
}

std::vector<uint16_t> random_matrix(int rows, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> value(-2, 2);
  std::vector<uint16_t> m(static_cast<size_t>(rows * kColumns));
  for (uint16_t& e : m) e = static_cast<uint16_t>(BFloat16::pack(value(random), 0));
  return m;
}

uint32_t word_of(const std::vector<uint16_t>& m, int row, int column) {
  const auto first = static_cast<size_t>(row * kColumns + column);
  return m[first] | static_cast<uint32_t>(m[first + 1]) << 16;
}

constexpr const char* kWrongBox = "wrong element of a box";

// Address of an element of a box.
uint32_t place(uint32_t box, int row, int column) {
  return box + static_cast<uint32_t>(row * kRowBytes + ((column / 8) ^ (row & 7)) * 16 + column % 8 * 2);
}

// --------------------------------------------------------------------------------------------- barriers in memory

// What warps write is handed on by a barrier in memory: two warps to two, several times through one slot.
void hand_on(const emu::Options& options, bool waits_for_empty = true, bool syncs_lanes = true) {
  constexpr int kRounds = 3;
  emu::launch(1, 128, 1024, {}, options, [&] {
    const uint32_t full = dynamic_shared() + 512, empty = full + kBytesBarrier;
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    if (thread_index() == 0) {
      barrier_init(full, 2);
      barrier_init(empty, 2 * 32);
      barrier_init_done();
    }
    sync_block();
    for (int round = 0; round < kRounds; ++round) {
      const uint32_t parity = static_cast<uint32_t>(round & 1),
                     own = dynamic_shared() + static_cast<uint32_t>(thread_index() % 64 * 4);
      if (warp < 2) {
        if (waits_for_empty) barrier_wait(empty, parity ^ 1);
        store_shared_4(own, static_cast<uint32_t>(round + lane));
        if (syncs_lanes) sync_warp();
        if (lane == 0) barrier_arrive(full);
      } else {
        barrier_wait(full, parity);
        const uint32_t word = load_shared_4(own ^ 4);
        require(!waits_for_empty || word == static_cast<uint32_t>(round + (lane ^ 1)), "wrong word");
        barrier_arrive(empty);
      }
    }
  });
}

void test_barriers_order_warps() {
  require_right([](uint64_t seed) { hand_on(by_clocks(seed)); });
  // Who reads may also miss two phases, and wait for ever.
  require_caught("shared-memory race", [](uint64_t seed) { hand_on(by_clocks(seed), false); }, "deadlock");
  require_caught("shared-memory race", [](uint64_t seed) { hand_on(by_clocks(seed), true, false); });
  require_caught("deadlock", [](uint64_t seed) { hand_on(by_clocks(seed, {.drop_arrival = 1})); });
}

void test_barriers_that_are_misused() {
  const auto run = [](uint64_t seed, bool syncs, int arrivals) {
    emu::launch(1, 64, 64, {}, by_clocks(seed), [&] {
      if (thread_index() == 0) barrier_init(dynamic_shared(), arrivals);
      if (syncs) sync_block();
      barrier_arrive(dynamic_shared());
    });
  };
  require_right([&](uint64_t seed) { run(seed, true, 64); });
  require_right([&](uint64_t seed) { run(seed, true, 32); });  // two phases
  require_caught("barrier", [&](uint64_t seed) { run(seed, false, 64); });
  require_caught("not by clocks", [](uint64_t seed) {
    emu::launch(1, 32, 64, {}, {.seed = seed}, [] { barrier_init(dynamic_shared(), 1); });
  });
}

void test_named_barriers() {
  const auto run = [](uint64_t seed, const emu::Faults& faults, int threads) {
    emu::launch(1, 128, 512, {}, by_clocks(seed, faults), [&] {
      const int half = thread_index() / 64;
      const uint32_t own = dynamic_shared() + static_cast<uint32_t>(thread_index() * 4);
      store_shared_4(own, 1);
      sync_named(1 + half, threads);
      load_shared_4(own ^ 128);
    });
  };
  require_right([&](uint64_t seed) { run(seed, {}, 64); });
  require_caught("shared-memory race", [&](uint64_t seed) { run(seed, {.drop_barrier = 0}, 64); });
  require_caught("deadlock", [&](uint64_t seed) { run(seed, {}, 128); });
  require_caught("of whole warps", [&](uint64_t seed) { run(seed, {}, 48); });
}

// -------------------------------------------------------------------------------------------------------- boxes

// Warp 1 adds one to what warp 0 has had copied, and has it copied back. Some of the box lies outside of the matrix.
struct Steps {
  bool waits = true, fences = true, waits_for_store = true, expects_all = true;
};
void through_shared(const emu::Options& options, const Steps& steps = {}) {
  constexpr int kRows = 16, kBoxRows = 8, kFirst = 12;
  const std::vector<uint16_t> in = random_matrix(kRows, 1);
  std::vector<uint16_t> out(in.size(), 0xFFFF);
  const TensorMap source = map_of(in, kBoxRows), target = map_of(out, kBoxRows);
  emu::launch(1, 64, 2048, {range_of(in), range_of(out)}, options, [&] {
    const uint32_t box = dynamic_shared(), full = box + 1024;
    if (thread_index() == 0) {
      barrier_init(full, 1);
      barrier_init_done();
    }
    sync_block();
    if (thread_index() == 0) {
      barrier_arrive_expecting(full, kBoxRows * kRowBytes - (steps.expects_all ? 0 : 16));
      load_box(box, &source, 0, kFirst, full);
    }
    if (thread_index() < 32) return;
    if (steps.waits) barrier_wait(full, 0);
    const int lane = thread_index() % 32;
    for (int i = lane; i < kBoxRows * kColumns / 2; i += 32) {
      const int row = i / (kColumns / 2), column = i % (kColumns / 2) * 2;
      const uint32_t old = load_shared_4(place(box, row, column));
      const uint32_t wanted = row < kRows - kFirst ? word_of(in, kFirst + row, column) : 0;
      if (old != wanted) throw std::runtime_error(kWrongBox);
      store_shared_4(place(box, row, column), old + 0x10001);
    }
    if (steps.fences) fence_proxy_async_shared();
    sync_warp();
    if (lane == 0) {
      store_box(&target, 0, kFirst, box);
      store_commit();
      if (steps.waits_for_store) store_wait_read<0>();
    }
  });
  for (size_t i = 0; i < in.size(); ++i) {
    const bool is_copied = i / kColumns >= kFirst;
    require(out[i] == (is_copied ? static_cast<uint16_t>(in[i] + 1) : 0xFFFF), "wrong element of the result");
  }
}

void test_boxes() {
  require_right([](uint64_t seed) { through_shared(by_clocks(seed)); });
  // Or it reads before the copy is issued, what is there then.
  require_caught("is under way", [](uint64_t seed) { through_shared(by_clocks(seed), {.waits = false}); }, kWrongBox);
  require_caught("not shown by a fence", [](uint64_t seed) { through_shared(by_clocks(seed), {.fences = false}); });
  require_caught("not stored yet", [](uint64_t seed) { through_shared(by_clocks(seed), {.waits_for_store = false}); });
  require_caught("deadlock", [](uint64_t seed) { through_shared(by_clocks(seed), {.expects_all = false}); });
  require_caught("is under way",
                 [](uint64_t seed) { through_shared(by_clocks(seed, {.ignore_expected_bytes = true})); });
  require_caught("is not shown to the engines",
                 [](uint64_t seed) { through_shared(by_clocks(seed, {.drop_proxy_fence = 0})); });
}

void test_a_staging_tile_in_use() {
  const auto run = [](uint64_t seed, const emu::Faults& faults) {
    std::vector<uint16_t> out(8 * kColumns);
    const TensorMap target = map_of(out, 8);
    emu::launch(1, 32, 1024, {range_of(out)}, by_clocks(seed, faults), [&] {
      for (int round = 0; round < 2; ++round) {
        if (thread_index() == 0) store_wait_read<0>();
        sync_warp();
        for (int i = thread_index(); i < 256; i += 32)
          store_shared_4(dynamic_shared() + static_cast<uint32_t>(i * 4), 1);
        fence_proxy_async_shared();
        sync_warp();
        if (thread_index() == 0) store_box(&target, 0, 0, dynamic_shared());
        if (thread_index() == 0) store_commit();
      }
      if (thread_index() == 0) store_wait_read<0>();
    });
  };
  require_right([&](uint64_t seed) { run(seed, {}); });
  require_caught("may still be read", [&](uint64_t seed) { run(seed, {.drop_store_wait = 0}); });
}

// A block's stores are read by another block's engine, behind a flag.
void test_fences_between_blocks() {
  const auto run = [](uint64_t seed, bool writer_fences, bool reader_fences) {
    std::vector<uint16_t> matrix(8 * kColumns);
    std::vector<uint32_t> flag(2);
    const TensorMap source = map_of(matrix, 8);
    emu::launch(2, 32, 2048, {range_of(matrix), range_of(flag)}, by_clocks(seed), [&] {
      if (broadcast(thread_index() == 0 ? atomic_add(&flag[1], 1) : 0) == 0) {
        for (int i = thread_index(); i < 8 * kColumns; i += 32)
          store_global(&matrix[static_cast<size_t>(i)], static_cast<uint16_t>(i));
        if (writer_fences) fence_proxy_async();
        sync_warp();
        if (thread_index() == 0) atomic_add_acquire_release(&flag[0], 1);
        return;
      }
      const uint32_t full = dynamic_shared() + 1024;
      if (thread_index() == 0) {
        barrier_init(full, 1);
        barrier_init_done();
        while (load_acquire(&flag[0]) == 0) pause();
        if (reader_fences) fence_proxy_async();
        barrier_arrive_expecting(full, 1024);
        load_box(dynamic_shared(), &source, 0, 0, full);
        barrier_wait(full, 0);
        require(load_shared_4(place(dynamic_shared(), 3, 2)) == (194u | 195u << 16), "wrong element of another block");
      }
    });
  };
  require_right([&](uint64_t seed) { run(seed, true, true); });
  require_caught("not shown by a fence", [&](uint64_t seed) { run(seed, false, true); });
  require_caught("without a fence since", [&](uint64_t seed) { run(seed, true, false); });
}

// --------------------------------------------------------------------------------------------------- clusters

emu::Options in_cluster(uint64_t seed, const emu::Faults& faults = {}) {
  emu::Options options = by_clocks(seed, faults);
  options.cluster = 2;
  return options;
}

// Block 0 stores a word in block 1, several times, and says so. What a wrong one does instead.
enum class Wrong { kNothing, kArrivesWithoutRelease, kWaitsForItsBlock, kForgetsEmpty, kOwnAddress };
void tell_other_block(const emu::Options& options, Wrong wrong = Wrong::kNothing) {
  constexpr uint32_t kRounds = 3, kOther = 1;
  emu::launch(4, 32, 64, {}, options, [&] {
    const uint32_t word = dynamic_shared(), full = word + 16, empty = full + kBytesBarrier;
    if (thread_index() == 0) {
      barrier_init(full, 1);
      barrier_init(empty, 1);
      barrier_init_done();
    }
    sync_cluster();
    for (uint32_t round = 0; thread_index() == 0 && round < kRounds; ++round) {
      if (cluster_rank() == 0) {
        if (wrong != Wrong::kForgetsEmpty) barrier_wait_cluster(empty, (round & 1) ^ 1);
        store_cluster_4(wrong == Wrong::kOwnAddress ? word : cluster_address(word, kOther), round);
        const uint32_t there = cluster_address(full, kOther);
        wrong == Wrong::kArrivesWithoutRelease ? barrier_arrive_cluster(there) : barrier_release_cluster(there);
      } else {
        wrong == Wrong::kWaitsForItsBlock ? barrier_wait(full, round & 1) : barrier_wait_cluster(full, round & 1);
        const uint32_t told = load_shared_4(word);
        require(wrong == Wrong::kForgetsEmpty || told == round, "wrong word of another block");
        barrier_release_cluster(cluster_address(empty, 0));
      }
    }
    sync_warp();
    sync_cluster();
  });
}

void test_clusters() {
  require_right([](uint64_t seed) { tell_other_block(in_cluster(seed)); });
  for (const Wrong wrong : {Wrong::kArrivesWithoutRelease, Wrong::kWaitsForItsBlock}) {
    require_caught("is not ordered before", [&](uint64_t seed) { tell_other_block(in_cluster(seed), wrong); });
  }
  require_caught(
      "is not ordered before", [](uint64_t seed) { tell_other_block(in_cluster(seed), Wrong::kForgetsEmpty); },
      "may still be read", "deadlock");  // a phase that is missed
  require_caught("no address of the cluster",
                 [](uint64_t seed) { tell_other_block(in_cluster(seed), Wrong::kOwnAddress); });
  // Who is told may already wait, where nobody has a barrier yet.
  require_caught(
      "may not be initialised yet", [](uint64_t seed) { tell_other_block(in_cluster(seed, {.drop_barrier = 0})); },
      "there is no barrier");
  require_caught(
      "may still reach its shared memory",
      [](uint64_t seed) { tell_other_block(in_cluster(seed, {.drop_barrier = 1})); }, "has ended");
}

// Each block has one half of a box copied to both, twice through the same place. Its threads look at all of it.
void share_boxes(const emu::Options& options, bool waits_for_both = true, bool expects_both = true) {
  constexpr int kHalf = 8, kBytesHalf = kHalf * kRowBytes;
  const std::vector<uint16_t> matrix = random_matrix(4 * kHalf, 4);
  const TensorMap map = map_of(matrix, kHalf);
  const auto report = emu::launch(2, 64, 4096, {range_of(matrix)}, options, [&] {
    const uint32_t box = dynamic_shared(), full = box + 2048, empty = full + kBytesBarrier, rank = cluster_rank();
    if (thread_index() == 0) {
      barrier_init(full, 1);
      barrier_init(empty, waits_for_both ? 2 * 32 : 32);
      barrier_init_done();
    }
    sync_cluster();
    for (int round = 0; round < 2; ++round) {
      if (thread_index() == 0) {
        barrier_wait_cluster(empty, static_cast<uint32_t>(round ^ 1));
        barrier_arrive_expecting(full, expects_both ? 2 * kBytesHalf : kBytesHalf);
        const int half = static_cast<int>(rank) * kHalf;
        load_box_cluster(box + static_cast<uint32_t>(half * kRowBytes), &map, 0, round * 2 * kHalf + half, full, 3);
      } else if (thread_index() >= 32) {
        barrier_wait(full, static_cast<uint32_t>(round));
        const int row = thread_index() % 32 / 2, column = thread_index() % 2 * 2;
        const bool is_right =
            load_shared_4(place(box, row, column)) == word_of(matrix, round * 2 * kHalf + row, column);
        if (!is_right) throw std::runtime_error(kWrongBox);
        for (uint32_t other = 0; other < 2; ++other) {
          if (waits_for_both || other == rank) barrier_release_cluster(cluster_address(empty, other));
        }
      }
    }
    sync_warp();
    sync_cluster();
  });
  require(report.bytes_loaded == 4 * kBytesHalf, "a box that comes to both blocks is read once");
}

void test_shared_boxes() {
  require_right([](uint64_t seed) { share_boxes(in_cluster(seed)); });
  require_caught("overwrites address", [](uint64_t seed) { share_boxes(in_cluster(seed), false); }, "is under way");
  require_caught(
      "is under way", [](uint64_t seed) { share_boxes(in_cluster(seed), true, false); }, "deadlock", kWrongBox);
}

// ------------------------------------------------------------------------------------------------- warpgroups

// d[64, 32] = 1 + p[64, 64] q[32, 64]T, or q[64, 32] as it lies. What comes after the products: a wait, and in front of
// it, for the wrong ones, what must not be.
enum class Early { kNothing, kReads, kOverwrites, kExits };
void multiply(const emu::Options& options, bool transposed, Early early = Early::kNothing) {
  const std::vector<uint16_t> p = random_matrix(64, 2), q = random_matrix(transposed ? 64 : 32, 3);
  std::vector<float> d(64 * 32);
  const TensorMap p_map = map_of(p, 64), q_map = map_of(q, transposed ? 64 : 32);
  const auto report = emu::launch(1, 128, 20 << 10, {range_of(p), range_of(q), range_of(d)}, options, [&] {
    const uint32_t p_smem = dynamic_shared(), q_smem = p_smem + 8192, full = q_smem + 8192;
    const int thread = thread_index(), lane = thread % 32;
    if (thread == 0) {
      barrier_init(full, 1);
      barrier_init_done();
      barrier_arrive_expecting(full, 8192 + (transposed ? 8192 : 4096));
      load_box(p_smem, &p_map, 0, 0, full);
      load_box(q_smem, &q_map, 0, 0, full);
    }
    sync_block();
    barrier_wait(full, 0);
    float acc[16];
    for (float& value : acc) value = 1.0f;
    multiply_fence();
    for (int i = 0; i < 4; ++i) {
      const uint64_t rows = matrix_descriptor(p_smem, 0, 1024) + static_cast<uint64_t>(i * 2);
      if (transposed) {
        const uint64_t columns = matrix_descriptor(q_smem, 8192, 1024) + static_cast<uint64_t>(i * 128);
        Warpgroup<BFloat16>::multiply_add_async<true>(acc, rows, columns, true);
      } else {
        const uint64_t columns = matrix_descriptor(q_smem, 0, 1024) + static_cast<uint64_t>(i * 2);
        Warpgroup<BFloat16>::multiply_add_async<false>(acc, rows, columns, true);
      }
    }
    multiply_commit();
    if (early == Early::kExits) return;
    if (early == Early::kReads) require(std::isnan(acc[3]), "registers of a product under way are not to be read");
    if (early == Early::kOverwrites && thread == 5) store_shared_4(p_smem + 256, 0);
    multiply_wait<0>(acc);
    for (int i = 0; i < 16; ++i) {
      const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      store_global(&d[static_cast<size_t>(row * 32 + column)], acc[i]);
    }
  });
  require(report.multiply_adds == 64 * 32 * 64, "products are counted");
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < 32; ++n) {
      double sum = 1;
      for (int k = 0; k < 64; ++k) {
        sum += BFloat16::low(p[static_cast<size_t>(m * 64 + k)]) *
               BFloat16::low(q[static_cast<size_t>(transposed ? k * 64 + n : n * 64 + k)]);
      }
      require(std::fabs(d[static_cast<size_t>(m * 32 + n)] - sum) < 1e-4, "wrong product");
    }
  }
}

void test_products() {
  for (const bool transposed : {false, true}) {
    require_right([&](uint64_t seed) { multiply(by_clocks(seed), transposed); });
  }
  require_right([](uint64_t seed) { multiply(by_clocks(seed), false, Early::kReads); });
  // In front of the last thread's issue it is the product that comes too late.
  require_caught(
      "may still be read", [](uint64_t seed) { multiply(by_clocks(seed), false, Early::kOverwrites); },
      "is not ordered before");
  require_caught("exits with products", [](uint64_t seed) { multiply(by_clocks(seed), false, Early::kExits); });
  require_caught("without a fence",
                 [](uint64_t seed) { multiply(by_clocks(seed, {.drop_multiply_fence = 0}), false); });
  require_caught("is under way", [](uint64_t seed) { multiply(by_clocks(seed, {.drop_barrier_wait = 0}), false); });
}

void test_store_matrix() {
  emu::launch(1, 32, 512, {}, by_clocks(0), [] {
    const int lane = thread_index();
    const uint32_t r[4] = {static_cast<uint32_t>(lane), static_cast<uint32_t>(lane) + 100,
                           static_cast<uint32_t>(lane) + 200, static_cast<uint32_t>(lane) + 300};
    store_matrix_x4(dynamic_shared() + static_cast<uint32_t>(lane * 16), r);
    sync_warp();
    // Row 5 of matrix 2: of lanes 20 to 23.
    require(load_shared_4(dynamic_shared() + (2 * 8 + 5) * 16 + 8) == 222, "wrong row of a matrix");
  });
}

}  // namespace

void selftest_async() {
  test_barriers_order_warps();
  test_barriers_that_are_misused();
  test_named_barriers();
  test_boxes();
  test_a_staging_tile_in_use();
  test_fences_between_blocks();
  test_clusters();
  test_shared_boxes();
  test_products();
  test_store_matrix();
}

}  // namespace lk
