// The dropout mask: Philox 4x32-10 (Salmon et al., SC 2011) as a pure function of (seed, row, column).
// One definition for CUDA, the CPU kernels and the tests; lora_kernels/philox.py is its reference in torch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lk {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
constexpr int kDropoutGroup = 8;  // elements served by one Philox call, 16 bits each

struct PhiloxWords {
  uint32_t word[4];
};

// Counter (lo32, hi32, 0, 0), key (lo32, hi32).
LK_HOST_DEVICE PhiloxWords philox4x32(uint64_t counter, uint64_t key) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Elements are kept iff their 16 bits are >= threshold, and scaled by `scale` = 65536 / (65536 - threshold).
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // round(65536 p), in [0, 65536]
  float scale;         // 0 where nothing is kept
};

inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(65536.0 * p + 0.5); }

inline Dropout make_dropout(int64_t seed, double p) {
  const uint32_t threshold = dropout_threshold(p);
  const uint32_t kept = 65536u - threshold;
  return {static_cast<uint64_t>(seed), threshold, kept == 0 ? 0.0f : static_cast<float>(65536.0 / kept)};
}

// Of the i-th of several masks that are drawn from one seed.
LK_HOST_DEVICE uint64_t member_seed(uint64_t seed, uint64_t member) { return seed + member * 0xD1B54A32D192ED03u; }

LK_HOST_DEVICE int64_t dropout_groups_per_row(int64_t columns) { return (columns + kDropoutGroup - 1) / kDropoutGroup; }

// The 16 bits of element `j` (0..7) of a group: word j / 2, low half first.
LK_HOST_DEVICE uint32_t dropout_bits(const PhiloxWords& words, int j) {
  return (words.word[j / 2] >> (16 * (j % 2))) & 0xFFFFu;
}

}  // namespace lk
