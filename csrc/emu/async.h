// What the twins of csrc/ptx/{mbarrier,tma,wgmma}.h are made of: warps that meet at barriers in memory, copies of boxes
// and products of warpgroups, which engines carry out beside the threads. For launches with Options::by_clocks.
//
// Besides what machine.h lists, a launch throws where
//   - a word is touched that no chain of barriers orders against another access, of a thread or of an engine: of a copy
//     from its issue to a wait at its barrier, of a product's operands from its issue to the wait for its group;
//   - an engine reads what a thread has stored and not shown by a fence (global memory: and the reader has not fenced
//     after it learnt of the store);
//   - another block of the cluster reaches shared memory of one that may have ended, or has not begun;
//   - registers are used for a product without a fence, or a block ends with copies or products that nobody waited for.
// Between blocks of a cluster an arrival at a barrier hands on what engines have done; what threads have done only
// where it releases, and to who waits for the cluster. A copy arrives only when somebody waits for it, a box is stored
// only when its group is waited for, and an accumulator is NaN while products with it are under way.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params/tensor_map.h"
#include "machine.h"

namespace lk::emu {

// What a tensor map says of a matrix of 16-bit elements: its rows and columns, and the boxes that copies have.
struct BoxMap {
  uint64_t data, rows, columns, stride_bytes;
  int32_t box_rows, box_columns, swizzle_bytes;
};

// The emulator's tensor maps hold it as it is.
inline TensorMap encoded(const BoxMap& map) {
  static_assert(sizeof map <= sizeof(TensorMap));
  TensorMap encoded{};
  std::memcpy(&encoded, &map, sizeof map);
  return encoded;
}

inline BoxMap decoded(const TensorMap* map) {
  BoxMap decoded;
  std::memcpy(&decoded, map, sizeof decoded);
  return decoded;
}

// d[64, columns] (+)= p[64, 16] q[columns, 16]T, operands by descriptors of shared memory.
struct ProductOf {
  Element element = Element::kBFloat16;
  int columns = 0;
  uint64_t p = 0, q = 0;
  bool transposed_p = false, transposed_q = false;
  bool accumulates = false;

  friend bool operator==(const ProductOf&, const ProductOf&) = default;
};

uint32_t broadcast(uint32_t value, Site site);
void sync_named(int barrier, int threads, Site site);

void barrier_init(uint32_t barrier, int arrivals, Site site);
void barrier_init_done(Site site);
void barrier_arrive(uint32_t barrier, int bytes, Site site);
void barrier_wait(uint32_t barrier, uint32_t parity, Site site);
void fence_proxy_async(bool shared_only, Site site);

uint32_t cluster_rank();
uint32_t cluster_address(uint32_t address, uint32_t rank, Site site);
void sync_cluster(Site site);
void store_cluster(uint32_t address, const void* source, size_t bytes, Site site);
void barrier_arrive_cluster(uint32_t barrier, bool releases, Site site);
void barrier_wait_cluster(uint32_t barrier, uint32_t parity, Site site);

void load_box(uint32_t address, const BoxMap& map, int column, int row, uint32_t barrier, Site site);
void load_box_cluster(uint32_t address, const BoxMap& map, int column, int row, uint32_t barrier, uint32_t ranks,
                      Site site);
void store_box(const BoxMap& map, int column, int row, uint32_t address, Site site);
void store_commit();
void store_wait_read(int pending, Site site);
void store_matrix(uint32_t row_address, const uint32_t (&r)[4], Site site);

void multiply_fence(Site site);
void multiply_add_async(const ProductOf& product, float* d, Site site);
void multiply_commit();
void multiply_wait(int pending, Site site);

}  // namespace lk::emu
