// Problem -> tile, schedule, grid of lora_linear and its gradients: what every launch, plan, the emulator and the tests
// agree on. Host only, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>

#include "tiles.h"

namespace lk {

// How a launch shares out its work. Shrink and expand are launches of "cublas", the schedule that has no kernel of its
// own; wgmma is sm_90a's (lora_linear_wgmma.h).
enum class Schedule : int32_t { kTicketed, kColumn0, kDual, kDecode, kShrink, kExpand, kWgmma };

constexpr const char* name_of(Schedule schedule) {
  constexpr const char* kNames[] = {"ticketed", "column-0", "dual", "decode", "shrink", "expand", "wgmma"};
  return kNames[static_cast<int>(schedule)];
}

enum class LoraRole : int32_t { kForward, kGradX };

// Which rows a kernel reads, and of s and gradients writes, in chunks of 16 bytes; others go element by element. Rows
// of y are looked at where they are stored.
enum class Access : int32_t {
  kWhole,        // all
  kGatherRanks,  // x, w, and of the adapter the factor whose rows are long: not s, nor what has `rank` elements a row
  kGatherAll,    // none
};

constexpr const char* name_of(Access access) {
  constexpr const char* kNames[] = {"whole", "gather ranks", "gather all"};
  return kNames[static_cast<int>(access)];
}

constexpr Access access_of(bool long_rows_are_whole, bool all_are_whole) {
  return all_are_whole ? Access::kWhole : long_rows_are_whole ? Access::kGatherRanks : Access::kGatherAll;
}

// What tells the kernels of lora_linear and of the gradient of x apart.
struct LoraKey {
  LoraRole role;
  Schedule schedule;
  LoraTile tile;
  int rank_tile;  // columns of s that a block computes at a time
  Access access;
  int cluster = 1;  // blocks of a cluster

  friend constexpr bool operator==(const LoraKey&, const LoraKey&) = default;
};

struct LoraLinearConfig {
  LoraKey key;
  int64_t blocks;    // one per tile of s and of y, and per split
  int group_rows;    // blocks of rows, of clusters such of all their blocks, whose tickets follow each other
  int64_t counters;  // 32-bit words of workspace, zero before the launch
  int splits;        // parts of the depth (decode, dual, shrink)
  int split_depth;
  int64_t partials;    // floats of workspace
  const char* reason;  // of the schedule
  const char* tile_reason;
};

// Rows of x that a group may span: its tiles share them through the L2 cache.
constexpr int kGroupRows = 1024;

constexpr int rank_tile_of(int64_t rank) { return rank <= 16 ? 16 : 64; }

// Where nothing but the adapter's product is computed, which reads x or dY once per tile of ranks, and drops it once.
constexpr int wide_rank_tile_of(int64_t rank) { return rank <= 64 ? rank_tile_of(rank) : 128; }

// Where one block has all ranks of s, as in column-0, dual and decode.
constexpr int kMaxRankOfBlock = 64;

// What ticketed and column-0 share: one ticket per tile, of so many blocks of rows.
inline void plan_tickets_of(int64_t rows, int64_t n, int64_t rank, LoraLinearConfig& config) {
  const TileShape tile = tile_shape(config.key.tile);
  const int64_t shrink_columns = config.key.schedule == Schedule::kTicketed ? blocks_of(rank, config.key.rank_tile) : 0;
  config.blocks = rows * (shrink_columns + blocks_of(n, tile.columns));
  config.group_rows = static_cast<int>(std::clamp<int64_t>(rows, 1, kGroupRows / tile.rows));
  config.counters = 2 + rows;
}

inline void plan_tickets(int64_t m, int64_t n, int64_t rank, LoraLinearConfig& config) {
  plan_tickets_of(blocks_of(m, tile_shape(config.key.tile).rows), n, rank, config);
}

// What dual, decode and shrink share: blocks that need no other's s. The depth k is split while SMs are idle.
inline void plan_splits(int64_t m, int64_t columns, int64_t k, int element_bytes, const DeviceLimits& device,
                        LoraLinearConfig& config) {
  // A split has at least so many stages to stream. Of s alone they are short, and summing the parts is not.
  const int min_steps = config.key.schedule == Schedule::kShrink ? 8 : 4;
  const int blocks_per_sm = config.key.schedule == Schedule::kDual ? 2 : 4;
  const TileShape tile = tile_shape(config.key.tile);
  const int depth = tile.depth(element_bytes);
  const int64_t rows = blocks_of(m, tile.rows), tiles = rows * blocks_of(columns, tile.columns);
  int64_t splits = 1;
  if (tiles > 0) {
    const int64_t most = std::max<int64_t>(1, blocks_of(k, depth) / min_steps);
    splits = std::clamp<int64_t>(blocks_per_sm * device.sms / tiles, 1, most);
  }
  config.split_depth = static_cast<int>(blocks_of(blocks_of(k, depth), static_cast<int>(splits)) * depth);
  config.splits = config.split_depth == 0 ? 1 : static_cast<int>(blocks_of(k, config.split_depth));
  config.blocks = tiles * config.splits;
  if (config.splits == 1) return;
  config.counters = tiles;
  const int64_t floats_of_s = config.key.schedule == Schedule::kShrink ? 0 : rows * tile.rows * config.key.rank_tile;
  config.partials = config.splits * (tiles * tile.rows * tile.columns + floats_of_s);
}

// Whether a block can have all of s that it needs.
constexpr bool has_own_s(int64_t rank, bool has_dropout) { return rank <= kMaxRankOfBlock && !has_dropout; }

inline bool decodes(int64_t m, int64_t rank, Access access, bool has_dropout) {
  return m <= tile_shape(LoraTile::kFlat).rows && access != Access::kGatherAll && has_own_s(rank, has_dropout);
}

// Where small tiles that split the depth were in most sizes faster, on an H200, than the vendor's GEMM and the branch
// beside it: one block of rows, so that w is read once, and a narrow tile of ranks.
constexpr int64_t kFewRows = tile_shape(LoraTile::kSmall).rows;

inline bool is_dual(int64_t m, int64_t n, int64_t rank, Access access, bool has_dropout) {
  const bool few_rows = m <= kFewRows && rank_tile_of(rank) == 16;
  return (few_rows || n <= tile_shape(LoraTile::kSmall).columns) && access == Access::kWhole &&
         has_own_s(rank, has_dropout);
}

inline bool serves_few_rows(int64_t m, int64_t n, int64_t rank, Access access, bool has_dropout) {
  return decodes(m, rank, access, has_dropout) || (m <= kFewRows && is_dual(m, n, rank, access, has_dropout));
}

// How a forward of y [m, n] from x [m, k] with this rank is launched, in one launch; access: not kGatherAll.
// element_bytes: of x.
inline LoraLinearConfig lora_linear_config(int64_t m, int64_t n, int64_t k, int64_t rank, int element_bytes,
                                           Access access, bool has_dropout, const DeviceLimits& device) {
  LoraLinearConfig config{};
  config.key.role = LoraRole::kForward;
  config.key.access = access;
  config.key.rank_tile = rank_tile_of(rank);
  config.splits = 1;
  if (decodes(m, rank, access, has_dropout)) {
    config.key.schedule = Schedule::kDecode;
    config.reason = "few rows: reading w is all that counts, and blocks share out its columns and the depth";
    config.key.tile = LoraTile::kFlat;
    config.tile_reason = "few rows";
  } else if (is_dual(m, n, rank, access, has_dropout)) {
    config.key.schedule = Schedule::kDual;
    config.key.tile = LoraTile::kSmall;
    if (m <= kFewRows) {
      config.reason = "few rows: every block computes s for its part of the depth, and nobody waits";
      config.tile_reason = "blocks share out the depth, too";
    } else {
      config.reason = "y is one tile wide: no other block needs these rows of s";
      config.tile_reason = "y is no wider";
    }
  } else {
    config.key.tile = choose_tile(m, n, device, config.tile_reason);
    if (config.key.tile == LoraTile::kLarge && config.key.rank_tile == 64 && access == Access::kWhole &&
        has_own_s(rank, has_dropout)) {
      config.key.schedule = Schedule::kColumn0;
      config.reason = "one block per SM: nobody would fill the gap while it waits for a tile of s";
    } else {
      config.key.schedule = Schedule::kTicketed;
      config.reason = has_dropout              ? "dropout is applied once, in tiles of s alone"
                      : rank > kMaxRankOfBlock ? "the rank is too large for one block"
                      : access == Access::kGatherRanks
                          ? "rows of the rank's length are not whole chunks: tiles of s run beside tiles of y"
                          : "several blocks per SM: tiles of s run beside tiles of y";
    }
  }
  if (config.key.schedule == Schedule::kDual || config.key.schedule == Schedule::kDecode) {
    plan_splits(m, n, k, element_bytes, device, config);
  } else {
    plan_tickets(m, n, rank, config);
  }
  return config;
}

// The launches of "cublas" for y [m, n], or dX: under dropout s from x [m, k], which is the vendor's product, too,
// where nothing is dropped; and the branch, onto which the vendor's product with w is accumulated.
inline LoraLinearConfig shrink_config(int64_t m, int64_t k, int64_t rank, int element_bytes, Access access,
                                      const DeviceLimits& device) {
  LoraLinearConfig config{};
  const int rank_tile = wide_rank_tile_of(rank);
  const LoraTile tile = rank_tile == 16 ? LoraTile::kNarrow : rank_tile == 64 ? LoraTile::kSmall : LoraTile::kWide;
  config.key = {LoraRole::kForward, Schedule::kShrink, tile, rank_tile, access};
  config.reason = "s alone: x is read and dropped out once";
  config.tile_reason = "as wide as the ranks that a block computes";
  plan_splits(m, rank, k, element_bytes, device, config);
  return config;
}

inline LoraLinearConfig expand_config(LoraRole role, int64_t m, int64_t n, Access access) {
  LoraLinearConfig config{};
  config.key = {role, Schedule::kExpand, LoraTile::kBranch, 0, access};
  config.splits = 1;
  config.reason = "the branch is written before the vendor's product is accumulated onto it";
  config.tile_reason = "two stages are as deep as most ranks";
  const TileShape tile = tile_shape(config.key.tile);
  config.blocks = blocks_of(m, tile.rows) * blocks_of(n, tile.columns);
  return config;
}

// ------------------------------------------------------------------------------- one launch, or the vendor's GEMM

// Who decides: the model below, or who asks for one or the other (tests, benchmarks, measured winners).
enum class Wanted : int32_t { kBest, kOneLaunch, kCublas, kWgmma, kWgmmaClusters };

// Whether there is nothing left to decide. Wgmma is taken where it fits, and what is best elsewhere.
constexpr bool is_decided(Wanted wanted) { return wanted == Wanted::kOneLaunch || wanted == Wanted::kCublas; }
constexpr bool is_wgmma(Wanted wanted) { return wanted == Wanted::kWgmma || wanted == Wanted::kWgmmaClusters; }

// By the name of a schedule, as a caller of the op or of a plan gives it: the verdict's, where the model decides, or
// "auto". Nothing by another name.
constexpr const char* kWantedNames =
    "\"auto\", \"tensor cores\", \"one launch\", \"cublas\", \"wgmma\" or \"wgmma, clusters\"";
inline std::optional<Wanted> wanted_by(std::string_view schedule) {
  if (schedule == "auto" || schedule == "tensor cores") return Wanted::kBest;
  if (schedule == "one launch") return Wanted::kOneLaunch;
  if (schedule == "cublas") return Wanted::kCublas;
  if (schedule == "wgmma") return Wanted::kWgmma;
  if (schedule == "wgmma, clusters") return Wanted::kWgmmaClusters;
  return std::nullopt;
}

struct UsesCublas {
  bool yes;
  const char* reason;
};

// Whether large problems of a GPU go to the vendor's GEMM. The branch in launches of its own takes a pass over x and
// one over y more than the product alone, on an H200 a fifth of its time for 8192 rows of 4096 x 4096; one launch must
// come as close to the vendor's rate with the main loop of mma.sync. Where that was not measured, its share is reckoned
// from machine code.
inline UsesCublas prefers_cublas(int capability, bool large) {
  switch (capability / 10) {
    case 8:
      if (capability != 80 && capability != 87) break;
      return {large, large ? "sm_80: mma.sync is reckoned at four fifths of the vendor's rate, the branch costs less"
                           : "sm_80: few tiles: one launch costs less than three"};
    case 9:
      return {true, "sm_90: mma.sync reaches three fifths of the rate of the vendor's wgmma (measured on an H200)"};
    case 10:
    case 11:
      return {true, "sm_100: mma.sync cannot keep up with tcgen05, which the vendor's GEMM uses"};
    default:
      break;
  }
  return {false, "mma.sync is what the vendor's GEMM uses here, too: one launch saves the passes over x and y"};
}

// For y [m, n], or dX. few_rows: a kernel for few rows would take it (the forward's alone).
inline UsesCublas uses_cublas(int64_t m, int64_t n, int element_bytes, Access access, bool few_rows,
                              const DeviceLimits& device, Wanted wanted) {
  if (access == Access::kGatherAll) return {true, "rows of x, w, dY or of an adapter are not whole chunks of 16 bytes"};
  if (is_decided(wanted)) return {wanted == Wanted::kCublas, "as asked"};
  if (few_rows) return {false, "few rows"};
  if (n % chunk_elements(element_bytes) != 0) {
    return {false, "rows of y are not whole chunks of 16 bytes, which costs the vendor's GEMM most of its rate"};
  }
  const char* tile_reason;
  const LoraTile tile = choose_tile(m, n, device, tile_reason);
  const TileShape shape = tile_shape(tile);
  if (blocks_of(m, shape.rows) * blocks_of(n, shape.columns) < device.sms) {
    return {true, "fewer tiles than SMs: the vendor's GEMM splits the depth"};
  }
  return prefers_cublas(device.capability, tile == LoraTile::kLarge);
}

// ---------------------------------------------------------------------------------------------------- gradients

// What the launches of the gradients may read in chunks, each by what it reads.
struct LoraBackwardAccess {
  Access grad_x;                                      // dX in one launch: dY, w, a, b and the forward's s
  Access expand;                                      // its branch alone: s' and a
  bool x_is_whole, grad_y_is_whole, ranks_are_whole;  // dA and dB: x, dY, and s with s'
};

struct LoraGradsKey {
  int rank_tile;
  Access access;  // of x, s and s'
  bool grad_y_is_whole;

  friend constexpr bool operator==(const LoraGradsKey&, const LoraGradsKey&) = default;
};

// Not every combination has a kernel: one that reads x, or dY, element by element does so with what is smaller, too.
constexpr LoraGradsKey grads_key(int rank_tile, bool x_is_whole, bool grad_y_is_whole, bool ranks_are_whole) {
  grad_y_is_whole = grad_y_is_whole && x_is_whole;
  return {rank_tile, access_of(x_is_whole, grad_y_is_whole && ranks_are_whole), grad_y_is_whole};
}

struct LoraGradsConfig {
  LoraGradsKey key;
  int splits, split_rows;  // parts of the rows
  int64_t blocks;
  int64_t counters;  // 32-bit words of workspace, zero before the launch
  int64_t partials;  // floats of workspace
};

// The launches of dX = dY W + ... with s' = dY B, then dA and dB.
struct LoraBackwardConfig {
  UsesCublas cublas;
  bool vendor_makes_s;      // s' = dY B is a product of the vendor's, and grad_x has no blocks
  LoraLinearConfig grad_x;  // dX and s'
  LoraLinearConfig expand;  // cublas, where dX is wanted: the branch of dX; else no blocks
  // Blocks of rows of which the first launch leaves parts of dB for the last to sum, or 0: the last reads dY again.
  int64_t parts_of_grad_b;
  int64_t partial_grad_b;  // floats of workspace
  LoraGradsConfig grads;
};

// dA [rank, k] and dB [n, rank] over m rows. k or n is 0 where the gradient is not wanted.
inline LoraGradsConfig lora_grads_config(int64_t m, int64_t n, int64_t k, int64_t rank, int64_t parts_of_grad_b,
                                         const LoraBackwardAccess& access, const DeviceLimits& device) {
  constexpr int kColumns = 128, kDepth = 32, kBlocksPerSm = 2, kMinRows = 256;
  LoraGradsConfig config{};
  const bool reads_x = k > 0, reads_grad_y = n > 0 && parts_of_grad_b == 0;
  config.key = grads_key(wide_rank_tile_of(rank), !reads_x || access.x_is_whole,
                         !reads_grad_y || access.grad_y_is_whole, access.ranks_are_whole);
  const int64_t columns = blocks_of(k, kColumns) + (parts_of_grad_b > 0 ? 0 : blocks_of(n, kColumns));
  const int64_t tiles = columns * blocks_of(rank, config.key.rank_tile);
  const int64_t most = std::max<int64_t>(1, m / kMinRows);
  const int64_t splits = tiles == 0 ? 1 : std::clamp<int64_t>(kBlocksPerSm * device.sms / tiles, 1, most);
  config.split_rows = static_cast<int>(blocks_of(blocks_of(m, static_cast<int>(splits)), kDepth) * kDepth);
  config.splits = config.split_rows == 0 ? 1 : static_cast<int>(blocks_of(m, config.split_rows));
  config.blocks = tiles * config.splits + (parts_of_grad_b > 0 ? blocks_of(n, kColumns) : 0);
  if (config.splits == 1) return config;
  config.counters = tiles;
  config.partials = tiles * config.splits * kColumns * config.key.rank_tile;
  return config;
}

// What a launch of dX that computes s' leaves of dB [n, rank]. Parts of dB take as much traffic per rank as 1/32 of dY:
// beyond a narrow rank tile it is cheaper to read dY twice.
inline void plan_parts_of_grad_b(int64_t m, int64_t n, bool need_b, LoraBackwardConfig& config) {
  const LoraKey& key = config.grad_x.key;
  if (!need_b || key.rank_tile != 16) return;
  config.parts_of_grad_b = blocks_of(m, tile_shape(key.tile).rows);
  config.partial_grad_b = config.parts_of_grad_b * n * key.rank_tile;
}

// How the gradients for dY [m, n] and x [m, k] are launched.
inline LoraBackwardConfig lora_backward_config(int64_t m, int64_t n, int64_t k, int64_t rank,
                                               const LoraBackwardAccess& access, bool need_x, bool need_a, bool need_b,
                                               const DeviceLimits& device, UsesCublas cublas) {
  LoraBackwardConfig config{};
  config.cublas = cublas;
  LoraLinearConfig& grad_x = config.grad_x;
  if (need_x && !config.cublas.yes) {
    grad_x.key = {LoraRole::kGradX, Schedule::kTicketed, LoraTile::kSmall, rank_tile_of(rank), access.grad_x};
    grad_x.splits = 1;
    grad_x.reason = "tiles of s' also compute parts of dB while they have dY";
    grad_x.key.tile = choose_tile(m, k, device, grad_x.tile_reason);
    plan_tickets(m, k, rank, grad_x);
    plan_parts_of_grad_b(m, n, need_b, config);
  } else {
    config.vendor_makes_s = need_x || need_a;
    if (need_x) config.expand = expand_config(LoraRole::kGradX, m, k, access.expand);
  }
  config.grads = lora_grads_config(m, need_b ? n : 0, need_a ? k : 0, rank, config.parts_of_grad_b, access, device);
  return config;
}

}  // namespace lk
