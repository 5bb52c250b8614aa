// The largest scores of a row, in ascending order of their places: radix select.
//
// A score's 32 bits, seen as an unsigned number, can be made to order like the scores. Counting how often
// each value of the leading 12 bits occurs shows those of the last score that is chosen; among the scores
// that share them the next 10 bits are counted, then the last 10. One more pass writes the places of all
// scores above that threshold, and of the first ones that equal it.
#pragma once

#include <cstring>

#include "block.h"

namespace longshadow {

constexpr uint32_t kLeadingBits = 12;
constexpr uint32_t kLaterBits = 10;
constexpr uint32_t kNumBins = 1u << kLeadingBits;
constexpr int kGroup = 4;  // scores, or bins, that are read together: 16 bytes

constexpr uint32_t kNeverChosen = 0;
constexpr uint32_t kInfinity = 0x7f800000u;

// Orders like the scores; scores that are infinite or no numbers are `kNeverChosen`, below all others.
LONGSHADOW_INLINE uint32_t order_key(uint32_t bits) {
  constexpr uint32_t kSign = 0x80000000u;
  if ((bits & kInfinity) == kInfinity) return kNeverChosen;
  if (bits == kSign) return kSign;  // -0 ties with 0
  return bits & kSign ? ~bits : bits | kSign;
}

// A row of scores in groups of four, cut where addresses are multiples of 16; the first and the last may have
// gaps.
class ScoreRow {
 public:
  using Group = Counts<kGroup>;

  LONGSHADOW_INLINE ScoreRow(const float* scores, uint32_t num_scores)
      : aligned_(reinterpret_cast<uintptr_t>(scores) & ~uintptr_t{15}),
        gap_(reinterpret_cast<uintptr_t>(scores) % 16 / sizeof(float)),
        num_scores_(num_scores) {}

  LONGSHADOW_INLINE uint32_t num_groups() const { return (gap_ + num_scores_ + kGroup - 1) / kGroup; }

  // The place in the row of a group's element; in a gap it is not below the number of scores.
  LONGSHADOW_INLINE uint32_t place(uint32_t group, int element) const {
    return group * kGroup + element - gap_;
  }

  // Bits of a group's scores; infinity in gaps and beyond the row.
  LONGSHADOW_INLINE Group load(uint32_t group) const {
    const uintptr_t address = aligned_ + group * sizeof(Group);
    if (place(group, 0) < num_scores_ && place(group, kGroup - 1) < num_scores_)
      return load_bits<Group>(address);
    Group loaded{kInfinity, kInfinity, kInfinity, kInfinity};
    for (int i = 0; i < kGroup; ++i) {
      if (place(group, i) < num_scores_) loaded.of[i] = load_bits<uint32_t>(address + i * sizeof(float));
    }
    return loaded;
  }

 private:
  template <typename Bits>
  static LONGSHADOW_INLINE Bits load_bits(uintptr_t address) {
#ifdef __CUDACC__
    if constexpr (sizeof(Bits) == sizeof(uint4)) {
      const uint4 vector = __ldg(reinterpret_cast<const uint4*>(address));
      return {vector.x, vector.y, vector.z, vector.w};
    } else {
      return __ldg(reinterpret_cast<const Bits*>(address));
    }
#else
    Bits bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(address), sizeof(bits));
    return bits;
#endif
  }

  uintptr_t aligned_;
  uint32_t gap_;
  uint32_t num_scores_;
};

// Keys above `key` are chosen, and the first `num_ties` equal to it.
struct Threshold {
  uint32_t key;
  uint32_t num_ties;
};

// `bins` counts keys by some of their bits, the highest first.
struct SelectMemory {
  Counts<kGroup> bins[kNumBins / kGroup];
  uint32_t bits, num_above,
      num_inside;  // of the bin the threshold is in; how many keys are above and inside it
};

// One row's choice; all threads of the block call every function, with equal arguments. With `cached` the
// keys of the row are kept in `cache`, which has room for `row.num_groups()` groups.
template <typename Block, bool cached>
class RowSelection {
 public:
  using Group = ScoreRow::Group;
  static constexpr int kBatch = 4;  // groups that a thread has in its registers

  LONGSHADOW_INLINE RowSelection(Block& block, SelectMemory& memory, ScoreRow row, Group* cache)
      : block_(block), memory_(memory), row_(row), num_groups_(row.num_groups()), cache_(cache) {}

  // Writes the places of the `count` largest finite scores, then -1 up to `capacity`, to `chosen`.
  LONGSHADOW_INLINE void choose(uint32_t count, int32_t* chosen, uint32_t capacity) {
    const uint32_t num_chosen = emit(threshold(count), count, chosen);
    block_.each([&](int thread) {
      for (uint32_t i = num_chosen + thread; i < capacity; i += Block::kNumThreads) chosen[i] = -1;
    });
  }

 private:
  // Groups `start + thread`, a block's width further, and so on.
  struct Batch {
    Group groups[kBatch];
  };

  LONGSHADOW_INLINE Threshold threshold(uint32_t count) {
    constexpr Threshold kEverything{kNeverChosen, 0}, kNothing{~0u, 0};
    if (count == 0) return kNothing;
    const uint32_t num_finite = count_keys<true, kLeadingBits, 2 * kLaterBits>(0, count);
    if (num_finite <= count) return kEverything;
    uint32_t prefix = memory_.bits;
    uint32_t needed = count - memory_.num_above;
    // A bin that is chosen whole need not be looked into.
    if (needed == memory_.num_inside) return {(prefix << 2 * kLaterBits) - 1, 0};
    count_keys<false, kLaterBits, kLaterBits>(prefix, needed);
    prefix = prefix << kLaterBits | memory_.bits;
    needed -= memory_.num_above;
    if (needed == memory_.num_inside) return {(prefix << kLaterBits) - 1, 0};
    count_keys<false, kLaterBits, 0>(prefix, needed);
    return {prefix << kLaterBits | memory_.bits, needed - memory_.num_above};
  }

  // Counts the values of the `num_bits` bits from `shift` on among the keys whose higher bits are `prefix`.
  // Leaves in `memory_` the bin of the key with `needed` - 1 larger ones, where there are that many, and
  // returns how many keys were counted. With `first` it fills the cache.
  template <bool first, uint32_t num_bits, uint32_t shift>
  LONGSHADOW_INLINE uint32_t count_keys(uint32_t prefix, uint32_t needed) {
    constexpr uint32_t kBins = 1u << num_bits;
    uint32_t* bins = memory_.bins[0].of;
    block_.each([&](int thread) {
      for (uint32_t i = thread; i < kBins / kGroup; i += Block::kNumThreads) memory_.bins[i] = {};
    });
    block_.each([&](int thread) {
      for (uint32_t start = 0; start < num_groups_; start += kBatch * Block::kNumThreads) {
        const Batch batch = load_keys<first>(start, thread);
        LONGSHADOW_UNROLL
        for (const Group& group : batch.groups) {
          LONGSHADOW_UNROLL
          for (const uint32_t key : group.of) {
            if (key == kNeverChosen || static_cast<uint64_t>(key) >> (num_bits + shift) != prefix) continue;
            Block::add(&bins[~key >> shift & (kBins - 1)], 1);
          }
        }
      }
    });
    return find_bin<kBins>(needed);
  }

  template <bool first>
  LONGSHADOW_INLINE Batch load_keys(uint32_t start, int thread) const {
    Batch batch;
    const auto group_of = [&](int i) { return start + i * Block::kNumThreads + thread; };
    if constexpr (cached && !first) {
      LONGSHADOW_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        batch.groups[i] = group_of(i) < num_groups_ ? cache_[group_of(i)] : Group{};
      }
    } else {
      // All loads first, so that they are under way at once.
      LONGSHADOW_UNROLL
      for (int i = 0; i < kBatch; ++i) batch.groups[i] = row_.load(group_of(i));
      LONGSHADOW_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        LONGSHADOW_UNROLL
        for (uint32_t& bits : batch.groups[i].of) bits = order_key(bits);
        if (cached && group_of(i) < num_groups_) cache_[group_of(i)] = batch.groups[i];
      }
    }
    return batch;
  }

  // Each thread looks at some neighbouring groups of bins.
  template <uint32_t num_bins>
  LONGSHADOW_INLINE uint32_t find_bin(uint32_t needed) {
    constexpr uint32_t kGroups = num_bins / kGroup;
    constexpr uint32_t kPerThread = (kGroups + Block::kNumThreads - 1) / Block::kNumThreads;
    const auto end = [](int thread) {
      const uint32_t last = (thread + 1) * kPerThread;
      return last < kGroups ? last : kGroups;
    };
    typename Block::template PerThread<Counts<1>> above;
    block_.each([&](int thread) {
      above[thread] = {};
      for (uint32_t i = thread * kPerThread; i < end(thread); ++i) {
        const Counts<kGroup> counts = memory_.bins[i];
        for (const uint32_t inside : counts.of) above[thread].of[0] += inside;
      }
    });
    const uint32_t num_counted = block_.scan(above).of[0];
    block_.each([&](int thread) {
      uint32_t num_above = above[thread].of[0];
      for (uint32_t i = thread * kPerThread; i < end(thread); ++i) {
        const Counts<kGroup> counts = memory_.bins[i];
        for (int j = 0; j < kGroup; ++j) {
          const uint32_t inside = counts.of[j];
          if (num_above < needed && needed <= num_above + inside) {
            memory_.bits = num_bins - 1 - (i * kGroup + j);
            memory_.num_above = num_above;
            memory_.num_inside = inside;
          }
          num_above += inside;
        }
      }
    });
    return num_counted;
  }

  // Writes the places that the threshold lets through, in the row's order, and returns how many they are, at
  // most `count`.
  LONGSHADOW_INLINE uint32_t emit(Threshold threshold, uint32_t count, int32_t* chosen) {
    const auto num_emitted = [&](uint32_t above, uint32_t equal) {
      return above + (equal < threshold.num_ties ? equal : threshold.num_ties);
    };
    // A scan adds up keys above and keys equal at once, 16 bits each.
    constexpr int kHalf = 16;
    static_assert(kGroup * Block::kNumThreads < 1 << kHalf);
    const auto low = [](uint32_t packed) { return packed & ((1u << kHalf) - 1); };
    uint32_t num_above = 0, num_equal = 0;
    typename Block::template PerThread<Batch> batches;
    typename Block::template PerThread<Counts<kBatch>> before;
    for (uint32_t start = 0; start < num_groups_ && num_emitted(num_above, num_equal) < count;
         start += kBatch * Block::kNumThreads) {
      block_.each([&](int thread) {
        batches[thread] = load_keys<false>(start, thread);
        before[thread] = {};
        LONGSHADOW_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          for (const uint32_t key : batches[thread].groups[i].of) {
            before[thread].of[i] += (key > threshold.key) + ((key == threshold.key) << kHalf);
          }
        }
      });
      const Counts<kBatch> sums = block_.scan(before);
      block_.each([&](int thread) {
        uint32_t above_round = num_above, equal_round = num_equal;
        LONGSHADOW_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          uint32_t above = above_round + low(before[thread].of[i]);
          uint32_t equal = equal_round + (before[thread].of[i] >> kHalf);
          LONGSHADOW_UNROLL
          for (int j = 0; j < kGroup; ++j) {
            const uint32_t key = batches[thread].groups[i].of[j];
            if (key > threshold.key || (key == threshold.key && equal < threshold.num_ties)) {
              chosen[num_emitted(above, equal)] = row_.place(start + i * Block::kNumThreads + thread, j);
            }
            above += key > threshold.key;
            equal += key == threshold.key;
          }
          above_round += low(sums.of[i]);
          equal_round += sums.of[i] >> kHalf;
        }
      });
      for (const uint32_t sum : sums.of) {
        num_above += low(sum);
        num_equal += sum >> kHalf;
      }
    }
    return num_emitted(num_above, num_equal);
  }

  Block& block_;
  SelectMemory& memory_;
  ScoreRow row_;
  uint32_t num_groups_;
  Group* cache_;
};

}  // namespace longshadow
